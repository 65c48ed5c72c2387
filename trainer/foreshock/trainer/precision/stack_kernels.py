"""Triton kernels for a stack of models on a CUDA device: casts, extremes and sums, one model apart.

Tensors are (E, ...), each model's part in one piece; each model has its own scale. Casts and
extremes are bit for bit those of `cast.py` and `scaling.py`; sums agree with
`foreshock.monitor.statistics` to about 1e-6. Imported only where Triton is (`stack_kernels_for`).
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from foreshock.monitor.formats import FORMATS, Format

__all__ = ["SUMS", "amax_per_model", "cast_per_model", "rescaled_per_model", "sums_per_model"]

SUMS: Final = (
    "nonfinite",
    "nonzero",
    "sum2",
    "sum4",
    "amax",
    "kept",
    "normal",
    "overflow",
    "error2",
    "channels",
    "channels2",
)
"""Rows of `sums_per_model`: counts, powers, the cast, and sum and sum of squares over channels of
the channels' own sums of squares."""

_BLOCK: Final = 4096
_TILE: Final = 2048
_PARTIAL_FIELDS: Final = 9
_PROGRAMS: Final = 1024


def _anchor(number: Format) -> float:
    steps = number.smallest_normal / number.smallest_subnormal
    return float(1.5 * 2.0**23 / steps)


@triton.jit
def _rounded(magnitude, smallest_normal, anchor_factor):
    """To the format, ties to even: adding 1.5 x 2^k leaves a multiple of the spacing there."""
    exponent = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    anchor = tl.maximum(exponent.to(tl.float32, bitcast=True), smallest_normal) * anchor_factor
    return (magnitude + anchor) - anchor


@triton.jit
def _amax_kernel(x_ptr, out_ptr, per_model, stride, BLOCK: tl.constexpr):
    model = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + model * stride + place, mask=place < per_model, other=0.0)
    # Magnitudes order as their bits do, and NaN stands above infinity.
    bits = tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True)
    tl.atomic_max(out_ptr + model, tl.max(bits, 0))


@triton.jit
def _cast_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    per_model,
    stride,
    largest,
    smallest_normal,
    anchor_factor,
    BLOCK: tl.constexpr,
):
    model = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < per_model
    scale = tl.load(scale_ptr + model)
    x = tl.load(x_ptr + model * stride + place, mask=inside, other=0.0).to(tl.float32)
    scaled = x * scale
    magnitude = tl.minimum(tl.abs(scaled), largest)
    cast = _rounded(magnitude, smallest_normal, anchor_factor)
    cast = tl.where(scaled < 0, -cast, cast)
    cast = tl.where(scaled == scaled, cast, scaled)
    tl.store(out_ptr + model * per_model + place, cast.to(tl.bfloat16), mask=inside)


@triton.jit
def _rescale_kernel(x_ptr, factor_ptr, out_ptr, per_model, BLOCK: tl.constexpr):
    model = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < per_model
    x = tl.load(x_ptr + model * per_model + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + model * per_model + place, x * tl.load(factor_ptr + model), mask=inside)


