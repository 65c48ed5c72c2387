"""transformers' Conv1D, the linear layer of GPT-2: its weight lies the other way round."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foreshock.monitor.layers.adapter import HookContext
from foreshock.monitor.layers.plain import OperandOf, watch_gemm
from foreshock.monitor.operands import DTYPE_FORMATS

__all__ = ["Conv1DAdapter"]


class Conv1DAdapter:
    """Watches transformers' Conv1D."""

    def claims(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight of a floating type."""
        known = sys.modules.get("transformers.pytorch_utils")
        return (
            known is not None
            and isinstance(module, known.Conv1D)
            and isinstance(module.weight, torch.Tensor)
            and module.weight.dtype in DTYPE_FORMATS
        )

    def attach(
        self, name: str, module: nn.Module, context: HookContext
    ) -> Sequence[RemovableHandle]:
        """Hooks for input, weight and output gradient."""
        return watch_gemm(name, module, context, _Transposed())


class _Transposed(OperandOf):
    """A plain layer whose weight is inputs x outputs."""

    def weight(self, module: nn.Module) -> object:
        """Turned, so that its last axis are the inputs, as of every other weight."""
        return module.weight.t() if isinstance(module.weight, torch.Tensor) else None
