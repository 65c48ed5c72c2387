"""The exact path: what Transformer Engine's debug mode shows of its layers, measured as ours.

Our debug feature (`te_features`) is loaded by nvdlfw_inspect from a folder and made by it, so the
two find each other through this table of watched layers. Debug mode itself is one per process.
Imports neither library.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from foreshock.monitor.layers.adapter import Hook, HookContext
from foreshock.monitor.layers.te_operands import Cast, plain
from foreshock.monitor.operands import DTYPE_FORMATS, Operand

__all__ = ["enabled", "inspect", "register", "step", "took_over"]

_ROLES: Final = {"activation": "input", "weight": "weight", "gradient": "grad_output"}


@dataclass(slots=True)
class _Watched:
    """A layer that a watch hangs on.

    Attributes:
        name: In records.
        context: Of the watch.
        measure: `_measure`, guarded.
        runs: Whether the exact path runs in the debug iteration in progress.
        counts: Whether the forward pass in progress is training, and no recomputation.
    """

    name: str
    context: HookContext
    measure: Hook
    runs: bool = False
    counts: bool = False


_LAYERS: Final[WeakKeyDictionary[nn.Module, _Watched]] = WeakKeyDictionary()
# Transformer Engine's names of GEMMs: looked for once, used at every tensor.
_FOUND: Final[dict[str, ref[nn.Module]]] = {}


def register(module: nn.Module, name: str, context: HookContext) -> None:
    """A watch hangs on a layer; a later one takes its place."""
    _LAYERS[module] = _Watched(name, context, context.hook(_measure))
    _FOUND.clear()


def took_over(module: nn.Module) -> bool:
    """Whether the exact path has measured the layer's call that has just ended."""
    watched = _LAYERS.get(module)
    debugged = getattr(module, "debug_enabled_in_this_iteration", False)
    return bool(watched is not None and watched.runs and debugged)


def step() -> None:
    """Tell debug mode, if it is on, that a training step has ended."""
    api = sys.modules.get("nvdlfw_inspect.api")
    if api is not None and api.DEBUG_MANAGER is not None:
        api.step()


def enabled(layer: str, tensor: str, iteration: int, every: int) -> tuple[bool, int | None]:
    """Whether a tensor is wanted now, and the iteration at which to ask again.

    Args:
        layer: Transformer Engine's name of the GEMM.
        tensor: Its name of the tensor.
        iteration: Steps so far.
        every: Iterations from one exact step to the next.
    """
    if tensor not in _ROLES:
        return False, None
    found = _find(layer)
    if found is None:
        # The watch may come later.
        return False, iteration + 1
    module, watched, _ = found
    # Asked here, because inside the layer's autograd function gradients are switched off. What
    # runs inside a backward pass repeats a forward pass.
    forward = torch._C._current_graph_task_id() == -1
    watched.counts = module.training and torch.is_grad_enabled() and forward
    # A recomputation must take the way of the pass that it repeats.
    watched.runs = iteration % every == 0 and watched.context.collector.measuring
    return watched.runs, iteration - iteration % every + every


def inspect(layer: str, tensor: str, x: torch.Tensor, quantizer: Any) -> None:
    """Measure an operand as the layer used it, after its cast."""
    found = _find(layer)
    if found is None:
        return
    module, watched, name = found
    if module.training if tensor == "gradient" else watched.counts:
        watched.measure(watched, module, name, tensor, x, quantizer)


def _measure(
    watched: _Watched, module: nn.Module, name: str, tensor: str, x: torch.Tensor, quantizer: Any
) -> None:
    role, collector, values = _ROLES[tensor], watched.context.collector, plain(x)
    if values is None or (role == "weight" and not collector.weighs(name)):
        return
    if quantizer is None:
        operand = Operand(DTYPE_FORMATS.get(values.dtype, "fp32"), None)
    else:
        operand = Cast.of(module, quantizer).after
    collector.observe(name, role, values, operand, source="exact")


def _find(layer: str) -> tuple[nn.Module, _Watched, str] | None:
    """The watched layer that Transformer Engine calls so, and the GEMM's name in records."""
    known = _FOUND.get(layer)
    module = None if known is None else known()
    if module is None:
        module = next((module for module in _LAYERS if _rest(module, layer) is not None), None)
    watched = None if module is None else _LAYERS.get(module)
    rest = None if module is None else _rest(module, layer)
    if module is None or watched is None or rest is None:
        return None
    _FOUND[layer] = ref(module)
    return module, watched, watched.name + rest


def _rest(module: nn.Module, layer: str) -> str | None:
    """What a GEMM is called behind its layer's name, or None if it is not the layer's."""
    own = getattr(module, "name", None)
    if not isinstance(own, str) or not layer.startswith(own):
        return None
    rest = layer[len(own) :]
    return rest if rest in ("", ".fc1", ".fc2") or rest.startswith(".gemm_") else None
