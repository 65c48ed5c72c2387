"""The torch optimizer inside what a library wraps around it."""

from __future__ import annotations

import torch

__all__ = ["bare", "scaler_of"]


def bare(optimizer: object) -> torch.optim.Optimizer:
    """The optimizer whose own `step` moves the parameters.

    Accelerate, Lightning and Megatron keep it as `.optimizer`, some in several layers.

    Raises:
        TypeError: There is none inside.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__} with no torch.optim.Optimizer inside"
        )
    return optimizer


def scaler_of(optimizer: object) -> torch.amp.GradScaler | None:
    """The GradScaler that Accelerate keeps beside the optimizer, if there is one."""
    scaler = getattr(optimizer, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None
