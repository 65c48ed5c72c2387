"""A plain PyTorch loop, watched: the one line is `watch(...)`."""

import torch
from torch import nn

from foreshock.monitor import watch

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

with watch(model, optimizer, run="plain-pytorch") as w:
    for step in range(24):
        x = torch.randn(8, 16)
        loss = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # The loss is computed outside of the model here, so the monitor is told.
        w.log(loss=loss)
        print("loss", step, loss.item())
