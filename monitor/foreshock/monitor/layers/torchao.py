"""torchao's Float8Linear: how its config casts each operand.

It casts inside an autograd function and keeps neither a largest magnitude nor a scale, so both are
computed again from the operand: current scaling, whose scale torchao bounds by treating magnitudes
below 1e-12 as 1e-12. With `round_scales_to_power_of_2` the scale of a whole tensor is torchao's
own; of one scale per row the rounding is not seen, so its headroom reads up to twice too small.
Weights are reported as the forward GEMM casts them, gradients as the GEMM for the input's gradient.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foreshock.monitor.layers.adapter import HookContext
from foreshock.monitor.layers.plain import OperandOf, watch_gemm
from foreshock.monitor.operands import OPERAND_ROLES, Operand

__all__ = ["TorchaoAdapter"]

_LOGGER = logging.getLogger("foreshock.monitor")
_FORMATS: Final = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


class TorchaoAdapter:
    """Watches Float8Linear."""

    def claims(self, module: nn.Module) -> bool:
        """Whether it is one."""
        # Loaded if there is one; importing it here would load torchao's training for nothing.
        known = sys.modules.get("torchao.float8.float8_linear")
        return known is not None and isinstance(module, known.Float8Linear)

    def attach(
        self, name: str, module: nn.Module, context: HookContext
    ) -> Sequence[RemovableHandle]:
        """Hooks for input, weight and output gradient."""
        casts = {role: getattr(module.config, f"cast_config_{role}") for role in OPERAND_ROLES}
        unknown = {str(c.target_dtype) for c in casts.values() if c.target_dtype not in _FORMATS}
        if unknown:
            _LOGGER.warning("%s casts to %s and is not watched", name, ", ".join(sorted(unknown)))
            return ()
        return watch_gemm(name, module, context, _Casts(module.config, casts))


class _Casts(OperandOf):
    """The operands of one layer."""

    def __init__(self, config: Any, casts: dict[str, Any]) -> None:
        self._dtypes = {role: cast.target_dtype for role, cast in casts.items()}
        self._operands = {role: _operand(cast) for role, cast in casts.items()}
        self._rounds = bool(config.round_scales_to_power_of_2)

    def __call__(self, role: str, compute: torch.dtype) -> Operand:
        return self._operands[role] or super().__call__(role, compute)

    def of(self, role: str, x: torch.Tensor, compute: torch.dtype) -> Operand:
        operand = self(role, compute)
        if not self._rounds or self._operands[role] is None or operand.granularity != "tensor":
            return operand
        from torchao.float8.float8_utils import tensor_to_scale

        scale = tensor_to_scale(x.detach(), self._dtypes[role], round_scales_to_power_of_2=True)
        return replace(operand, scale=scale)


def _operand(cast: Any) -> Operand | None:
    """What a cast config says; None if the operand stays in high precision."""
    if cast.scaling_type.name == "DISABLED":
        return None
    by_row = cast.scaling_granularity.name == "AXISWISE"
    return Operand(_FORMATS[cast.target_dtype], None, "row" if by_row else "tensor")
