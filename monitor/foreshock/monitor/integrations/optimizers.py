"""The torch optimizer inside what a library wraps around it."""

from __future__ import annotations

import torch

__all__ = ["bare"]


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
