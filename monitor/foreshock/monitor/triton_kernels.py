"""The Triton kernels behind `kernels`: what each program adds up, and who merges it into the row.

Runs on the device only; knows no tensors' shapes but as numbers. Magnitudes in 16 bits are first
read as if all were ordinary, two to an instruction where that goes; a program that meets others
(non-finite, or so far from 1 that 4th powers would leave float32) reads its part again, with care.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["accumulate_kernel", "channels_kernel"]


@triton.jit
def _start(
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FOLD: tl.constexpr, kind: tl.constexpr
):
    """Zeros to add up in: one per column where a thread holds whole columns, else per element."""
    if FOLD:
        return tl.zeros((TILE_COLUMNS,), kind)
    else:
        return tl.zeros((TILE_ROWS, TILE_COLUMNS), kind)


@triton.jit
def _fold(values, FOLD: tl.constexpr):
    """Over the rows that lie in the same thread."""
    if FOLD:
        return tl.sum(values, 0)
    else:
        return values


@triton.jit
def _fold_least(values, FOLD: tl.constexpr):
    if FOLD:
        return tl.min(values, 0)
    else:
        return values


@triton.jit
def _total(counts, FOLD: tl.constexpr):
    if FOLD:
        return tl.sum(counts, 0)
    else:
        return tl.sum(tl.sum(counts, 1), 0)


@triton.jit
def _exact_total(sums, FOLD: tl.constexpr):
    if FOLD:
        return tl.sum(sums.to(tl.float64), 0)
    else:
        return tl.sum(tl.sum(sums, 1).to(tl.float64), 0)


@triton.jit
def _pair_abs(bits):
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, 0x7FFF7FFF;", "=r,r", [bits], dtype=tl.int16, is_pure=True, pack=2
    )


@triton.jit
def _pair_max(so_far, bits):
    return tl.inline_asm_elementwise(
        "max.u16x2 $0, $1, $2;", "=r,r,r", [so_far, bits], dtype=tl.int16, is_pure=True, pack=2
    )


@triton.jit
def _pair_least(so_far, bits):
    """As `least`: adding the largest integer sends zero to the top and keeps the others' order."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 k; mov.b32 k, 0x7FFF7FFF; add.u16x2 k, $2, k; min.s16x2 $0, $1, k; }",
        "=r,r,r",
        [so_far, bits],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _pair_count(so_far, bits):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 k; mov.b32 k, 0x00010001; min.u16x2 k, $2, k; add.u16x2 $0, $1, k; }",
        "=r,r,r",
        [so_far, bits],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _half_bits(bits, kind: tl.constexpr):
    """The float32 bits of a magnitude given by its 16 bits."""
    value = bits.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _first_only(value, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FOLD: tl.constexpr):
    """A number in the first place, zero elsewhere."""
    first = tl.arange(0, TILE_COLUMNS) == 0
    if FOLD:
        return tl.where(first, value, 0)
    else:
        return tl.where(first[None, :] & (tl.arange(0, TILE_ROWS) == 0)[:, None], value, 0)


@triton.jit
def _rounded(scaled, smallest_normal, anchor_factor):
    """Magnitudes up to the largest, rounded to the format, ties to even.

    Adding and taking away 1.5 x 2^k leaves a multiple of the format's spacing at each magnitude.
    """
    anchor = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.maximum(anchor, smallest_normal) * anchor_factor
    return (scaled + anchor) - anchor


