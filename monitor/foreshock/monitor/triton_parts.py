"""Parts of the Triton kernels: two 16-bit numbers to an instruction, and rounding to a format.

What is written in PTX stands beside the same thing in Triton's own language: that is what devices
older than sm_90 run, and Triton's interpreter, through which the tests run without a device.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "exact_total",
    "fold",
    "fold_least",
    "merged",
    "ordinary_sums",
    "rounded",
    "total",
    "zeros_to_add",
]


@triton.jit
def zeros_to_add(
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FOLD: tl.constexpr, kind: tl.constexpr
):
    """Zeros to add up in: one per column where a thread holds whole columns, else per element."""
    if FOLD:
        return tl.zeros((TILE_COLUMNS,), kind)
    else:
        return tl.zeros((TILE_ROWS, TILE_COLUMNS), kind)


@triton.jit
def fold(values, FOLD: tl.constexpr):
    """Over the rows that lie in the same thread."""
    if FOLD:
        return tl.sum(values, 0)
    else:
        return values


@triton.jit
def fold_least(values, FOLD: tl.constexpr):
    if FOLD:
        return tl.min(values, 0)
    else:
        return values


@triton.jit
def total(counts, FOLD: tl.constexpr):
    if FOLD:
        return tl.sum(counts, 0)
    else:
        return tl.sum(tl.sum(counts, 1), 0)


@triton.jit
def exact_total(sums, FOLD: tl.constexpr):
    if FOLD:
        return tl.sum(sums.to(tl.float64), 0)
    else:
        return tl.sum(tl.sum(sums.to(tl.float64), 1), 0)


@triton.jit
def pair_abs(bits, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x7FFF7FFF;", "=r,r", [bits], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        return bits & 0x7FFF


@triton.jit
def pair_max(so_far, bits, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "max.u16x2 $0, $1, $2;", "=r,r,r", [so_far, bits], dtype=tl.int16, is_pure=True, pack=2
        )
    else:
        return tl.maximum(so_far, bits)


@triton.jit
def pair_least(so_far, bits, PTX: tl.constexpr):
    """The least of bits - 0x8001 as 16 bits wrap: zero goes to the top, the others keep order."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 k; mov.b32 k, 0x7FFF7FFF; add.u16x2 k, $2, k; min.s16x2 $0, $1, k; }",
            "=r,r,r",
            [so_far, bits],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        wrapped = tl.where(bits == 0, 0x7FFF, bits.to(tl.int32) - 0x8001)
        return tl.minimum(so_far, wrapped.to(tl.int16))


