"""Tensors that no linear layer takes: a module hands one on unchanged, and it is measured there.

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
from foreshock.monitor.operands import DTYPE_FORMATS, CastTap, Operand, Tap
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
        # Asked once, as for GEMMs.
        cast = module if isinstance(module, CastTap) else None
        tapped = _Tapped(name, module.tapped_role, context, cast)
        return [module.register_forward_hook(context.layer_hook(tapped.ran, tapped.traced))]


class _Tapped:
    def __init__(self, name: str, role: str, context: HookContext, cast: CastTap | None) -> None:
        self._name, self._role, self._context = name, role, context
        self._cast = cast
        self._key = context.collector.key(name, role, 0)

    def ran(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """After an eager call."""
        if not self._context.counts(module):
            return
        self._context.begins()
        x = next(tensors_in(output), None)
        if x is not None and self._context.collector.wants:
            index = self._context.next_call(self._name)
            operand = self._operand(x)
            self._context.collector.observe(self._name, self._role, x, operand, call_index=index)

    def traced(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """While torch.compile traces."""
        x = next(tensors_in(output), None)
        if x is not None and module.training and torch.is_grad_enabled():
            operand, local = self._operand(x), local_of(x)
            code = operand_code(operand.format, operand.granularity)
            handle = self._context.collector.handle
            ops.observe(local, operand.scale, handle, self._key, code)

    def _operand(self, x: torch.Tensor) -> Operand:
        if self._cast is not None:
            return self._cast.tapped_operand()
        return Operand(DTYPE_FORMATS.get(x.dtype, "fp32"), None)
