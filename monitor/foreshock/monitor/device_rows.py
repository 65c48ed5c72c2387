"""Rows of sums that stay on a CUDA device and are added to in place, step after step.

One kernel per tensor, no allocation once every tensor has been seen, no value read on the host: the
same launches work inside a CUDA graph, whose replays run no Python at all. Whether a launch reads
its tensor is decided on the device, by a flag.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import torch

from foreshock.monitor.arena import Arena
from foreshock.monitor.entry import Entry
from foreshock.monitor.formats import format_named
from foreshock.monitor.record import EXPONENTS, FIELD_REDUCTIONS

if TYPE_CHECKING:
    from foreshock.monitor.together import Group

__all__ = ["ROW_FIELDS", "DeviceRows", "Known", "Slot"]

ROW_FIELDS: Final = len(FIELD_REDUCTIONS) + 1
"""`SUM_FIELDS`, and the first micro-batch with a non-finite element (+inf for none)."""

_NEUTRAL: Final = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}
_FIRST_ROWS: Final = 64
_TIMED_FIRST: Final = 4
_TIMED_EVERY: Final = 16


# Tensors whose shape changes at every step must not fill the memory with launches.
_MOST_READY: Final = 64


class _Ready(Protocol):
    """A launch that only lacks the tensor (`foreshock.monitor.launches.Prepared`)."""

    @property
    def startable(self) -> bool:
        """Whether it can be."""
        ...

    def start(self, x: int, scale: int | None) -> None:
        """Queue it."""
        ...


@dataclass(slots=True)
class Slot:
    """One row, and what was worked out for it.

    Attributes:
        index: Of the row.
        format: Name of the format that its tensors are cast to.
        channels, exponents: Its vectors; None until they are needed.
        ready: Launches by what they depend on.
        joint: The same for tensors that are measured together with others, where they can be.
        apart: Whether one has changed while it waited for others.
        place: Layer and role.
    """

    index: int
    format: str
    channels: torch.Tensor | None = None
    exponents: torch.Tensor | None = None
    ready: dict[object, Sequence[_Ready]] = field(default_factory=dict)
    joint: dict[object, Any] = field(default_factory=dict)
    apart: bool = False
    place: tuple[str, str] = ("", "")

    def forget(self) -> None:
        """The launches no longer hold."""
        self.ready.clear()
        self.joint.clear()


@dataclass(frozen=True, slots=True)
class Known:
    """What was worked out for a tensor that waits for others, for the next one of its kind.

    Attributes:
        slot, member: Its row, and how it stands in a table.
        shape, stride, dtype: Of the tensor.
        generation: Of the rows.
    """

    slot: Slot
    member: Any
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    generation: int


class DeviceRows:
    """The rows of one collector.

    Args:
        device: A CUDA device.
        kernels: `foreshock.monitor.kernels`, loaded only where it can run.
        count_exponents: Count elements by their power of two.

    Attributes:
        generation: Counts how often what was worked out has ceased to hold.
    """

    def __init__(
        self, device: torch.device, kernels: Any, *, count_exponents: bool = False
    ) -> None:
        self._device = device
        neutral = [_NEUTRAL[how] for how in FIELD_REDUCTIONS.values()] + [torch.inf]
        self._neutral = torch.tensor(neutral, dtype=torch.float64, device=device)
        self._rows = self._neutral.repeat(_FIRST_ROWS, 1)
        self._slots: dict[Entry, Slot] = {}
        self._entries: tuple[Entry, ...] = ()
        self._count_exponents = count_exponents
        self._vectors = Arena(device)
        self._reserved = 0
        # On the device: whether launches read, and the micro-batch in progress.
        self._control = torch.zeros(2, dtype=torch.int32, device=device)
        self._flag, self._micro_batch = self._control[:1], self._control[1:]
        self._measuring = False
        self._detailed = True
        self._kernels = kernels
        self._scratch = kernels.Scratch(device)
        self._together = kernels.Together(self._scratch, self._control)
        self._lost: set[tuple[str, str]] = set()
        self.generation = 0
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

    def reserve(self, features: int = 0) -> None:
        """Make room for one more tensor, before a graph is captured with today's addresses.

        Args:
            features: Of the tensor; 0 where they are not known yet.
        """
        self._reserved += 1
        self._vectors.reserve(features + (EXPONENTS if self._count_exponents else 0))
        # Twice: a layer that changes its format, or is called again, needs another row.
        self._grow(2 * self._reserved)

    def start_step(self, *, measuring: bool, detailed: bool = True) -> None:
        """Neutral rows, micro-batch -1 and the flag, queued on the stream.

        Args:
            measuring: Whether launches read.
            detailed: Whether they take the cast's error and the channels, too.
        """
        self._together.forget()
        self._timing = False
        self._vectors.prepare()
        # Two steps off the cadence are alike: the flag is down, and nobody asks for the rest.
        if measuring or self._measuring:
            self._flag.fill_(int(measuring))
        self._measuring, self._detailed = measuring, detailed
        if measuring:
            self._micro_batch.fill_(-1)
            self._steps += 1
            # Marks cost as much as small kernels; the cost hardly changes from step to step.
            due = self._steps <= _TIMED_FIRST or self._steps % _TIMED_EVERY == 0
            self._timing = due and self._device.type == "cuda"
            self._rows.copy_(self._neutral.expand_as(self._rows))
            if detailed or self._count_exponents:
                self._vectors.zero()

    def next_micro_batch(self, *, recording: bool = False) -> None:
        """Count on, on the device: a captured graph counts at every replay."""
        self.flush(recording=recording)
        if self._measuring or recording:
            self._micro_batch.add_(1)

    def flush(self, *, recording: bool = False) -> None:
        """Measure what waits."""
        if recording:
            # It came before the capture, and is no part of the graph.
            self._together.forget()
            return
        if self._together.waits:
            mark = self._mark(recording)
            self._leave_out(self._together.flush())
            self._mark_end(mark)

    def take_lost(self) -> set[tuple[str, str]]:
        """Layer and role of tensors that changed while they waited, since the last call."""
        lost, self._lost = self._lost, set()
        return lost

    def _leave_out(self, lost: Sequence[Slot]) -> None:
        for slot in lost:
            slot.apart = True
            self._lost.add(slot.place)
        # Plans have such a tensor wait.
        self.generation += bool(lost)

    def add(
        self,
        slot: Slot,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        *,
        recording: bool = False,
        later: bool = False,
    ) -> Known | None:
        """Measure a tensor into its row.

        Args:
            slot: Of the row.
            x: Floating, of any shape and stride.
            scale: In force, or None for current scaling.
            recording: Whether a graph is being captured, whose steps are not known yet.
            later: Whether x and scale stay as they are until `flush`.

        Returns:
            For `add_known`, where the tensor waits for others.
        """
        detailed = self._detailed or recording
        address = x.data_ptr()
        place = None if scale is None else scale.data_ptr()
        # What Triton compiles for: types, and which addresses are multiples of 16 bytes.
        aligned = (address % 16, None if place is None else place % 16)
        key = (x.shape, x.stride(), x.dtype, aligned, detailed)
        if later and not recording and not slot.apart:
            member = slot.joint.get(key)
            if member is not None:
                if lost := self._together.add(member, x, address, scale, slot):
                    self._leave_out(lost)
                return Known(slot, member, x.shape, x.stride(), x.dtype, self.generation)
        found = slot.ready.get(key)
        mark = self._mark(recording)
        if found is not None:
            for launch in found:
                launch.start(address, place)
        else:
            self._keep(slot, key, self._measure(slot, x, scale, detailed), x, scale)
        self._mark_end(mark)
        return None

    def add_known(self, known: Known, x: torch.Tensor, scale: torch.Tensor | None) -> bool:
        """The same for a tensor or codes that wait, are plain and not measured in detail.

        Returns:
            False, and nothing is done, for another kind of tensor than before.
        """
        address = x.data_ptr()
        if (
            address & 15
            or x.shape != known.shape
            or x.stride() != known.stride
            or x.dtype is not known.dtype
            or known.generation != self.generation
            or known.slot.apart
        ):
            return False
        if lost := self._together.add(known.member, x, address, scale, known.slot):
            self._leave_out(lost)
        return True

    def group(self, known: Sequence[Known]) -> Group:
        """Tensors that will always come together; see `add_group`."""
        group: Group = self._together.group([k.member for k in known], [k.slot for k in known])
        return group

    def add_group(
        self,
        group: Group,
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int],
        scales: Sequence[torch.Tensor | None],
    ) -> None:
        """The same for several, of which the caller has looked at everything already."""
        if lost := self._together.add_all(group, tensors, addresses, scales):
            self._leave_out(lost)

    def _measure(
        self, slot: Slot, x: torch.Tensor, scale: torch.Tensor | None, detailed: bool
    ) -> Sequence[_Ready]:
        channels = None
        if detailed:
            features = x.shape[-1] if x.ndim else 1
            if slot.channels is None or len(slot.channels) != features:
                # What is ready adds to the vector of before.
                slot.forget()
                self.generation += 1
                slot.channels = self._vectors.take(features)
            channels = slot.channels
        if self._count_exponents and slot.exponents is None:
            slot.exponents = self._vectors.take(EXPONENTS)
        started: Sequence[_Ready] = self._kernels.accumulate(
            x.detach(),
            self._rows,
            slot.index,
            format=slot.format,
            scale=None if scale is None else scale.detach(),
            control=self._control,
            scratch=self._scratch,
            channels=channels,
            histogram=slot.exponents,
            sqnr=detailed and format_named(slot.format).scaled,
        )
        return started

    def add_codes(
        self,
        slot: Slot,
        codes: torch.Tensor,
        scale_inv: torch.Tensor,
        *,
        recording: bool = False,
        later: bool = False,
    ) -> Known | None:
        """Measure FP8 codes into their row; the rest as for `add`."""
        address, place = codes.data_ptr(), scale_inv.data_ptr()
        key = (codes.shape, codes.stride(), codes.dtype, (address % 16, place % 16))
        if later and not recording and not slot.apart:
            member = slot.joint.get(key)
            if member is not None:
                if lost := self._together.add(member, codes, address, scale_inv, slot):
                    self._leave_out(lost)
                shape, stride = codes.shape, codes.stride()
                return Known(slot, member, shape, stride, codes.dtype, self.generation)
        found = slot.ready.get(key)
        mark = self._mark(recording)
        if found is not None:
            for launch in found:
                launch.start(address, place)
        else:
            started = self._kernels.accumulate_codes(
                codes,
                self._rows,
                slot.index,
                format=slot.format,
                scale_inv=scale_inv,
                control=self._control,
                scratch=self._scratch,
            )
            self._keep(slot, key, started, codes, scale_inv)
        self._mark_end(mark)
        return None

    def _keep(
        self,
        slot: Slot,
        key: object,
        started: Sequence[_Ready],
        x: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> None:
        if started and max(len(slot.ready), len(slot.joint)) < _MOST_READY:
            if all(launch.startable for launch in started):
                slot.ready[key] = started
            member = self._kernels.joint(started, x, format=slot.format, scale=scale)
            if member is not None:
                slot.joint[key] = member

    def take_marks(self) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        """Marks around the kernels since the last call, at a step whose cost is measured."""
        marks, self._marks = self._marks, []
        return marks

    def _mark(self, recording: bool) -> torch.cuda.Event | None:
        if not self._timing or recording:
            return None
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        return start

    def _mark_end(self, start: torch.cuda.Event | None) -> None:
        if start is not None:
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end.record()
            self._marks.append((start, end))

    def take(
        self,
    ) -> tuple[tuple[Entry, ...], torch.Tensor | None, list[tuple[Entry, torch.Tensor]]]:
        """Entries, copies of their rows, and copies of their channel sums."""
        self.flush()
        if not self._slots:
            return (), None, []
        if len(self._entries) != len(self._slots):
            self._entries = tuple(self._slots)
        rows = self._rows[: len(self._entries)].clone()
        if self._detailed or self._count_exponents:
            self._vectors.copy()
        if not self._detailed:
            return self._entries, rows, []
        channels = {entry: slot.channels for entry, slot in self._slots.items()}
        return self._entries, rows, self._copies(channels)

    def histograms(self) -> list[tuple[Entry, torch.Tensor]]:
        """Entries with copies of their counts by power of two, after `take`."""
        if not self._count_exponents:
            return []
        return self._copies({entry: slot.exponents for entry, slot in self._slots.items()})

    def _copies(
        self, vectors: Mapping[Entry, torch.Tensor | None]
    ) -> list[tuple[Entry, torch.Tensor]]:
        return [
            (entry, self._vectors.copy_of(vector))
            for entry, vector in vectors.items()
            if vector is not None
        ]

    def slot(self, entry: Entry) -> Slot:
        """The row of a tensor, whose micro-batches share it."""
        known = entry if entry.micro_batch is None else replace(entry, micro_batch=None)
        slot = self._slots.get(known)
        if slot is None:
            identity = entry.identity
            place = identity.layer, identity.role
            slot = Slot(len(self._slots), identity.format, place=place)
            self._grow(slot.index + 1)
            self._slots[known] = slot
        return slot

    @property
    def bytes(self) -> int:
        """Memory on the device that the rows, their vectors and the kernels' sums take."""
        own = [self._rows, self._neutral, self._control, *self._retired]
        rows = sum(t.numel() * t.element_size() for t in own)
        kernels = int(self._scratch.bytes) + int(self._together.bytes)
        return rows + self._vectors.bytes + kernels

    def _grow(self, rows: int) -> None:
        if rows <= len(self._rows):
            return
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "more tensors in the graph than were seen before its capture; run one eager step "
                "after watch() and before capturing"
            )
        self.flush()
        wider = self._neutral.repeat(max(rows, 2 * len(self._rows)), 1)
        wider[: len(self._rows)] = self._rows
        # A graph captured earlier still writes to the old rows.
        self._retired.append(self._rows)
        self._rows = wider
        self.generation += 1
        for slot in self._slots.values():
            slot.forget()