@triton.jit
def accumulate_kernel(
    x_ptr,
    row_ptr,
    scale_ptr,
    control_ptr,
    partials_ptr,
    counter_ptr,
    channels_ptr,
    histogram_ptr,
    sequences,
    rows,
    columns,
    row_stride,
    sequence_stride,
    splits,
    tiles,
    largest,
    smallest_normal,
    flush,
    anchor_factor,
    COLUMN_BLOCKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    ERROR: tl.constexpr,
    FROM_AMAX: tl.constexpr,
    CODES: tl.constexpr,
    FRESH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    FOLD: tl.constexpr,
    HALF: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    if tl.load(control_ptr) == 0:
        return
    program = tl.program_id(0)
    split = program % splits
    group = program // splits
    block = group % COLUMN_BLOCKS
    sequence = group // COLUMN_BLOCKS
    scale = 1.0
    scale64 = tl.full((), 1.0, tl.float64)
    if FROM_AMAX:
        amax_given = tl.load(scale_ptr).to(tl.float32)
        scale = tl.where(
            amax_given > 0, tl.minimum(tl.div_rn(largest, amax_given), 3.4028234663852886e38), 1.0
        )
        scale64 = scale.to(tl.float64)
    elif CODES:
        scale = tl.load(scale_ptr).to(tl.float32)
        scale64 = 1.0 / scale.to(tl.float64)
    elif SCALED:
        scale = tl.load(scale_ptr).to(tl.float32)
        scale64 = scale.to(tl.float64)
    # Half a float32 rounding above M / s: the amax that a rounded scale came from stays in.
    above = tl.full((), 1.0000000298023224, tl.float64) * largest
    limit = (above / scale64).to(tl.float32)

    column = block * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_tile = tl.arange(0, TILE_ROWS)
    start = sequence.to(tl.int64) * sequence_stride
    inverse_scale = (1.0 / scale64).to(tl.float32)
    two = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
    four = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
    error = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
    nonzero = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    kept = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    normal = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    over = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    least = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32) + 0x7FFFFFFF
    broken = tl.zeros((), tl.int64)
    # Squares are taken in units of the largest power of two so far, so that 4th powers neither
    # overflow nor vanish; what was summed in smaller units is brought to the new one.
    unit = tl.full((), 1 << 23, tl.int32)
    most = tl.zeros((), tl.int32)
    careful = True
    if HALF:
        # First as if all magnitudes were ordinary, two elements to an instruction where that goes.
        unit = tl.full((), 127 << 23, tl.int32)
        tops = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int16)
        lows = tl.full((TILE_ROWS, TILE_COLUMNS), 0x7FFF, tl.int16)
        some = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.int16)
        for tile in range(0, tiles):
            row = (split * tiles + tile) * TILE_ROWS + in_tile
            place = start + row.to(tl.int64)[:, None] * row_stride + column[None, :]
            if WHOLE_COLUMNS:
                inside = tl.broadcast_to((row < rows)[:, None], (TILE_ROWS, TILE_COLUMNS))
            else:
                inside = (row < rows)[:, None] & (column < columns)[None, :]
            loaded = tl.load(x_ptr + place, mask=inside, other=0.0)
            positive = _pair_abs(loaded.to(tl.int16, bitcast=True))
            tops = _pair_max(tops, positive)
            lows = _pair_least(lows, positive)
            some = _pair_count(some, positive)
            magnitude = positive.to(x_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
            square_part = magnitude * magnitude
            two += _fold(square_part, FOLD)
            four += _fold(square_part * square_part, FOLD)
            if SCALED:
                scaled = tl.minimum(magnitude * scale, largest)
                normal += _fold((scaled >= smallest_normal).to(tl.int32), FOLD)
                kept += _fold((scaled > flush).to(tl.int32), FOLD)
                if ERROR:
                    rounded = _rounded(scaled, smallest_normal, anchor_factor)
                    miss = rounded * inverse_scale - magnitude
                    error += _fold(miss * miss, FOLD)
        top_half = tl.max(tl.max(tops.to(tl.int32), 1), 0)
        most = _half_bits(top_half, x_ptr.dtype.element_ty)
        low_half = tl.min(tl.min(lows.to(tl.int32), 1), 0)
        nothing = low_half == 0x7FFF
        low_bits = _half_bits((low_half + 0x8001) & 0x7FFF, x_ptr.dtype.element_ty)
        # The first element stands for all: `least` and `nonzero` are only reduced from here on.
        least = least * 0 + tl.where(nothing, 0x7FFFFFFF, low_bits + 0x7FFFFFFF)
        found = tl.sum(tl.sum(some.to(tl.int32) & 0xFFFF, 1), 0)
        nonzero += _first_only(found, TILE_ROWS, TILE_COLUMNS, FOLD)
        top_value = most.to(tl.float32, bitcast=True)
        ordinary = (top_half == 0) | (
            (top_value >= 2.9802322387695312e-08) & (top_value <= 16777216.0)
        )
        if SCALED:
            ordinary = ordinary & (top_value <= limit)
            # The error is not taken in the largest unit either: its factor must be ordinary too.
            ordinary = ordinary & (inverse_scale <= 16777216.0)
        careful = ordinary == 0
    if careful:
        two = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
        four = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
        error = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
        nonzero = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
        kept = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
        normal = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
        over = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
        least = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32) + 0x7FFFFFFF
        broken = tl.zeros((), tl.int64)
        unit = tl.full((), 1 << 23, tl.int32)
        most = tl.zeros((), tl.int32)
        for tile in range(0, tiles):
            row = (split * tiles + tile) * TILE_ROWS + in_tile
            place = start + row.to(tl.int64)[:, None] * row_stride + column[None, :]
            if WHOLE_COLUMNS:
                inside = tl.broadcast_to((row < rows)[:, None], (TILE_ROWS, TILE_COLUMNS))
            else:
                inside = (row < rows)[:, None] & (column < columns)[None, :]
            loaded = tl.load(x_ptr + place, mask=inside, other=0.0)
            magnitude = tl.abs(loaded.to(tl.float32))
            if CODES:
                over += _fold((magnitude == largest).to(tl.int32), FOLD)
                normal += _fold((magnitude >= smallest_normal).to(tl.int32), FOLD)
                magnitude = magnitude * scale
            bits = magnitude.to(tl.int32, bitcast=True)
            top = tl.max(tl.max(bits, 1), 0)
            if top >= 0x7F800000:
                finite = bits < 0x7F800000
                broken += tl.sum(tl.sum((bits >= 0x7F800000).to(tl.int32), 1), 0)
                magnitude = tl.where(finite, magnitude, 0.0)
                bits = tl.where(finite, bits, 0)
                top = tl.max(tl.max(bits, 1), 0)
            most = tl.maximum(most, top)
            new_unit = tl.maximum(unit, tl.maximum(top & 0x7F800000, 1 << 23))
            if new_unit != unit:
                # Both are powers of two; the quotient may be below the smallest one: then it is 0.
                less = tl.maximum(127 + (unit >> 23) - (new_unit >> 23), 0)
                ratio = (less << 23).to(tl.float32, bitcast=True)
                square = ratio * ratio
                two *= square
                four *= square * square
                if ERROR:
                    error *= square
                unit = new_unit
            inverse = (0x7F000000 - unit).to(tl.float32, bitcast=True)
            part = magnitude * inverse
            square_part = part * part
            two += _fold(square_part, FOLD)
            four += _fold(square_part * square_part, FOLD)
            nonzero += _fold((bits != 0).to(tl.int32), FOLD)
            least = tl.minimum(least, _fold_least(bits + 0x7FFFFFFF, FOLD))
            if SCALED and not CODES:
                over += _fold((magnitude > limit).to(tl.int32), FOLD)
                scaled = tl.minimum(magnitude * scale, largest)
                normal += _fold((scaled >= smallest_normal).to(tl.int32), FOLD)
                kept += _fold((scaled > flush).to(tl.int32), FOLD)
                if ERROR:
                    rounded = _rounded(scaled, smallest_normal, anchor_factor)
                    # Where the factor would pass 2^40 every rounded value is zero.
                    miss = rounded * tl.minimum(inverse * inverse_scale, 1099511627776.0) - part
                    error += _fold(miss * miss, FOLD)
            if HISTOGRAM:
                counts = tl.histogram(
                    tl.reshape(tl.where(bits != 0, bits >> 23, 256), (TILE_ROWS * TILE_COLUMNS,)),
                    512,
                )
                slot = tl.arange(0, 512)
                tl.atomic_add(
                    histogram_ptr + slot, counts.to(tl.float64), mask=(slot < 256) & (counts > 0)
                )

    last = tl.minimum((split + 1) * tiles * TILE_ROWS, rows)
    high = tl.maximum(last - split * tiles * TILE_ROWS, 0).to(tl.int64)
    seen = high * tl.minimum(columns - block * TILE_COLUMNS, TILE_COLUMNS)
    exponent = ((unit >> 23) - 127).to(tl.int64)
    squared = ((1023 + 2 * exponent) << 52).to(tl.float64, bitcast=True)
    if CHANNELS:
        of_columns = two if FOLD else tl.sum(two, 0)
        place = channels_ptr + program * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        tl.store(place, of_columns.to(tl.float64) * squared)
    out = partials_ptr + program.to(tl.int64) * 16
    tl.store(out + 0, (seen - broken).to(tl.float64))
    tl.store(out + 1, broken.to(tl.float64))
    tl.store(out + 2, _total(nonzero, FOLD).to(tl.float64))
    tl.store(out + 3, _exact_total(two, FOLD) * squared)
    tl.store(out + 4, _exact_total(four, FOLD) * squared * squared)
    tl.store(out + 5, most.to(tl.float32, bitcast=True).to(tl.float64))
    tl.store(out + 6, tl.min(least if FOLD else tl.min(least, 1), 0).to(tl.float64))
    tl.store(out + 7, _total(kept, FOLD).to(tl.float64))
    tl.store(out + 8, _total(normal, FOLD).to(tl.float64))
    tl.store(out + 9, _total(over, FOLD).to(tl.float64))
    tl.store(out + 10, _exact_total(error, FOLD) * squared)
    # Every store of this program before the count, every count before the last one's loads.
    tl.debug_barrier()
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if finished == tl.num_programs(0) - 1:
        tl.debug_barrier()
        _finish(
            row_ptr,
            control_ptr,
            partials_ptr,
            counter_ptr,
            sequences,
            splits * COLUMN_BLOCKS,
            scale64,
            largest,
            SCALED,
            ERROR,
            CODES,
            FRESH,
            SEQUENCES,
            PARTIALS,
        )


