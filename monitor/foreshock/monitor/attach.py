"""Refuse wrong use at attach, the only time when the monitor may raise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.external_utils import wrap_inline
from torch.nn.parameter import is_lazy

from foreshock.monitor.hooks import is_watched, plain_name
from foreshock.monitor.operands import DTYPE_FORMATS

__all__ = ["Trained", "all_of", "forget_compiled", "ranks", "trained_parameters"]

_NUMBERS: Final = (*DTYPE_FORMATS, torch.float64)


def all_of(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer or several, as several.

    Raises:
        TypeError: It is something else.
        ValueError: There is none, or one stands there twice.
    """
    optimizers = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
    for each in optimizers:
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(each).__name__}; watch needs a torch.optim.Optimizer, "
                "or a list of them"
            )
    if not optimizers or len({id(each) for each in optimizers}) < len(optimizers):
        raise ValueError("the list of optimizers is empty, or holds one of them twice")
    return optimizers


def trained_parameters(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[nn.Parameter, str]:
    """The parameters of the model that the optimizers train, with their names.

    Raises:
        TypeError: model is something else.
        ValueError: The model is watched already, shares no parameter with the
            optimizer, has one that is still to be initialized, or lies on several devices or on
            none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; watch needs a torch.nn.Module")
    if is_watched(model):
        raise ValueError("the model, or a part of it, is watched already; close that watch first")
    names = _measurable(model, optimizers)
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


def _measurable(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[nn.Parameter, str]:
    """Those of the model's parameters in the optimizers that have norms, with their names.

    Frozen ones may be codes (8-bit integers, FP8), which are no numbers without their scale.

    Raises:
        ValueError: A parameter is still to be initialized.
    """
    in_optimizer = {id(parameter) for parameter in _in(optimizers)}
    names = {}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is still to be initialized; run one batch through the model first"
            )
        if id(parameter) in in_optimizer and (
            parameter.dtype in _NUMBERS or parameter.is_complex()
        ):
            names[parameter] = plain_name(name)
    return names


def _in(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return (parameter for group in groups for parameter in group["params"])


class Trained:
    """What the optimizers train, as training goes on."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        self._state = self._look()

    def changed(self) -> dict[nn.Parameter, str] | None:
        """The parameters with their names if any was added, frozen or unfrozen, else None."""
        state = self._look()
        if state == self._state:
            return None
        self._state = state
        return _measurable(self._model, self._optimizers)

    def _look(self) -> list[tuple[int, bool]]:
        return [(id(parameter), parameter.requires_grad) for parameter in _in(self._optimizers)]


def forget_compiled(model: nn.Module) -> int:
    """Make graphs that exist take notice of new hooks: they are traced anew at the next step.

    A graph made before a hook was added would never call it, and say nothing. Code is shared by
    the instances of a class, so others of the same class are traced anew too.

    Returns:
        Of how many pieces of code graphs were dropped.
    """
    codes = {getattr(module.forward, "__code__", None) for module in model.modules()}
    # torch puts a frame of its own, the same for all, around modules of torch.nn.
    codes.add(wrap_inline(model.forward).__code__)
    compiled = [code for code in codes if code is not None and _debug_get_cache_entry_list(code)]
    for code in compiled:
        reset_code(code)
    return len(compiled)


def ranks() -> tuple[int, int]:
    """This process's global rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
