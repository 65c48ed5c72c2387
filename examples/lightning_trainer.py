"""A Lightning Trainer, watched: the one line is the callback.

Without any line, in a program that knows nothing of foreshock: FORESHOCK_RUN=name python train.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from foreshock.monitor.integrations.lightning import ForeshockCallback


class Regression(LightningModule):
    """Sums its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss."""
        (x,) = batch
        loss: torch.Tensor = (self.body(x).squeeze(-1) - x.sum(-1)).square().mean()
        print("loss", index, loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


torch.manual_seed(0)
trainer = Trainer(
    max_steps=24,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[ForeshockCallback(run="lightning-trainer")],
)
trainer.fit(Regression(), DataLoader(TensorDataset(torch.randn(192, 16)), batch_size=8))
