"""An Accelerate loop, watched: a tracker for what is logged, `tracker.watch` for the tensors."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from foreshock.monitor.integrations.accelerate import ForeshockTracker

tracker = ForeshockTracker(run="accelerate-loop")
accelerator = Accelerator(cpu=True, log_with=[tracker])
accelerator.init_trackers("examples", config={"learning_rate": 1e-2})

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(torch.randn(192, 16)), batch_size=8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
tracker.watch(model, optimizer)

for step, (x,) in enumerate(loader):
    with accelerator.accumulate(model):
        loss = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.log({"loss": loss.item()}, step=step)
    print("loss", step, loss.item())
accelerator.end_training()