@triton.jit
def _sums_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    channel_ptr,
    rows,
    columns,
    stride,
    splits,
    rows_each,
    largest,
    smallest_normal,
    flush,
    anchor_factor,
    SCALED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    model = (program // splits).to(tl.int64)
    first = (program % splits) * rows_each
    last = tl.minimum(first + rows_each, rows)
    column = tl.arange(0, TILE_COLUMNS)
    in_tile = tl.arange(0, TILE_ROWS)
    base = x_ptr + model * stride
    top = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    bad = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    for start in range(first, last, TILE_ROWS):
        row = start + in_tile
        inside = (row < last)[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        magnitude = tl.abs(tl.load(base + place, mask=inside, other=0.0).to(tl.float32))
        finite = magnitude <= 3.4028234663852886e38
        top = tl.maximum(top, tl.where(finite, magnitude, 0.0))
        bad += tl.where(finite, 0, 1)
    amax = tl.max(tl.max(top, 1), 0)
    # Powers are summed in units of a power of two, so that they neither overflow nor vanish.
    unit = amax.to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.minimum(tl.maximum(unit, 1 << 23), 253 << 23)
    inverse = (0x7F000000 - unit).to(tl.float32, bitcast=True)
    scale = 1.0
    limit = 0.0
    inverse_scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + model)
        above = tl.full((), 1.0000000298023224, tl.float64) * largest
        limit = (above / scale.to(tl.float64)).to(tl.float32)
        inverse_scale = (1.0 / scale.to(tl.float64)).to(tl.float32)
    twos = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    fours = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    errors = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    some = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    kept = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    normal = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    over = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int32)
    for start in range(first, last, TILE_ROWS):
        row = start + in_tile
        inside = (row < last)[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        magnitude = tl.abs(tl.load(base + place, mask=inside, other=0.0).to(tl.float32))
        magnitude = tl.where(magnitude <= 3.4028234663852886e38, magnitude, 0.0)
        part = magnitude * inverse
        square = part * part
        twos += square
        fours += square * square
        some += (magnitude > 0).to(tl.int32)
        if SCALED:
            over += (magnitude > limit).to(tl.int32)
            scaled = tl.minimum(magnitude * scale, largest)
            normal += (scaled >= smallest_normal).to(tl.int32)
            kept += (scaled > flush).to(tl.int32)
            cast = _rounded(scaled, smallest_normal, anchor_factor)
            # Where the factor would pass 2^40 every rounded value is zero.
            miss = cast * tl.minimum(inverse * inverse_scale, 1099511627776.0) - part
            errors += miss * miss
    exponent = ((unit >> 23) - 127).to(tl.int64)
    squared = ((1023 + 2 * exponent) << 52).to(tl.float64, bitcast=True)
    of_columns = tl.sum(twos, 0).to(tl.float64) * squared
    place = channel_ptr + program.to(tl.int64) * columns + column
    tl.store(place, of_columns, mask=column < columns)
    out = out_ptr + program
    tl.store(out, tl.sum(tl.sum(bad, 1), 0).to(tl.float64))
    tl.store(out + programs, tl.sum(tl.sum(some, 1), 0).to(tl.float64))
    tl.store(out + 2 * programs, tl.sum(of_columns, 0))
    fourths = tl.sum(tl.sum(fours, 0).to(tl.float64), 0)
    tl.store(out + 3 * programs, fourths * squared * squared)
    tl.store(out + 4 * programs, amax.to(tl.float64))
    if SCALED:
        tl.store(out + 5 * programs, tl.sum(tl.sum(kept, 1), 0).to(tl.float64))
        tl.store(out + 6 * programs, tl.sum(tl.sum(normal, 1), 0).to(tl.float64))
        tl.store(out + 7 * programs, tl.sum(tl.sum(over, 1), 0).to(tl.float64))
        tl.store(out + 8 * programs, tl.sum(tl.sum(errors, 0).to(tl.float64), 0) * squared)


@triton.jit
def _merge_kernel(
    part_ptr,
    channel_ptr,
    out_ptr,
    columns,
    splits,
    models,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """One program per model: its splits, in a fixed order, into one column of the result."""
    model = tl.program_id(0)
    lane = tl.arange(0, SPLITS)
    inside = lane < splits
    programs = models * splits
    for field in range(0, 9):
        value = tl.zeros((), tl.float64)
        if SCALED or field < 5:
            each = tl.load(
                part_ptr + field * programs + model * splits + lane, mask=inside, other=0.0
            )
            value = tl.max(each, 0) if field == 4 else tl.sum(each, 0)
        tl.store(out_ptr + field * models + model, value)
    column = tl.arange(0, TILE_COLUMNS)
    total = tl.zeros((TILE_COLUMNS,), tl.float64)
    for split in range(0, splits):
        place = (model * splits + split).to(tl.int64) * columns + column
        total += tl.load(channel_ptr + place, mask=column < columns, other=0.0)
    tl.store(out_ptr + 9 * models + model, tl.sum(total, 0))
    tl.store(out_ptr + 10 * models + model, tl.sum(total * total, 0))


def amax_per_model(x: Tensor) -> Tensor:
    """Largest magnitude of each model's part of x (E, ...), float32 (E,); NaN if there is one."""
    models = x.shape[0]
    each = x.numel() // models
    bits = torch.zeros(models, dtype=torch.int32, device=x.device)
    _amax_kernel[(triton.cdiv(each, _BLOCK), models)](x, bits, each, x.stride(0), BLOCK=_BLOCK)
    return bits.view(torch.float32)


def cast_per_model(x: Tensor, scale: Tensor, fp8_format: str) -> Tensor:
    """X times scale, saturated and rounded to FP8 numbers, in bfloat16; x (E, ...), scale (E,)."""
    number, models = FORMATS[fp8_format], x.shape[0]
    each = x.numel() // models
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    _cast_kernel[(triton.cdiv(each, _BLOCK), models)](
        x,
        scale,
        out,
        each,
        x.stride(0),
        float(number.largest),
        float(number.smallest_normal),
        _anchor(number),
        BLOCK=_BLOCK,
    )
    return out


def rescaled_per_model(x: Tensor, factor: Tensor) -> Tensor:
    """X (E, ...) in float32 times factor (E,)."""
    models = x.shape[0]
    each = x.numel() // models
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _rescale_kernel[(triton.cdiv(each, _BLOCK), models)](x, factor, out, each, BLOCK=_BLOCK)
    return out


def sums_per_model(x: Tensor, out: Tensor, *, format: str, scale: Tensor | None) -> None:
    """Sums over each model's elements and over their cast.

    Args:
        x: Shape (E, ..., features); what belongs to one model lies together.
        out: float64 (len(SUMS), E), overwritten; what depends on a cast is 0 without a scale.
        format: Of the cast.
        scale: float32 (E,), or None for an operand without a scale of its own.
    """
    models, columns = x.shape[0], x.shape[-1]
    rows = x.numel() // (models * columns)
    splits = max(1, min(rows, _PROGRAMS // models))
    rows_each = triton.cdiv(rows, splits)
    splits = triton.cdiv(rows, rows_each)
    tile_columns = triton.next_power_of_2(columns)
    number, scaled = FORMATS[format], scale is not None
    parts = torch.empty(_PARTIAL_FIELDS, models * splits, dtype=torch.float64, device=x.device)
    channels = torch.empty(models * splits, columns, dtype=torch.float64, device=x.device)
    _sums_kernel[(models * splits,)](
        x,
        x if scale is None else scale,
        parts,
        channels,
        rows,
        columns,
        x.stride(0),
        splits,
        rows_each,
        float(number.largest),
        float(number.smallest_normal),
        float(number.flush_threshold),
        _anchor(number) if scaled else 1.0,
        SCALED=scaled,
        TILE_ROWS=max(1, _TILE // tile_columns),
        TILE_COLUMNS=tile_columns,
    )
    _merge_kernel[(models,)](
        parts,
        channels,
        out,
        columns,
        splits,
        models,
        SCALED=scaled,
        SPLITS=triton.next_power_of_2(splits),
        TILE_COLUMNS=tile_columns,
    )
