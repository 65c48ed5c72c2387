"""Tensors that no GEMM takes: a module hands one on unchanged, and it is measured on its way.

Only forwards, and only what a module itself asks to have measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foreshock.monitor import ops
from foreshock.monitor.collector import operand_code
from foreshock.monitor.layers.adapter import HookContext, tensors_in
from foreshock.monitor.operands import DTYPE_FORMATS, Operand, Tap
from foreshock.monitor.placement import local_of

__all__ = ["TapAdapter"]


class TapAdapter:
    """Watches `Tap`s that are open."""

    def claims(self, module: nn.Module) -> bool:
        """Whether it is one and names the role of its tensor."""
        return isinstance(module, Tap) and module.tapped_role is not None

    def attach(
        self, name: str, module: nn.Module, context: HookContext
    ) -> Sequence[RemovableHandle]:
        """A hook on its output."""
        assert isinstance(module, Tap)
        assert module.tapped_role is not None
        tapped = _Tapped(name, module.tapped_role, context)
        return [module.register_forward_hook(context.layer_hook(tapped.ran, tapped.traced))]


class _Tapped:
    def __init__(self, name: str, role: str, context: HookContext) -> None:
        self._name, self._role, self._context = name, role, context
        self._key = context.collector.key(name, role, 0)

    def ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """After an eager call."""
        if not self._context.counts(module):
            return
        self._context.begins()
        x = next(tensors_in(output), None)
        if x is not None and self._context.collector.wants:
            index = self._context.next_call(self._name)
            self._context.collector.observe(self._name, self._role, x, _uncast(x), call_index=index)

    def traced(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """While torch.compile traces."""
        x = next(tensors_in(output), None)
        if x is not None and module.training and torch.is_grad_enabled():
            operand, local = _uncast(x), local_of(x)
            code = operand_code(operand.format, operand.granularity)
            handle = self._context.collector.handle
            ops.observe(local, None, handle, self._key, code)


def _uncast(x: torch.Tensor) -> Operand:
    return Operand(DTYPE_FORMATS.get(x.dtype, "fp32"), None)