@triton.jit
def _finish(
    row_ptr,
    control_ptr,
    partials_ptr,
    counter_ptr,
    sequences,
    each,
    scale,
    largest,
    SCALED: tl.constexpr,
    ERROR: tl.constexpr,
    CODES: tl.constexpr,
    FRESH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """All programs' sums, in a fixed order, into the row."""
    zero = tl.full((), 0.0, tl.float64)
    numel, broken, nonzero, two, four = zero, zero, zero, zero, zero
    amax, kept, normal, over, error = zero, zero, zero, zero, zero
    kurtosis, live = zero, zero
    least = tl.full((), 2147483647.0, tl.float64)
    lane = tl.arange(0, PARTIALS)
    inside = lane < each
    for sequence in range(0, sequences):
        at = partials_ptr + (sequence * each + lane) * 16
        n = tl.sum(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        s2 = tl.sum(tl.load(at + 3, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        s4 = tl.sum(tl.load(at + 4, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        numel += n
        two += s2
        four += s4
        broken += tl.sum(tl.load(at + 1, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        nonzero += tl.sum(tl.load(at + 2, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        amax = tl.maximum(
            amax, tl.max(tl.load(at + 5, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        )
        least = tl.minimum(
            least, tl.min(tl.load(at + 6, mask=inside, other=2147483647.0, cache_modifier=".cg"), 0)
        )
        if SCALED:
            kept += tl.sum(tl.load(at + 7, mask=inside, other=0.0, cache_modifier=".cg"), 0)
            normal += tl.sum(tl.load(at + 8, mask=inside, other=0.0, cache_modifier=".cg"), 0)
            over += tl.sum(tl.load(at + 9, mask=inside, other=0.0, cache_modifier=".cg"), 0)
            error += tl.sum(tl.load(at + 10, mask=inside, other=0.0, cache_modifier=".cg"), 0)
        if SEQUENCES:
            live += tl.where(s2 > 0, 1.0, 0.0)
            kurtosis += tl.where(s2 > 0, n * s4 / tl.where(s2 > 0, s2 * s2, 1.0), 0.0)
    infinity = tl.full((), float("inf"), tl.float64)
    smallest = (least.to(tl.int64) - 2147483647).to(tl.int32).to(tl.float32, bitcast=True)
    smallest64 = tl.where(least == 2147483647.0, infinity, smallest.to(tl.float64))
    amax_found = tl.where(numel > 0, amax, -infinity)
    first = tl.where(broken > 0, tl.maximum(tl.load(control_ptr + 1), 0).to(tl.float64), infinity)
    flushed, low = zero, zero
    headroom, log_low, log_high = infinity, infinity, -infinity
    if SCALED:
        headroom = tl.where(
            amax > 0, tl.log2(largest / (tl.where(amax > 0, amax, 1.0) * scale)), infinity
        )
        log_low = tl.log2(scale)
        log_high = log_low
        low = nonzero - normal
        if not CODES:
            flushed = nonzero - kept
    if FRESH:
        tl.store(row_ptr + 6, amax)
    else:
        _add(row_ptr + 0, numel)
        _add(row_ptr + 1, zero + 1.0)
        _add(row_ptr + 2, broken)
        _add(row_ptr + 3, numel - nonzero)
        _add(row_ptr + 4, two)
        _add(row_ptr + 5, four)
        tl.store(row_ptr + 6, tl.maximum(tl.load(row_ptr + 6), amax_found))
        tl.store(row_ptr + 7, tl.minimum(tl.load(row_ptr + 7), smallest64))
        _add(row_ptr + 8, kurtosis)
        _add(row_ptr + 9, live)
        _add(row_ptr + 10, flushed)
        _add(row_ptr + 11, low)
        _add(row_ptr + 12, over)
        _add(row_ptr + 13, error)
        tl.store(row_ptr + 14, tl.minimum(tl.load(row_ptr + 14), headroom))
        tl.store(row_ptr + 15, tl.minimum(tl.load(row_ptr + 15), log_low))
        tl.store(row_ptr + 16, tl.maximum(tl.load(row_ptr + 16), log_high))
        tl.store(row_ptr + 17, tl.minimum(tl.load(row_ptr + 17), first))
    tl.store(counter_ptr, 0)


@triton.jit
def _add(pointer, value):
    tl.store(pointer, tl.load(pointer) + value)


@triton.jit
def channels_kernel(
    partials_ptr,
    channels_ptr,
    control_ptr,
    columns,
    sequences,
    splits,
    COLUMN_BLOCKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Column sums of all programs, in a fixed order, added to the channels."""
    if tl.load(control_ptr) == 0:
        return
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < columns
    block = column // TILE_COLUMNS
    within = column % TILE_COLUMNS
    total = tl.zeros((DEPTH, TILE), tl.float64)
    lane = tl.arange(0, DEPTH)
    # The programs of a column block: all splits of all sequences.
    for first in range(0, sequences * splits, DEPTH):
        piece = first + lane
        program = (piece // splits)[:, None] * COLUMN_BLOCKS + block[None, :]
        program = program * splits + (piece % splits)[:, None]
        place = program.to(tl.int64) * TILE_COLUMNS + within[None, :]
        there = (piece < sequences * splits)[:, None] & inside[None, :]
        total += tl.load(partials_ptr + place, mask=there, other=0.0)
    added = tl.sum(total, 0)
    tl.store(
        channels_ptr + column,
        tl.load(channels_ptr + column, mask=inside, other=0.0) + added,
        mask=inside,
    )
