"""Triton kernels of the native backend: the cast in both layouts, and the amax history's step.

Imported where there is a CUDA device, or Triton's interpreter in tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["advance_on_device", "cast_both_on_device"]

_ROWS, _COLUMNS = 64, 128


def cast_both_on_device(
    x: Tensor, scale: Tensor, dtype: torch.dtype, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `native_cast.cast_both`, one pass through memory where x is bfloat16.

    For float32, which weights are once a step, the kernel's columns were wrong with Triton 3.6
    where the height divides by 16 (tests/gpu/test_precision.py has the case): torch turns those.
    """
    x = x.contiguous()
    height, width = x.shape
    rows = torch.empty((height, width), dtype=dtype, device=x.device)
    turn = x.dtype == torch.bfloat16
    shape = (width, height) if turn else (1, 1)
    columns = torch.empty(shape, dtype=dtype, device=x.device)
    # Magnitudes are compared as the integers that their bits are: their order is the same, and NaN
    # is the largest.
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(width, _COLUMNS), triton.cdiv(height, _ROWS))
    _cast_kernel[grid](
        x,
        rows,
        columns,
        scale,
        amax,
        height,
        width,
        largest,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        TURN=turn,
    )
    if not turn:
        columns = rows.view(torch.uint8).t().contiguous().view(dtype)
    return rows, columns, amax.view(torch.float32)


@triton.jit
def _cast_kernel(
    x_ptr,
    rows_ptr,
    columns_ptr,
    scale_ptr,
    amax_ptr,
    height,
    width,
    largest,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURN: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row[:, None] < height) & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(amax_ptr, tl.max(tl.max(bits, 1), 0))
    scaled = x * tl.load(scale_ptr)
    # Comparisons with NaN are false, so that NaN stays.
    scaled = tl.where(scaled > largest, largest, scaled)
    scaled = tl.where(scaled < -largest, -largest, scaled)
    codes = scaled.to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + at, codes, inside)
    if TURN:
        turned = column[:, None] * height + row[None, :]
        tl.store(columns_ptr + turned, tl.trans(codes), tl.trans(inside))


def advance_on_device(
    history: Tensor, valid: Tensor, amax: Tensor, gain: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of delayed scaling in one kernel: the history with amax in front, the next scale.

    Args:
        history: float32 (H,), newest first.
        valid: bool (H,).
        amax: 0-dim float32.
        gain: 0-dim float32, what is divided by the history's maximum.
        scale: 0-dim float32, kept where that maximum is zero or not finite.
    """
    following, shifted = torch.empty_like(scale), torch.empty_like(history)
    length = history.shape[-1]
    _advance_kernel[(1,)](
        history,
        valid,
        amax,
        gain,
        scale,
        shifted,
        following,
        length,
        torch.finfo(torch.float32).max,
        BLOCK=triton.next_power_of_2(length),
    )
    return shifted, following


@triton.jit
def _advance_kernel(
    history_ptr,
    valid_ptr,
    amax_ptr,
    gain_ptr,
    scale_ptr,
    shifted_ptr,
    following_ptr,
    length,
    most,
    BLOCK: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    inside = at < length
    older = tl.load(history_ptr + at - 1, inside & (at > 0), other=0.0)
    value = tl.where(at == 0, tl.load(amax_ptr), older)
    counts = tl.load(valid_ptr + at, inside, other=0).to(tl.int1)
    value = tl.where(counts, value, 0.0)
    tl.store(shifted_ptr + at, value, inside)
    # As bits, so that NaN and infinity are the largest.
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    usable = (largest > 0) & (largest < 0x7F800000)
    quotient = tl.div_rn(tl.load(gain_ptr), tl.maximum(largest, 1).to(tl.float32, bitcast=True))
    quotient = tl.minimum(quotient, most)
    tl.store(following_ptr, tl.where(usable, quotient, tl.load(scale_ptr)))
