"""The Triton kernels behind `kernels`: what each program adds up, and who merges it into the row.

Runs on the device only; knows no tensors' shapes but as numbers. Magnitudes in 16 bits are first
read as if all were ordinary, two to an instruction where that goes; a program that meets others
(non-finite, or so far from 1 that 4th powers would leave float32) reads its part again, with care.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.monitor.triton_parts import (
    exact_total,
    fold,
    fold_least,
    merged,
    ordinary_sums,
    rounded,
    total,
    zeros_to_add,
)

__all__ = ["accumulate", "accumulate_kernel"]


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
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    if tl.load(control_ptr) == 0:
        return
    accumulate(
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
        COLUMN_BLOCKS,
        TILE_ROWS,
        TILE_COLUMNS,
        WHOLE_COLUMNS,
        SCALED,
        ERROR,
        FROM_AMAX,
        CODES,
        FRESH,
        SEQUENCES,
        CHANNELS,
        HISTOGRAM,
        FOLD,
        HALF,
        UNROLL,
        PTX,
        PARTIALS,
        tl.program_id(0),
        tl.num_programs(0),
    )


@triton.jit
def accumulate(
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
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
    PARTIALS: tl.constexpr,
    program,
    programs,
):
    """One of the programs that share a tensor."""
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
    begin = sequence.to(tl.int64) * sequence_stride
    inverse_scale = (1.0 / scale64).to(tl.float32)
    nothing = tl.zeros((), tl.float64)
    two, four, error = nothing, nothing, nothing
    none = tl.zeros((), tl.int32)
    nonzero, kept, normal, over, least, most = none, none, none, none, none, none
    broken = tl.zeros((), tl.int64)
    of_columns = tl.zeros((TILE_COLUMNS,), tl.float64)
    careful = True
    if HALF:
        two, four, error, of_columns, nonzero, kept, normal, over, least, most, ordinary = (
            ordinary_sums(
                x_ptr + begin,
                column,
                columns,
                split * tiles,
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
                TILE_ROWS,
                TILE_COLUMNS,
                UNROLL,
                WHOLE_COLUMNS,
                SCALED,
                ERROR,
                CODES,
                PTX,
            )
        )
        careful = ordinary == 0
    if careful:
        # Where this is the exception it takes small tiles, which leave registers to the rule.
        TIMES: tl.constexpr = min(TILE_ROWS, 4) if HALF else 1
        PART: tl.constexpr = TILE_ROWS // TIMES
        twos = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.float32)
        fours = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.float32)
        errors = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.float32)
        some = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.int32)
        keeps = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.int32)
        normals = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.int32)
        overs = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.int32)
        lows = zeros_to_add(PART, TILE_COLUMNS, FOLD, tl.int32) + 0x7FFFFFFF
        in_tile = tl.arange(0, PART)
        # Squares are taken in units of the largest power of two so far, so that 4th powers neither
        # overflow nor vanish; what was summed in smaller units is brought to the new one.
        unit = tl.full((), 1 << 23, tl.int32)
        most = tl.zeros((), tl.int32)
        for tile in range(0, tiles * TIMES):
            row = (split * tiles * TIMES + tile) * PART + in_tile
            place = begin + row.to(tl.int64)[:, None] * row_stride + column[None, :]
            if WHOLE_COLUMNS:
                inside = tl.broadcast_to((row < rows)[:, None], (PART, TILE_COLUMNS))
            else:
                inside = (row < rows)[:, None] & (column < columns)[None, :]
            loaded = tl.load(x_ptr + place, mask=inside, other=0.0)
            magnitude = tl.abs(loaded.to(tl.float32))
            if CODES:
                overs += fold((magnitude == largest).to(tl.int32), FOLD)
                # What is no number is neither.
                normals += fold(
                    ((magnitude >= smallest_normal) & (magnitude <= largest)).to(tl.int32), FOLD
                )
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
            # At most 2^126, whose inverse is still a normal number.
            new_unit = tl.minimum(tl.maximum(top & 0x7F800000, 1 << 23), 253 << 23)
            new_unit = tl.maximum(unit, new_unit)
            if new_unit != unit:
                # Both are powers of two; the quotient may be below the smallest one: then it is 0.
                less = tl.maximum(127 + (unit >> 23) - (new_unit >> 23), 0)
                ratio = (less << 23).to(tl.float32, bitcast=True)
                square = ratio * ratio
                twos *= square
                fours *= square * square
                if ERROR:
                    errors *= square
                unit = new_unit
            inverse = (0x7F000000 - unit).to(tl.float32, bitcast=True)
            part = magnitude * inverse
            square_part = part * part
            twos += fold(square_part, FOLD)
            fours += fold(square_part * square_part, FOLD)
            some += fold((bits != 0).to(tl.int32), FOLD)
            lows = tl.minimum(lows, fold_least(bits + 0x7FFFFFFF, FOLD))
            if SCALED and not CODES:
                overs += fold((magnitude > limit).to(tl.int32), FOLD)
                scaled = tl.minimum(magnitude * scale, largest)
                normals += fold((scaled >= smallest_normal).to(tl.int32), FOLD)
                keeps += fold((scaled > flush).to(tl.int32), FOLD)
                if ERROR:
                    cast = rounded(scaled, smallest_normal, anchor_factor)
                    # Where the factor would pass 2^40 every rounded value is zero.
                    miss = cast * tl.minimum(inverse * inverse_scale, 1099511627776.0) - part
                    errors += fold(miss * miss, FOLD)
            if HISTOGRAM:
                counts = tl.histogram(
                    tl.reshape(tl.where(bits != 0, bits >> 23, 256), (PART * TILE_COLUMNS,)),
                    512,
                )
                slot = tl.arange(0, 512)
                tl.atomic_add(
                    histogram_ptr + slot, counts.to(tl.float64), mask=(slot < 256) & (counts > 0)
                )

        exponent = ((unit >> 23) - 127).to(tl.int64)
        squared = ((1023 + 2 * exponent) << 52).to(tl.float64, bitcast=True)
        if CHANNELS:
            of_columns = (twos if FOLD else tl.sum(twos, 0)).to(tl.float64) * squared
        two = exact_total(twos, FOLD) * squared
        four = exact_total(fours, FOLD) * squared * squared
        error = exact_total(errors, FOLD) * squared
        nonzero = total(some, FOLD)
        kept = total(keeps, FOLD)
        normal = total(normals, FOLD)
        over = total(overs, FOLD)
        least = tl.min(lows if FOLD else tl.min(lows, 1), 0)

    last = tl.minimum((split + 1) * tiles * TILE_ROWS, rows)
    high = tl.maximum(last - split * tiles * TILE_ROWS, 0).to(tl.int64)
    seen = high * tl.minimum(columns - block * TILE_COLUMNS, TILE_COLUMNS)
    if CHANNELS:
        place = channels_ptr + program * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        tl.store(place, of_columns)
    # Field by field, so that who merges them reads neighbours.
    out = partials_ptr + program
    tl.store(out, (seen - broken).to(tl.float64))
    tl.store(out + programs, broken.to(tl.float64))
    tl.store(out + 2 * programs, nonzero.to(tl.float64))
    tl.store(out + 3 * programs, two)
    tl.store(out + 4 * programs, four)
    tl.store(out + 5 * programs, most.to(tl.float32, bitcast=True).to(tl.float64))
    # 0 where there is no magnitude but zero; a smaller one gives more, 2^32 - its bits.
    tl.store(out + 6 * programs, (0x7FFFFFFF - least.to(tl.int64)).to(tl.float64))
    if SCALED:
        tl.store(out + 7 * programs, kept.to(tl.float64))
        tl.store(out + 8 * programs, normal.to(tl.float64))
        tl.store(out + 9 * programs, over.to(tl.float64))
        tl.store(out + 10 * programs, error)
    # Every store of this program before the count, every count before the last one's loads.
    tl.debug_barrier()
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if finished == programs - 1:
        tl.debug_barrier()
        _finish(
            row_ptr,
            control_ptr,
            partials_ptr,
            counter_ptr,
            sequences,
            splits * COLUMN_BLOCKS,
            programs,
            scale64,
            largest,
            SCALED,
            ERROR,
            CODES,
            FRESH,
            SEQUENCES,
            PTX,
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
    programs,
    scale,
    largest,
    SCALED: tl.constexpr,
    ERROR: tl.constexpr,
    CODES: tl.constexpr,
    FRESH: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PTX: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """All programs' sums, in a fixed order, into the row."""
    zero = tl.full((), 0.0, tl.float64)
    numel, broken, nonzero, two, four = zero, zero, zero, zero, zero
    amax, kept, normal, over, error = zero, zero, zero, zero, zero
    kurtosis, live = zero, zero
    low_all = zero
    lane = tl.arange(0, PARTIALS)
    inside = lane < each
    nothing = tl.zeros((PARTIALS,), tl.float64)
    for sequence in range(0, sequences):
        at = partials_ptr + sequence * each + lane
        of_cast = (nothing, nothing, nothing, nothing)
        if SCALED:
            of_cast = (
                _field(at, 7 * programs, inside),
                _field(at, 8 * programs, inside),
                _field(at, 9 * programs, inside),
                _field(at, 10 * programs, inside),
            )
        of_core = (
            _field(at, 0, inside),
            _field(at, programs, inside),
            _field(at, 2 * programs, inside),
            _field(at, 3 * programs, inside),
            _field(at, 4 * programs, inside),
            _field(at, 5 * programs, inside),
            _field(at, 6 * programs, inside),
        )
        n, bad, some, s2, s4, keep, norm, above, miss, top, least = merged(
            of_core, of_cast, SCALED, PTX
        )
        numel += n
        broken += bad
        nonzero += some
        two += s2
        four += s4
        kept += keep
        normal += norm
        over += above
        error += miss
        amax = tl.maximum(amax, top)
        low_all = tl.maximum(low_all, least)
        if SEQUENCES:
            live += tl.where(s2 > 0, 1.0, 0.0)
            kurtosis += tl.where(s2 > 0, n * s4 / tl.where(s2 > 0, s2 * s2, 1.0), 0.0)
    infinity = tl.full((), float("inf"), tl.float64)
    smallest = (-low_all.to(tl.int64)).to(tl.int32).to(tl.float32, bitcast=True)
    smallest64 = tl.where(low_all == 0, infinity, smallest.to(tl.float64))
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
    if SCALED and not ERROR:
        error = tl.full((), float("nan"), tl.float64)
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
def _field(at, offset, inside):
    return tl.load(at + offset, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def _add(pointer, value):
    tl.store(pointer, tl.load(pointer) + value)
