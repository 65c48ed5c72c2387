"""Statistics of a CUDA tensor in one read, by one Triton kernel, added to a row of sums.

What is summed is what `statistics.packed_sums` sums, on any device. Each program keeps its own
sums in registers and writes them once; the program that finishes last adds all of them up in a
fixed order, in float64, and merges the result into the row: no atomic on a number, so the same
tensor gives the same bits. Whether a tensor is read at all is decided on the device (`control`), so
a launch in a CUDA graph does at each replay what the step asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton

from foreshock.monitor.formats import Format, format_named
from foreshock.monitor.launches import Launch, Prepared
from foreshock.monitor.together import Member, Together, member_of
from foreshock.monitor.triton_channels import channels_kernel
from foreshock.monitor.triton_kernels import accumulate_kernel
from foreshock.monitor.triton_tables import MEMBERS

__all__ = ["Prepared", "Scratch", "Together", "accumulate", "accumulate_codes", "joint"]

_PARTIALS: Final = 2**15
_FIELDS: Final = 16
_ROW: Final = 18
_AMAX: Final = 6
_TILE: Final = 4096
_WIDEST: Final = 1024
_WARPS: Final = 4
_CHANNEL_TILE: Final = 32
# Registers allow fewer programs that also work out the cast; measured on an H200.
_PROGRAMS_PER_CORE: Final = 4
_CASTING_PER_CORE: Final = 4
# What lets as many programs run at once; where it spills, it is in the last program's merge.
_REGISTERS: Final = 128
_INTERPRETED_CORES: Final = 1
_SPARE: Final = 3
_CODES: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Scratch:
    """Where programs leave their sums, per stream, so that kernels of two streams do not meet.

    A few are made at once: while a graph is captured, or torch.compile warms one up, what is newly
    allocated is the graph's, and must not outlive its run.

    Args:
        device: A CUDA device.
        per_core: Programs per multiprocessor, where the default is not to be used.

    Attributes:
        launches: Launches worked out, by what they depend on.
        variants: Kernels for many tensors, by what they are compiled for.
    """

    def __init__(self, device: torch.device, *, per_core: int | None = None) -> None:
        self._device = device
        self._per_core = per_core
        # On a CPU the kernels run in Triton's interpreter, one program after the other.
        self._cores = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else _INTERPRETED_CORES
        )
        self._index = device.index or 0
        on_cuda = device.type == "cuda"
        if on_cuda and device.index is None:
            self._index = torch.cuda.current_device()
        # torch.cuda.current_stream makes an object first; this is asked for at every launch.
        self._current_stream: Callable[[int], int] = (
            torch._C._cuda_getCurrentRawStream if on_cuda else _no_stream
        )
        self._addresses: dict[int, tuple[int, int]] = {}
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._channels: dict[int, torch.Tensor] = {}
        # The stream in use, one to warm a graph up in, and one to capture it in.
        self._spare = [self._new_buffers() for _ in range(_SPARE if on_cuda else 0)]
        self._spare_channels = [self._new_channels(1) for _ in self._spare]
        self.launches: dict[object, Launch] = {}
        self.variants: dict[object, object] = {}

    def programs(self, *, casting: bool) -> int:
        """How many programs fill the device."""
        if self._per_core is not None:
            return self._cores * self._per_core
        return self._cores * (_CASTING_PER_CORE if casting else _PROGRAMS_PER_CORE)

    @property
    def bytes(self) -> int:
        """Memory on the device."""
        held = [t for buffers in (*self._buffers.values(), *self._spare) for t in buffers]
        held += [*self._channels.values(), *self._spare_channels]
        return sum(t.numel() * t.element_size() for t in held)

    def _new_buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        partials = torch.empty(_PARTIALS * _FIELDS, dtype=torch.float64, device=self._device)
        # One for each tensor of a launch.
        counter = torch.zeros(MEMBERS, dtype=torch.int32, device=self._device)
        row = torch.zeros(1, _ROW, dtype=torch.float64, device=self._device)
        return partials, counter, row

    def _new_channels(self, elements: int) -> torch.Tensor:
        # Most launches have as many programs as fill the device, each with a tile's width.
        usual = self.programs(casting=False) * _WIDEST
        return torch.empty(max(elements, usual), dtype=torch.float64, device=self._device)

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Partial sums, the counter of finished programs, and a row for a first pass."""
        stream = self.stream()
        found = self._buffers.get(stream)
        if found is None:
            found = self._spare.pop() if self._spare else self._new_buffers()
            self._buffers[stream] = found
        return found

    def stream(self) -> int:
        """Handle of the stream in use."""
        return self._current_stream(self._index)

    def addresses(self, stream: int) -> tuple[int, int]:
        """Where the partial sums and the counter of a stream are."""
        found = self._addresses.get(stream)
        if found is None:
            partials, counter, _ = self.buffers()
            found = self._addresses[stream] = (partials.data_ptr(), counter.data_ptr())
        return found

    def channels(self, elements: int) -> torch.Tensor:
        """Room for the channel sums of every program."""
        stream = self.stream()
        found = self._channels.get(stream)
        if found is None and self._spare_channels:
            found = self._channels[stream] = self._spare_channels.pop()
        if found is None or found.numel() < elements:
            found = self._channels[stream] = self._new_channels(elements)
        return found


