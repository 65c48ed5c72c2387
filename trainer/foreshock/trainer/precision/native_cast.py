"""Casts to FP8 in both layouts that its products ask for, with the largest magnitude on the way.

Hopper multiplies FP8 matrices only where both lie along the axis that is contracted, so an operand
of two products is cast into rows and into columns at once. On CUDA one Triton kernel does it in one
pass; elsewhere torch's own operations, with the same codes bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from foreshock.monitor.formats import FORMATS
from foreshock.trainer.precision.cast import saturating_cast
from foreshock.trainer.precision.scaling import tensor_amax

__all__ = ["Codes", "cast_both", "scaled_product"]

_MULTIPLE: Final = 16
_DTYPES: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Codes:
    """An operand after its cast.

    Attributes:
        rows: float8 (R, C), contiguous.
        columns: float8 (C, R), contiguous: the transpose.
        inverse: 1 / scale, 0-dim float32.
    """

    rows: Tensor
    columns: Tensor
    inverse: Tensor


def cast_both(x: Tensor, scale: Tensor, fp8_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Saturating cast of x times scale.

    Args:
        x: (R, C), float32 or bfloat16.
        scale: 0-dim float32.
        fp8_format: e4m3 or e5m2.

    Returns:
        The codes (R, C) and (C, R), both contiguous, and max abs x, 0-dim float32 (NaN if there is
        one).
    """
    if x.is_cuda:
        from foreshock.trainer.precision.native_kernels import cast_both_on_device

        return cast_both_on_device(x, scale, _DTYPES[fp8_format], FORMATS[fp8_format].largest)
    rows = saturating_cast(x.float(), scale, fp8_format)
    return rows, _transposed(rows), tensor_amax(x, 0)


def scaled_product(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, *, out: torch.dtype, fast: bool
) -> Tensor:
    """Product of codes times both inverses, contracting the last axis of both.

    Args:
        a: float8 (M, K), contiguous.
        b: float8 (N, K), contiguous.
        inverse_a: float32, 0-dim or (M, 1).
        inverse_b: float32, 0-dim or (1, N).
        out: Type of the result, bfloat16 or float32; sums are float32.
        fast: Sum with the tensor cores' own few bits between promotions to float32, as Transformer
            Engine does in forward and not in backward.

    Returns:
        (M, N).
    """
    rows, columns = len(a), len(b)
    a, b = _padded(a, rows=1), _padded(b, rows=_MULTIPLE)
    if inverse_b.dim() and len(b) != columns:
        inverse_b = torch.nn.functional.pad(inverse_b, (0, len(b) - columns), value=1.0)
    y = torch._scaled_mm(
        a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=out, use_fast_accum=fast
    )
    return y if y.shape == (rows, columns) else y[:rows, :columns]


def _padded(codes: Tensor, *, rows: int) -> Tensor:
    """With zeros, so that columns are a multiple of 16 and rows one of `rows`."""
    short = -codes.shape[1] % _MULTIPLE, -codes.shape[0] % rows
    if short == (0, 0):
        return codes
    bits = torch.nn.functional.pad(codes.view(torch.uint8), (0, short[0], 0, short[1]))
    return bits.view(codes.dtype)


def _transposed(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8).t().contiguous().view(codes.dtype)
