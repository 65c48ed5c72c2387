"""Scalars of a run in TensorBoard's files, beside or instead of the monitor."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from foreshock.trainer.loop import StepResult

__all__ = ["TensorboardLog"]


class TensorboardLog:
    """Called with every step's result; writes loss, grad_norm, learning_rate, speed and more.

    Args:
        folder: Of the event files; made where it is missing. A resumed run adds to it.

    Raises:
        ValueError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard needs the package: pip install tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        self._tokens: int | None = None

    def __call__(self, result: StepResult) -> None:
        """Take one step."""
        values = {
            "loss/train": result.loss,
            "loss/held_out": result.eval_loss,
            "cloze": result.cloze,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens": float(result.tokens),
        }
        if self._tokens is not None and result.seconds > 0:
            values["tokens_per_second"] = (result.tokens - self._tokens) / result.seconds
        self._tokens = result.tokens
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, result.step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