def _no_stream(device: int) -> int:
    """On a CPU there is one order of things."""
    return 0


# Compared by identity: it is asked for at every launch.
@dataclass(frozen=True, slots=True, eq=False)
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


@functools.cache
def _wanted(
    format: str,
    sequences: bool,
    error: bool,
    *,
    from_amax: bool = False,
    codes: bool = False,
    fresh: bool = False,
) -> _Wanted:
    return _Wanted(format_named(format), sequences, error, from_amax, codes, fresh)


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
) -> tuple[Prepared, ...]:
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
        sqnr: Take the cast's error; where nobody takes it, its sum is NaN.
        histogram: float64 (256,), to which counts by the biased float32 exponent of finite
            non-zero magnitudes are added.

    Returns:
        The launches, ready for the next tensor of this kind; none where they cannot be had again.
    """
    number = format_named(format)
    want = _wanted(format, sequences, sqnr and number.scaled)
    if scale is not None or not number.scaled:
        given = scale if number.scaled else None
        only = _launch(x, rows, slot, want, given, control, scratch, channels, histogram)
        return () if only is None else (only,)
    _, _, first = scratch.buffers()
    plain = _wanted("fp32", False, False, fresh=True)
    one = _launch(x, first, 0, plain, None, control, scratch, None, None)
    current = _wanted(format, sequences, want.error, from_amax=True)
    amax = first[0, _AMAX:]
    two = _launch(x, rows, slot, current, amax, control, scratch, channels, histogram)
    return () if one is None or two is None else (one, two)


def accumulate_codes(
    codes: torch.Tensor,
    rows: torch.Tensor,
    slot: int,
    *,
    format: str,
    scale_inv: torch.Tensor,
    control: torch.Tensor,
    scratch: Scratch,
) -> tuple[Prepared, ...]:
    """Measure the tensor that FP8 codes stand for, code x scale_inv, into rows[slot].

    Zero codes count as zeros, codes at the largest magnitude as overflow, codes below the smallest
    normal as subnormal; what the codes no longer tell (flushed elements, the error) is not counted.
    Returns what `accumulate` returns.
    """
    if codes.dtype == torch.uint8:
        codes = codes.view(_CODES[format])
    want = _wanted(format, True, False, codes=True)
    only = _launch(codes, rows, slot, want, scale_inv, control, scratch, None, None)
    return () if only is None else (only,)


def joint(
    started: Sequence[Prepared], x: torch.Tensor, *, format: str, scale: torch.Tensor | None
) -> Member | None:
    """How tensors like x are measured together with others; None if they are measured alone.

    Args:
        started: What `accumulate` or `accumulate_codes` returned for x.
        x: The tensor, or its codes.
        format: As there.
        scale: As there.
    """
    if len(started) != 1 or not (scale is None or scale.dtype == torch.float32):
        return None
    only = started[0]
    kind = _CODES[format] if only.launch.constants["CODES"] else x.dtype
    return member_of(only.launch, x, kind, only.row, only.scratch.variants, registers=_REGISTERS)


@functools.cache
def _has_pairs(device: torch.device) -> bool:
    """Whether the device has instructions for two 16-bit numbers; the interpreter has none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _plan(view: _View, want: _Wanted, programs: int, *, channels: bool, histogram: bool) -> Launch:
    tile_columns = min(triton.next_power_of_2(view.columns), _WIDEST)
    column_blocks = triton.cdiv(view.columns, tile_columns)
    tile_rows = max(_TILE // tile_columns, 1)
    row_tiles = triton.cdiv(view.rows, tile_rows)
    groups = view.sequences * column_blocks
    splits = max(min(row_tiles, programs // groups, _PARTIALS // groups), 1)
    # Whole rounds: each program gets as many tiles as every other, but for the last.
    tiles = triton.cdiv(row_tiles, splits)
    splits = triton.cdiv(row_tiles, tiles)
    if groups * splits > _PARTIALS:
        raise ValueError(f"{view.sequences} sequences are more than fit into one launch")
    number = want.format
    steps = number.smallest_normal / number.smallest_subnormal
    return Launch(
        grid=(groups * splits, 1, 1),
        numbers=(
            view.sequences,
            view.rows,
            view.columns,
            view.row_stride,
            view.sequence_stride,
            splits,
            tiles,
            float(number.largest),
            float(number.smallest_normal),
            float(number.flush_threshold),
            1.5 * 2.0**23 / steps,
        ),
        constants={
            "COLUMN_BLOCKS": column_blocks,
            "TILE_ROWS": tile_rows,
            "TILE_COLUMNS": tile_columns,
            "WHOLE_COLUMNS": view.columns % tile_columns == 0,
            "SCALED": number.scaled,
            "ERROR": want.error,
            "FROM_AMAX": want.from_amax,
            "CODES": want.codes,
            "FRESH": want.fresh,
            "SEQUENCES": want.sequences and view.are_sequences,
            "CHANNELS": channels,
            "HISTOGRAM": histogram,
            # 8 elements a thread, 32 threads a warp: then a row of the tile takes all of them.
            "FOLD": tile_columns >= 256 * _WARPS,
            "HALF": (want.codes or view.x.dtype in (torch.bfloat16, torch.float16))
            and not histogram,
            # 8 bytes a thread at least, 16 for 16 bits: what one load takes.
            "UNROLL": min(tile_rows, 2 if want.codes else 4),
            "PTX": _has_pairs(view.x.device),
            "PARTIALS": triton.next_power_of_2(column_blocks * splits),
        },
        room=groups * splits * tile_columns if channels else 0,
        channel_grid=(triton.cdiv(view.columns, _CHANNEL_TILE), 1, 1),
        channel_numbers=(view.columns, view.sequences, splits),
        channel_constants={
            "COLUMN_BLOCKS": column_blocks,
            "TILE_COLUMNS": tile_columns,
            "TILE": _CHANNEL_TILE,
            "DEPTH": 32,
        },
    )


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
) -> Prepared | None:
    if x.numel() == 0:
        # No sums but that of observations, which is column 1.
        rows[slot, 1:2].add_(control[:1])
        return None
    partials, counter, _ = scratch.buffers()
    row = rows[slot]
    pointers = [x, row, partials if scale is None else scale, control, partials, counter]
    # What Triton compiles for: types, and which addresses are multiples of 16 bytes.
    key = (
        x.dtype,
        x.shape,
        x.stride(),
        want,
        pointers[2].dtype,
        channels is None,
        histogram is None,
        tuple(pointer.data_ptr() % 16 for pointer in (x, row, pointers[2])),
    )
    launch = scratch.launches.get(key)
    if launch is None:
        view = _view(x, keep_columns=channels is not None)
        if view.x.data_ptr() != x.data_ptr():
            # A copy, whose pieces lie next to each other; it has a launch of its own.
            _launch(view.x, rows, slot, want, scale, control, scratch, channels, histogram)
            return None
        launch = _plan(
            view,
            want,
            scratch.programs(casting=want.format.scaled),
            channels=channels is not None,
            histogram=histogram is not None,
        )
        scratch.launches[key] = launch
    sums = partials if channels is None else scratch.channels(launch.room)
    pointers += [sums, partials if histogram is None else histogram]
    arguments = (*pointers, *launch.numbers)
    if launch.compiled is None:
        most = {"maxnreg": _REGISTERS} if launch.constants["HALF"] else {}
        launch.compiled = accumulate_kernel[launch.grid](
            *arguments, **launch.constants, num_warps=_WARPS, **most
        )
    else:
        launch.compiled[launch.grid](*arguments, *launch.constants.values())
    if channels is not None:
        _launch_channels(launch, sums, channels, control)
    return Prepared(
        launch,
        scratch,
        row.data_ptr(),
        # A scale worked out in a first pass stands at a place of its own.
        pointers[2].data_ptr() if want.from_amax else None,
        scale is not None,
        control.data_ptr(),
        None if channels is None else channels.data_ptr(),
        None if histogram is None else histogram.data_ptr(),
    )


def _launch_channels(
    launch: Launch, sums: torch.Tensor, channels: torch.Tensor, control: torch.Tensor
) -> None:
    arguments = (sums, channels, control, *launch.channel_numbers)
    if launch.channel_compiled is None or channels.data_ptr() % 16:
        launch.channel_compiled = channels_kernel[launch.channel_grid](
            *arguments, **launch.channel_constants
        )
    else:
        launch.channel_compiled[launch.channel_grid](*arguments, *launch.channel_constants.values())
