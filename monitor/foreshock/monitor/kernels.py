"""Statistics of a CUDA tensor in one read, by one Triton kernel, added to a row of sums.

What is summed is what `statistics.packed_sums` sums, on any device. Each program keeps its own
sums in registers and writes them once; the program that finishes last adds all of them up in a
fixed order, in float64, and merges the result into the row: no atomic on a number, so the same
tensor gives the same bits. Whether a tensor is read at all is decided on the device (`control`), so
a launch in a CUDA graph does at each replay what the step asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from foreshock.monitor.formats import Format, format_named

__all__ = ["Scratch", "accumulate", "accumulate_codes"]

_PARTIALS: Final = 2**15
_FIELDS: Final = 16
_ROW: Final = 18
_AMAX: Final = 6
_TILE: Final = 4096
_WIDEST: Final = 1024
_WARPS: Final = 4
_CHANNEL_TILE: Final = 64
_PROGRAMS_PER_CORE: Final = 8
_CODES: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Scratch:
    """Where programs leave their sums, per stream, so that kernels of two streams do not meet.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cores = torch.cuda.get_device_properties(device).multi_processor_count
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._channels: dict[int, torch.Tensor] = {}

    @property
    def programs(self) -> int:
        """How many programs fill the device."""
        return self._cores * _PROGRAMS_PER_CORE

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Partial sums, the counter of finished programs, and a row for a first pass."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        found = self._buffers.get(stream)
        if found is None:
            partials = torch.empty(_PARTIALS * _FIELDS, dtype=torch.float64, device=self._device)
            counter = torch.zeros(1, dtype=torch.int32, device=self._device)
            row = torch.zeros(1, _ROW, dtype=torch.float64, device=self._device)
            found = self._buffers[stream] = (partials, counter, row)
        return found

    def channels(self, elements: int) -> torch.Tensor:
        """Room for the channel sums of every program."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        found = self._channels.get(stream)
        if found is None or found.numel() < elements:
            found = torch.empty(elements, dtype=torch.float64, device=self._device)
            self._channels[stream] = found
        return found


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a launch works out, beyond the sums of a plain tensor.

    Attributes:
        format: Of the cast.
        sequences: The kurtosis of each sequence.
        error: The cast's error.
        from_amax: The scale given is an amax, from which current scaling follows.
        codes: The tensor holds codes and the scale given is the inverse.
        fresh: The row is overwritten.
    """

    format: Format
    sequences: bool
    error: bool = False
    from_amax: bool = False
    codes: bool = False
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as sequences of rows of columns, columns next to each other in memory."""

    x: torch.Tensor
    sequences: int
    rows: int
    columns: int
    row_stride: int
    sequence_stride: int
    are_sequences: bool


def _view(x: torch.Tensor, *, keep_columns: bool) -> _View:
    are_sequences = x.ndim > 2
    sequences = 1
    for size in x.shape[:-2]:
        sequences *= size
    if x.ndim == 0:
        x = x.reshape(1)
    rows, columns = (x.shape[-2] if x.ndim > 1 else 1), x.shape[-1]
    if (
        not are_sequences
        and x.ndim == 2
        and x.stride(0) == 1
        and x.stride(1) != 1
        and not keep_columns
    ):
        # A transposed matrix is read in the order in which it lies.
        return _view(x.t(), keep_columns=False)
    regular = x.ndim <= 3 and x.stride(-1) == 1
    if not regular:
        x = x.contiguous()
    row_stride = x.stride(-2) if x.ndim > 1 else columns
    sequence_stride = x.stride(0) if x.ndim == 3 else rows * columns
    view = _View(x, sequences, rows, columns, row_stride, sequence_stride, are_sequences)
    return view if keep_columns else _flattened(view)


def _flattened(view: _View) -> _View:
    """Rows of a convenient width, where nothing asks for the columns and no gap lies between."""
    if view.rows > 1 and view.row_stride != view.columns:
        return view
    elements = view.rows * view.columns
    width = 1024
    while width > 1 and elements % width:
        width //= 2
    if width < 64:
        return view
    return _View(
        view.x,
        view.sequences,
        elements // width,
        width,
        width,
        view.sequence_stride,
        view.are_sequences,
    )


def accumulate(
    x: torch.Tensor,
    rows: torch.Tensor,
    slot: int,
    *,
    format: str,
    scale: torch.Tensor | None,
    control: torch.Tensor,
    scratch: Scratch,
    channels: torch.Tensor | None = None,
    sequences: bool = True,
    sqnr: bool = True,
    histogram: torch.Tensor | None = None,
) -> None:
    """Measure x into rows[slot]. Queues one kernel (two for a scale that x itself decides).

    Args:
        x: Any shape and stride; bf16, fp16, fp32 or fp64 (computed in float32), on CUDA.
        rows: float64 (slots, 18): `SUM_FIELDS`, and the first micro-batch with a non-finite
            element.
        slot: Row to merge into.
        format: Name of the format that x is cast to.
        scale: Scale in force, 0-dim float32; None is current scaling, M / amax.
        control: int32 (enabled, micro-batch) on the device.
        scratch: Of x's device.
        channels: float64 (features,), to which sums over tokens of x^2 are added.
        sequences: Take the kurtosis of each sequence (three or more dims).
        sqnr: Take the cast's error.
        histogram: float64 (256,), to which counts by the biased float32 exponent of finite
            non-zero magnitudes are added.
    """
    number = format_named(format)
    want = _Wanted(number, sequences=sequences, error=sqnr and number.scaled)
    if not number.scaled:
        _launch(x, rows, slot, want, None, control, scratch, channels, histogram)
        return
    if scale is not None:
        _launch(x, rows, slot, want, scale, control, scratch, channels, histogram)
        return
    _, _, first = scratch.buffers()
    plain = _Wanted(format_named("fp32"), sequences=False, fresh=True)
    _launch(x, first, 0, plain, None, control, scratch, None, None)
    current = _Wanted(number, sequences=sequences, error=want.error, from_amax=True)
    _launch(x, rows, slot, current, first[0, _AMAX:], control, scratch, channels, histogram)


def accumulate_codes(
    codes: torch.Tensor,
    rows: torch.Tensor,
    slot: int,
    *,
    format: str,
    scale_inv: torch.Tensor,
    control: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Measure the tensor that FP8 codes stand for, code x scale_inv, into rows[slot].

    Zero codes count as zeros, codes at the largest magnitude as overflow, codes below the smallest
    normal as subnormal; what the codes no longer tell (flushed elements, the error) is not counted.
    """
    if codes.dtype == torch.uint8:
        codes = codes.view(_CODES[format])
    want = _Wanted(format_named(format), sequences=True, codes=True)
    _launch(codes, rows, slot, want, scale_inv, control, scratch, None, None)


