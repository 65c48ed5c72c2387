"""Refuse wrong use at attach, the only time when the monitor may raise."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

from foreshock.monitor.hooks import is_watched, plain_name

__all__ = ["forget_compiled", "ranks", "trained_parameters"]


def trained_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[nn.Parameter, str]:
    """The parameters of the model that the optimizer trains, with their names.

    Raises:
        TypeError: model or optimizer is something else.
        ValueError: The model is watched already, shares no parameter with the
            optimizer, or lies on several devices or on none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; watch needs a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; watch needs a torch.optim.Optimizer"
        )
    if is_watched(model):
        raise ValueError("the model, or a part of it, is watched already; close that watch first")
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {p: plain_name(name) for name, p in model.named_parameters() if id(p) in in_optimizer}
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


def forget_compiled(model: nn.Module) -> int:
    """Make graphs that exist take notice of new hooks: they are traced anew at the next step.

    A graph made before a hook was added would never call it, and say nothing. Code is shared by
    the instances of a class, so others of the same class are traced anew too.

    Returns:
        Of how many pieces of code graphs were dropped.
    """
    codes = {getattr(module.forward, "__code__", None) for module in model.modules()}
    compiled = [code for code in codes if code is not None and _debug_get_cache_entry_list(code)]
    for code in compiled:
        reset_code(code)
    return len(compiled)


def ranks() -> tuple[int, int]:
    """This process's global rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
