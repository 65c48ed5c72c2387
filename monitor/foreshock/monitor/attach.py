"""Refuse wrong use at attach, the only time when the monitor may raise."""

from __future__ import annotations

import os

import torch
from torch import nn

from foreshock.monitor.hooks import is_watched

__all__ = ["ranks", "trained_parameters"]


def trained_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[nn.Parameter, str]:
    """The parameters of the model that the optimizer trains, with their names.

    Raises:
        TypeError: model or optimizer is something else.
        ValueError: The model is compiled, is watched already, shares no parameter with the
            optimizer, or lies on several devices or on none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; watch needs a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; watch needs a torch.optim.Optimizer"
        )
    if _is_compiled(model):
        raise ValueError(
            "the model is compiled, and hooks added now would never run; watch the eager model"
        )
    if is_watched(model):
        raise ValueError("the model, or a part of it, is watched already; close that watch first")
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {p: name for name, p in model.named_parameters() if id(p) in in_optimizer}
    if not names:
        raise ValueError(
            "the optimizer trains no parameter of the model; make it from model.parameters() "
            "after the model has its final parameters"
        )
    devices = {str(parameter.device) for parameter in names}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"the parameters are on {', '.join(sorted(devices))}; one real device is supported"
        )
    return names


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def ranks() -> tuple[int, int]:
    """This process's global rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