def _launch(
    x: torch.Tensor,
    rows: torch.Tensor,
    slot: int,
    want: _Wanted,
    scale: torch.Tensor | None,
    control: torch.Tensor,
    scratch: Scratch,
    channels: torch.Tensor | None,
    histogram: torch.Tensor | None,
) -> None:
    if x.numel() == 0:
        # No sums but that of observations, which is column 1.
        rows[slot, 1:2].add_(control[:1])
        return
    view = _view(x, keep_columns=channels is not None)
    tile_columns = min(triton.next_power_of_2(view.columns), _WIDEST)
    column_blocks = triton.cdiv(view.columns, tile_columns)
    tile_rows = max(_TILE // tile_columns, 1)
    row_tiles = triton.cdiv(view.rows, tile_rows)
    groups = view.sequences * column_blocks
    splits = max(min(row_tiles, scratch.programs // groups, _PARTIALS // groups), 1)
    # Whole rounds: each program gets as many tiles as every other, but for the last.
    splits = triton.cdiv(row_tiles, triton.cdiv(row_tiles, splits))
    if groups * splits > _PARTIALS:
        raise ValueError(f"{view.sequences} sequences are more than fit into one launch")
    partials, counter, _ = scratch.buffers()
    sums = scratch.channels(groups * splits * tile_columns) if channels is not None else partials
    number = want.format
    steps = number.smallest_normal / number.smallest_subnormal
    _accumulate[(groups * splits,)](
        view.x,
        rows[slot],
        partials if scale is None else scale,
        control,
        partials,
        counter,
        sums,
        partials if histogram is None else histogram,
        view.sequences,
        view.rows,
        view.columns,
        view.row_stride,
        view.sequence_stride,
        splits,
        triton.cdiv(row_tiles, splits),
        float(number.largest),
        float(number.largest) * (1 + 2.0**-25),
        float(number.smallest_normal),
        float(number.flush_threshold),
        1.5 * 2.0**23 / steps,
        COLUMN_BLOCKS=column_blocks,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=tile_columns,
        WHOLE_COLUMNS=view.columns % tile_columns == 0,
        SCALED=number.scaled,
        ERROR=want.error,
        FROM_AMAX=want.from_amax,
        CODES=want.codes,
        FRESH=want.fresh,
        SEQUENCES=want.sequences and view.are_sequences,
        CHANNELS=channels is not None,
        HISTOGRAM=histogram is not None,
        # 8 elements a thread, 32 threads a warp: then a row of the tile takes all of them.
        FOLD=tile_columns >= 256 * _WARPS,
        PARTIALS=triton.next_power_of_2(column_blocks * splits),
        num_warps=_WARPS,
    )
    if channels is not None:
        programs = triton.cdiv(view.columns, _CHANNEL_TILE)
        _add_channels[(programs,)](
            sums,
            channels,
            control,
            view.columns,
            view.sequences,
            splits,
            COLUMN_BLOCKS=column_blocks,
            TILE_COLUMNS=tile_columns,
            TILE=_CHANNEL_TILE,
        )


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
def _accumulate(
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
    above,
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
    limit = (above / scale64).to(tl.float32)

    column = block * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    in_tile = tl.arange(0, TILE_ROWS)
    start = sequence.to(tl.int64) * sequence_stride
    two = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
    four = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
    error = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.float32)
    nonzero = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    kept = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    normal = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    over = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32)
    least = _start(TILE_ROWS, TILE_COLUMNS, FOLD, tl.int32) + 0x7FFFFFFF
    broken = tl.zeros((), tl.int64)
    inverse_scale = (1.0 / scale64).to(tl.float32)
    # Squares are taken in units of the largest power of two so far, so that 4th powers neither
    # overflow nor vanish; what was summed in smaller units is brought to the new one.
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
                anchor = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(
                    tl.float32, bitcast=True
                )
                anchor = tl.maximum(anchor, smallest_normal) * anchor_factor
                rounded = (scaled + anchor) - anchor
                # Where the factor would pass 2^40 every rounded value is zero.
                miss = rounded * tl.minimum(inverse * inverse_scale, 1099511627776.0) - part
                error += _fold(miss * miss, FOLD)
        if HISTOGRAM:
            counts = tl.histogram(
                tl.reshape(tl.where(bits != 0, bits >> 23, 256), (TILE_ROWS * TILE_COLUMNS,)), 512
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
def _add_channels(
    partials_ptr,
    channels_ptr,
    control_ptr,
    columns,
    sequences,
    splits,
    COLUMN_BLOCKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Column sums of all programs, in a fixed order, added to the channels."""
    if tl.load(control_ptr) == 0:
        return
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < columns
    block = column // TILE_COLUMNS
    within = column % TILE_COLUMNS
    total = tl.zeros((TILE,), tl.float64)
    for sequence in range(0, sequences):
        for split in range(0, splits):
            program = (sequence * COLUMN_BLOCKS + block) * splits + split
            place = program.to(tl.int64) * TILE_COLUMNS + within
            total += tl.load(partials_ptr + place, mask=inside, other=0.0).to(tl.float64)
    tl.store(
        channels_ptr + column,
        tl.load(channels_ptr + column, mask=inside, other=0.0) + total,
        mask=inside,
    )
