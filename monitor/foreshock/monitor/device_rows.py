"""Rows of sums that stay on a CUDA device and are added to in place, step after step.

One kernel per tensor, no allocation once every tensor has been seen, no value read on the host: the
same launches work inside a CUDA graph, whose replays run no Python at all. Whether a launch reads
its tensor is decided on the device, by a flag.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Self

import torch

from foreshock.monitor.entry import Entry
from foreshock.monitor.formats import format_named
from foreshock.monitor.record import EXPONENTS, FIELD_REDUCTIONS

__all__ = ["ROW_FIELDS", "DeviceRows"]

ROW_FIELDS: Final = len(FIELD_REDUCTIONS) + 1
"""`SUM_FIELDS`, and the first micro-batch with a non-finite element (+inf for none)."""

_NEUTRAL: Final = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}
_FIRST_ROWS: Final = 64
_TIMED_FIRST: Final = 4
_ARENA: Final = 2**18
_TIMED_EVERY: Final = 16


class DeviceRows:
    """The rows of one collector.

    Args:
        device: A CUDA device.
        kernels: `foreshock.monitor.kernels`, loaded only where it can run.
        count_exponents: Count elements by their power of two.
    """

    def __init__(
        self, device: torch.device, kernels: Any, *, count_exponents: bool = False
    ) -> None:
        self._device = device
        neutral = [_NEUTRAL[how] for how in FIELD_REDUCTIONS.values()] + [torch.inf]
        self._neutral = torch.tensor(neutral, dtype=torch.float64, device=device)
        self._rows = self._neutral.repeat(_FIRST_ROWS, 1)
        self._slots: dict[Entry, int] = {}
        self._channels: dict[int, torch.Tensor] = {}
        self._count_exponents = count_exponents
        self._exponents: dict[int, torch.Tensor] = {}
        self._vectors = _Arena(device)
        self._reserved = 0
        # On the device: whether launches read, and the micro-batch in progress.
        self._control = torch.zeros(2, dtype=torch.int32, device=device)
        self._kernels = kernels
        self._scratch = kernels.Scratch(device)
        self._retired: list[torch.Tensor] = []
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0
        self._timing = False

    @classmethod
    def on(cls, device: torch.device, *, count_exponents: bool = False) -> Self | None:
        """Rows on a CUDA device with Triton, else None."""
        if device.type != "cuda":
            return None
        # It comes with torch's CUDA builds, but not on every platform.
        if importlib.util.find_spec("triton") is None:
            return None
        from foreshock.monitor import kernels

        return cls(device, kernels, count_exponents=count_exponents)

    def reserve(self) -> None:
        """Make room for one more tensor, before a graph is captured with today's addresses."""
        self._reserved += 1
        # Twice: a layer that changes its format, or is called again, needs another row.
        self._grow(2 * self._reserved)

    def start_step(self, *, measuring: bool) -> None:
        """Neutral rows, micro-batch -1 and the flag, queued on the stream."""
        self._control[0].fill_(int(measuring))
        self._control[1].fill_(-1)
        self._timing = False
        if measuring:
            self._steps += 1
            # Marks cost as much as small kernels; the cost hardly changes from step to step.
            self._timing = self._steps <= _TIMED_FIRST or self._steps % _TIMED_EVERY == 0
            self._rows.copy_(self._neutral.expand_as(self._rows))
            self._vectors.zero()

    def next_micro_batch(self) -> None:
        """Count on, on the device: a captured graph counts at every replay."""
        self._control[1].add_(1)

    def add(self, entry: Entry, x: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Measure a tensor into its row."""
        slot = self._slot(entry)
        features = x.shape[-1] if x.ndim else 1
        channels = self._channels.get(slot)
        if channels is None or len(channels) != features:
            channels = self._channels[slot] = self._vectors.take(features)
        if self._count_exponents and slot not in self._exponents:
            self._exponents[slot] = self._vectors.take(EXPONENTS)
        with self._timed():
            self._measure(x, entry, slot, scale, channels)

    def _measure(
        self,
        x: torch.Tensor,
        entry: Entry,
        slot: int,
        scale: torch.Tensor | None,
        channels: torch.Tensor,
    ) -> None:
        self._kernels.accumulate(
            x.detach(),
            self._rows,
            slot,
            format=entry.identity.format,
            scale=None if scale is None else scale.detach(),
            control=self._control,
            scratch=self._scratch,
            channels=channels,
            histogram=self._exponents.get(slot),
            sqnr=format_named(entry.identity.format).scaled,
        )

    def add_codes(self, entry: Entry, codes: torch.Tensor, scale_inv: torch.Tensor) -> None:
        """Measure FP8 codes into their row."""
        slot = self._slot(entry)
        with self._timed():
            self._kernels.accumulate_codes(
                codes,
                self._rows,
                slot,
                format=entry.identity.format,
                scale_inv=scale_inv,
                control=self._control,
                scratch=self._scratch,
            )

    def take_marks(self) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        """Marks around the kernels since the last call, at a step whose cost is measured."""
        marks, self._marks = self._marks, []
        return marks

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self._timing or torch.cuda.is_current_stream_capturing():
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._marks.append((start, end))

    def take(
        self,
    ) -> tuple[tuple[Entry, ...], torch.Tensor | None, list[tuple[Entry, torch.Tensor]]]:
        """Entries, copies of their rows, and copies of their channel sums."""
        if not self._slots:
            return (), None, []
        entries = tuple(self._slots)
        rows = self._rows[: len(entries)].clone()
        self._vectors.copy()
        return entries, rows, self._copies(self._channels)

    def histograms(self) -> list[tuple[Entry, torch.Tensor]]:
        """Entries with copies of their counts by power of two, after `take`."""
        return self._copies(self._exponents)

    def _copies(self, vectors: Mapping[int, torch.Tensor]) -> list[tuple[Entry, torch.Tensor]]:
        return [
            (entry, self._vectors.copy_of(vectors[slot]))
            for entry, slot in self._slots.items()
            if slot in vectors
        ]

    def _slot(self, entry: Entry) -> int:
        # Micro-batches of one tensor share a row.
        known = replace(entry, micro_batch=None)
        slot = self._slots.get(known)
        if slot is None:
            slot = self._slots[known] = len(self._slots)
            self._grow(slot + 1)
        return slot

    def _grow(self, rows: int) -> None:
        if rows <= len(self._rows):
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "more tensors in the graph than were seen before its capture; run one eager step "
                "after watch() and before capturing"
            )
        wider = self._neutral.repeat(max(rows, 2 * len(self._rows)), 1)
        wider[: len(self._rows)] = self._rows
        # A graph captured earlier still writes to the old rows.
        self._retired.append(self._rows)
        self._rows = wider


class _Arena:
    """Many vectors in few buffers, so that zeroing and copying all of them are few launches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._copied: list[torch.Tensor] = []
        self._free = 0

    def take(self, size: int) -> torch.Tensor:
        """Zeros that keep their place."""
        # 16 bytes: Triton has another kernel for addresses that are no multiple of it.
        size_taken = size + size % 2
        if size_taken > self._free:
            buffer = torch.zeros(max(_ARENA, size_taken), dtype=torch.float64, device=self._device)
            self._buffers.append(buffer)
            self._free = len(buffer)
        start = len(self._buffers[-1]) - self._free
        self._free -= size_taken
        return self._buffers[-1][start : start + size]

    def zero(self) -> None:
        """All vectors to zero, queued on the stream."""
        for buffer in self._buffers:
            buffer.zero_()

    def copy(self) -> None:
        """Copy all vectors, queued on the stream."""
        self._copied = [buffer.clone() for buffer in self._buffers]

    def copy_of(self, vector: torch.Tensor) -> torch.Tensor:
        """The copy of one vector."""
        storage = vector.untyped_storage().data_ptr()
        for buffer, copied in zip(self._buffers, self._copied, strict=True):
            if buffer.untyped_storage().data_ptr() == storage:
                start = vector.storage_offset()
                return copied[start : start + len(vector)]
        raise ValueError("the vector is of another arena")
