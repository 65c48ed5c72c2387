"""Casts to FP8 and back, through torch's own float8 types.

Chooses no scales: those come from `scaling.py`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from foreshock.monitor.formats import FORMATS
from foreshock.trainer.precision.fast_stack import stack_kernels_for

__all__ = ["GEMM_DTYPE", "quantize", "saturating_cast"]

_DTYPES: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

GEMM_DTYPE: Final = torch.bfloat16
"""Type of GEMM operands. Every E4M3 and E5M2 number is a bfloat16 number, so nothing is lost."""


def _decoding_table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(GEMM_DTYPE)


# On CPU a table look-up decodes E4M3 several times faster than torch's own conversion does.
_TABLES: Final = {name: _decoding_table(dtype) for name, dtype in _DTYPES.items()}


def saturating_cast(x: Tensor, scale: Tensor, fp8_format: str) -> Tensor:
    """Cast x times scale to FP8; what exceeds the largest value becomes it, NaN stays NaN.

    Args:
        x: Values, shape (*lead, ...).
        scale: float32, shape lead: one scale per leading index, () for one tensor.
        fp8_format: e4m3 or e5m2.

    Returns:
        float8 tensor of x's shape.
    """
    largest = FORMATS[fp8_format].largest
    scaled = x * scale.view(scale.shape + (1,) * (x.dim() - scale.dim()))
    return scaled.clamp_(-largest, largest).to(_DTYPES[fp8_format])


def quantize(x: Tensor, scale: Tensor, fp8_format: str) -> Tensor:
    """As `saturating_cast`, with the FP8 numbers (still times scale) in `GEMM_DTYPE`."""
    if kernels := stack_kernels_for(x, scale.dim()):
        fast: Tensor = kernels.cast_per_model(x, scale.contiguous(), fp8_format)
        return fast
    codes = saturating_cast(x, scale, fp8_format)
    if codes.is_cpu:
        index = codes.view(torch.uint8).reshape(-1).int()
        return _TABLES[fp8_format].index_select(0, index).view(codes.shape)
    return codes.to(GEMM_DTYPE)
