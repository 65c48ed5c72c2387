"""A model converted by torchao for FP8 training, watched: its layers are known, no line more.

`emulate=True` is for machines without FP8 units.
"""

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from foreshock.monitor import watch

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

with watch(model, optimizer, run="torchao-float8") as w:
    for step in range(24):
        x = torch.randn(8, 16)
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        w.log(loss=loss)
        print("loss", step, loss.item())