@triton.jit
def count_at_least(so_far, bits, below, PTX: tl.constexpr):
    """Count magnitudes whose 15 bits are at least 1 - below; counts stay within 16 bits."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 k, one; mov.b32 one, 0x00010001; add.s16x2 k, $2, $3;"
            " min.relu.s16x2 k, k, one; add.u32 $0, $1, k; }",
            "=r,r,r,r",
            [so_far, bits, below],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        return so_far + (bits.to(tl.int32) + below.to(tl.int32) > 0).to(tl.int16)


@triton.jit
def half_bits(bits, kind: tl.constexpr):
    """The float32 bits of a magnitude given by its 16 bits."""
    value = bits.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def first_at_least(scale, border, STRICT: tl.constexpr, kind: tl.constexpr):
    """1 - the smallest 15 bits whose magnitude times scale reaches (STRICT: passes) a border.

    The product is the one that the cast works with, rounded to float32, and grows with the
    magnitude. So the place is near border / scale, and which it is shows by trying the neighbours.
    """
    near = (border / scale).to(kind).to(tl.int16, bitcast=True).to(tl.int32)
    infinity = tl.full((), float("inf"), kind).to(tl.int16, bitcast=True).to(tl.int32)
    candidate = near - 3 + tl.arange(0, 8)
    bounded = tl.minimum(tl.maximum(candidate, 0), infinity)
    value = bounded.to(tl.int16).to(kind, bitcast=True).to(tl.float32) * scale
    reaches = value > border if STRICT else value >= border
    reaches = ((candidate > 0) & reaches) | (candidate > infinity)
    short = tl.sum((reaches == 0).to(tl.int32), 0)
    return (1 - tl.maximum(near - 3 + short, 1)).to(tl.int16)


@triton.jit
def rounded(scaled, smallest_normal, anchor_factor):
    """Magnitudes up to the largest, rounded to the format, ties to even.

    Adding and taking away 1.5 x 2^k leaves a multiple of the format's spacing at each magnitude.
    """
    anchor = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.maximum(anchor, smallest_normal) * anchor_factor
    return (scaled + anchor) - anchor


@triton.jit
def miss_of_cast(scaled, splitter, least_anchor):
    """How far magnitudes within the format's range are from what they are rounded to, signed.

    Veltkamp's splitting: c x (2^k + 1) taken from and given back to c leaves c rounded to 24 - k
    bits. Which way a tie goes is not said, and makes no difference to the distance. Below
    1.5 x the smallest normal number the spacing no longer shrinks: a fixed anchor takes over.
    """
    anchor = tl.maximum(scaled * splitter, least_anchor)
    return (anchor - (anchor - scaled)) - scaled


@triton.jit
def ordinary_sums(
    x_ptr,
    column,
    columns,
    first_tile,
    tiles,
    rows,
    row_stride,
    scale,
    scale64,
    limit,
    largest,
    smallest_normal,
    flush,
    anchor_factor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    ERROR: tl.constexpr,
    CODES: tl.constexpr,
    PTX: tl.constexpr,
):
    """A program's sums as if all magnitudes were ordinary, and whether they were.

    Codes are taken as the 16-bit numbers that they stand for before the scale.
    """
    kind: tl.constexpr = tl.float16 if CODES else x_ptr.dtype.element_ty
    PART: tl.constexpr = TILE_ROWS // UNROLL
    in_part = tl.arange(0, PART)
    two = tl.zeros((PART, TILE_COLUMNS), tl.float32)
    four = tl.zeros((PART, TILE_COLUMNS), tl.float32)
    error = tl.zeros((PART, TILE_COLUMNS), tl.float32)
    tops = tl.zeros((PART, TILE_COLUMNS), tl.int16)
    lows = tl.full((PART, TILE_COLUMNS), 0x7FFF, tl.int16)
    some = tl.zeros((PART, TILE_COLUMNS), tl.int16)
    normals = tl.zeros((PART, TILE_COLUMNS), tl.int16)
    # Of values: those that the cast does not flush. Of codes: those at the largest magnitude.
    kept = tl.zeros((PART, TILE_COLUMNS), tl.int16)
    above_zero = tl.full((), 0, tl.int16)
    above_normal = above_zero
    above_kept = above_zero
    if CODES:
        one = tl.full((), 1.0, tl.float32)
        above_normal = first_at_least(one, smallest_normal, False, kind)
        above_kept = first_at_least(one, largest, False, kind)
    elif SCALED:
        above_normal = first_at_least(scale, smallest_normal, False, kind)
        above_kept = first_at_least(scale, flush, True, kind)
    splitter = anchor_factor * 0.6666666666666666 + 1.0
    least_anchor = anchor_factor * smallest_normal
    for tile in range(0, tiles):
        for part in tl.static_range(UNROLL):
            row = (first_tile + tile) * TILE_ROWS + part * PART + in_part
            place = row.to(tl.int64)[:, None] * row_stride + column[None, :]
            if WHOLE_COLUMNS:
                inside = tl.broadcast_to((row < rows)[:, None], (PART, TILE_COLUMNS))
            else:
                inside = (row < rows)[:, None] & (column < columns)[None, :]
            loaded = tl.load(x_ptr + place, mask=inside, other=0.0).to(kind)
            positive = pair_abs(loaded.to(tl.int16, bitcast=True), PTX)
            tops = pair_max(tops, positive, PTX)
            lows = pair_least(lows, positive, PTX)
            some = count_at_least(some, positive, above_zero, PTX)
            magnitude = positive.to(kind, bitcast=True).to(tl.float32)
            square = magnitude * magnitude
            two += square
            four += square * square
            if SCALED:
                normals = count_at_least(normals, positive, above_normal, PTX)
                kept = count_at_least(kept, positive, above_kept, PTX)
            if ERROR:
                miss = miss_of_cast(magnitude * scale, splitter, least_anchor)
                error += miss * miss
    two_all, four_all, error_all, some_all, kept_all, normal_all, top_half, low_half = _totals(
        two, four, error, some, kept, normals, tops, lows, SCALED, ERROR, PTX
    )
    low_bits = half_bits((low_half + 0x8001) & 0x7FFF, kind)
    most = half_bits(top_half, kind)
    top_value = most.to(tl.float32, bitcast=True)
    ordinary = (top_half == 0) | ((top_value >= 2.9802322387695312e-08) & (top_value <= 16777216.0))
    unit = tl.full((), 1.0, tl.float64)
    if CODES:
        # From here on in units of the scale, which is the inverse.
        unit = 1.0 / scale64
        most = (top_value * scale).to(tl.int32, bitcast=True)
        low_bits = (low_bits.to(tl.float32, bitcast=True) * scale).to(tl.int32, bitcast=True)
        ordinary = ordinary & (most < 0x7F800000)
    elif SCALED:
        ordinary = ordinary & (top_value <= limit)
        # Distances are summed after scaling: their squares must not vanish.
        ordinary = ordinary & ((top_half == 0) | (top_value * scale >= 2.9802322387695312e-08))
    least = tl.where(low_half == 0x7FFF, 0x7FFFFFFF, low_bits + 0x7FFFFFFF)
    squared = unit * unit
    over = tl.zeros((), tl.int32)
    if CODES:
        over = kept_all
    return (
        two_all * squared,
        four_all * squared * squared,
        error_all / (scale64 * scale64),
        tl.sum(two, 0).to(tl.float64) * squared,
        some_all,
        kept_all,
        normal_all,
        over,
        least,
        most,
        ordinary,
    )


@triton.jit
def _totals(
    two,
    four,
    error,
    some,
    kept,
    normals,
    tops,
    lows,
    SCALED: tl.constexpr,
    ERROR: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Over a program's tile: sums, counts, the largest and the least, in one reduction.

    Apart, each would have its own round through the shuffles of a warp and the barriers between
    warps, which is most of what a program's end takes. The interpreter calls a combining function
    once per element, so it takes them apart.
    """
    some32 = some.to(tl.int32) & 0xFFFF
    kept32 = kept.to(tl.int32) & 0xFFFF
    normal32 = normals.to(tl.int32) & 0xFFFF
    top32 = tops.to(tl.int32)
    low32 = lows.to(tl.int32)
    nothing = tl.zeros((), tl.float64)
    none = tl.zeros((), tl.int32)
    if TOGETHER:
        twos = two.to(tl.float64)
        fours = four.to(tl.float64)
        if ERROR:
            columns = tl.reduce(
                (twos, fours, error.to(tl.float64), some32, kept32, normal32, top32, low32),
                1,
                _with_error,
            )
            return tl.reduce(columns, 0, _with_error)
        elif SCALED:
            columns = tl.reduce(
                (twos, fours, some32, kept32, normal32, top32, low32), 1, _with_cast
            )
            a, b, c, d, e, f, g = tl.reduce(columns, 0, _with_cast)
            return a, b, nothing, c, d, e, f, g
        else:
            columns = tl.reduce((twos, fours, some32, top32, low32), 1, _core)
            a, b, c, d, e = tl.reduce(columns, 0, _core)
            return a, b, nothing, c, none, none, d, e
    else:
        return (
            exact_total(two, False),
            exact_total(four, False),
            exact_total(error, False),
            total(some32, False),
            total(kept32, False),
            total(normal32, False),
            tl.max(tl.max(top32, 1), 0),
            tl.min(tl.min(low32, 1), 0),
        )


@triton.jit
def _core(two, four, some, top, low, two2, four2, some2, top2, low2):
    return two + two2, four + four2, some + some2, tl.maximum(top, top2), tl.minimum(low, low2)


@triton.jit
def _with_cast(
    two, four, some, kept, normal, top, low, two2, four2, some2, kept2, normal2, top2, low2
):
    return (
        two + two2,
        four + four2,
        some + some2,
        kept + kept2,
        normal + normal2,
        tl.maximum(top, top2),
        tl.minimum(low, low2),
    )


@triton.jit
def _with_error(
    two, four, error, some, kept, normal, top, low,
    two2, four2, error2, some2, kept2, normal2, top2, low2,
):  # fmt: skip
    return (
        two + two2,
        four + four2,
        error + error2,
        some + some2,
        kept + kept2,
        normal + normal2,
        tl.maximum(top, top2),
        tl.minimum(low, low2),
    )


@triton.jit
def merged(of_core, of_cast, SCALED: tl.constexpr, TOGETHER: tl.constexpr):
    """Sums of programs' sums: six to add or, the last two, to take the largest of; four to add."""
    n, broken, nonzero, two, four, top, low = of_core
    kept, normal, over, error = of_cast
    if TOGETHER:
        if SCALED:
            return tl.reduce(
                (n, broken, nonzero, two, four, kept, normal, over, error, top, low),
                0,
                _programs_with_cast,
            )
        else:
            a, b, c, d, e, f, g = tl.reduce((n, broken, nonzero, two, four, top, low), 0, _programs)
            zero = tl.zeros((), tl.float64)
            return a, b, c, d, e, zero, zero, zero, zero, f, g
    else:
        return (
            tl.sum(n, 0),
            tl.sum(broken, 0),
            tl.sum(nonzero, 0),
            tl.sum(two, 0),
            tl.sum(four, 0),
            tl.sum(kept, 0),
            tl.sum(normal, 0),
            tl.sum(over, 0),
            tl.sum(error, 0),
            tl.max(top, 0),
            tl.max(low, 0),
        )


@triton.jit
def _programs(
    n, broken, nonzero, two, four, top, low, n2, broken2, nonzero2, two2, four2, top2, low2
):
    return (
        n + n2,
        broken + broken2,
        nonzero + nonzero2,
        two + two2,
        four + four2,
        tl.maximum(top, top2),
        tl.maximum(low, low2),
    )


@triton.jit
def _programs_with_cast(
    n, broken, nonzero, two, four, kept, normal, over, error, top, low,
    n2, broken2, nonzero2, two2, four2, kept2, normal2, over2, error2, top2, low2,
):  # fmt: skip
    return (
        n + n2,
        broken + broken2,
        nonzero + nonzero2,
        two + two2,
        four + four2,
        kept + kept2,
        normal + normal2,
        over + over2,
        error + error2,
        tl.maximum(top, top2),
        tl.maximum(low, low2),
    )
