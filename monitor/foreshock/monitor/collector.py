"""Tensors of one step in, their sums out; nothing leaves the device in between.

Knows no modules, no records and no ranks. Small tensors on a CPU are measured as stacks
(`batching`), tensors on CUDA by one kernel each into preallocated rows (`device_rows`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from foreshock.monitor import ops
from foreshock.monitor.batching import BatchedSums
from foreshock.monitor.blocks import block_sums, histogram
from foreshock.monitor.device_rows import DeviceRows, Known, Slot
from foreshock.monitor.entry import Entry
from foreshock.monitor.formats import FORMATS, GRANULARITIES
from foreshock.monitor.operands import Operand
from foreshock.monitor.placement import PLAIN, WHOLE, part_of
from foreshock.monitor.record import TensorIdentity
from foreshock.monitor.sampling import Sampling
from foreshock.monitor.statistics import packed_sums

__all__ = ["Collector", "Entry", "Taken", "WhatIf", "operand_code"]

_FORMATS: Final = tuple(FORMATS)

WhatIf = Callable[[torch.Tensor, str], Sequence[tuple[str, str, torch.Tensor, torch.Tensor | None]]]
"""From a tensor and its role to rows of formats that the run does not use: format, granularity,
sums, histogram of block scales."""


def operand_code(format: str, granularity: str) -> int:
    """Format and granularity as the one number that an operation in a graph carries."""
    return _FORMATS.index(format) * len(GRANULARITIES) + GRANULARITIES.index(granularity)


def _operand(code: int, scale: torch.Tensor | None) -> Operand:
    position, granularity = divmod(code, len(GRANULARITIES))
    return Operand(_FORMATS[position], scale, GRANULARITIES[granularity])


@dataclass(slots=True)
class Taken:
    """A step's sums.

    Attributes:
        entries, sums: One row of `SUM_FIELDS` each.
        history_entries, history: Largest magnitudes and scales in force, two numbers an entry, of
            tensors of which nothing else is known.
        device_entries, device: Rows of the device buffer, with one more column; None for none.
        channels: Channel sums per identity.
        blocks: Histograms of block scales per identity.
        exponents: Histograms of elements by their power of two per identity.
        probes: Plain sums of tensors at a step without statistics, and their entries.
        mus: Factor mu and a 1 per identity: their sums give the mean.
        kernels: Marks around each kernel on the device, at a step whose cost is measured.
        stacked: Bytes of copies that waited to be measured together, at the end.
    """

    entries: list[Entry] = field(default_factory=list)
    sums: list[torch.Tensor] = field(default_factory=list)
    history_entries: list[Entry] = field(default_factory=list)
    history: list[torch.Tensor] = field(default_factory=list)
    device_entries: tuple[Entry, ...] = ()
    device: torch.Tensor | None = None
    channels: dict[TensorIdentity, torch.Tensor] = field(default_factory=dict)
    blocks: dict[TensorIdentity, torch.Tensor] = field(default_factory=dict)
    exponents: dict[TensorIdentity, torch.Tensor] = field(default_factory=dict)
    mus: dict[TensorIdentity, torch.Tensor] = field(default_factory=dict)
    probe_entries: list[Entry] = field(default_factory=list)
    probes: list[torch.Tensor] = field(default_factory=list)
    kernels: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    stacked: int = 0

    @property
    def bytes(self) -> int:
        """Memory of all of it."""
        vectors = (self.channels, self.blocks, self.exponents, self.mus)
        held = [
            *self.sums,
            *self.history,
            *self.probes,
            *(v for of in vectors for v in of.values()),
        ]
        if self.device is not None:
            held.append(self.device)
        return self.stacked + sum(x.numel() * x.element_size() for x in held)


class Collector(ops.Receiver):
    """Takes tensors while a step runs.

    Args:
        device: Where the training is.
        probe: Sum every operand at steps without statistics, so that the first non-finite value
            has a layer.
        what_if: Formats that the run does not use, measured too.
        count_exponents: Count elements by their power of two.

    Attributes:
        measuring: Whether tensors are measured in full.
        sampling: Which share of tensors and rows is measured.
        skipped: Layer and role of tensors of which nothing could be said.
        lasting: Whether scales stay as they are until `flush`, so that tensors may wait for it.
        handle: Under which a compiled graph reaches this collector.
        on_begin: Called when a training forward pass of the model begins inside a graph.
        on_loss: Called with the loss that a graph computed.
        on_flush: Called at each `flush`.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        probe: bool = True,
        what_if: WhatIf | None = None,
        count_exponents: bool = False,
    ) -> None:
        self.on_begin: Callable[[], None] = _nothing
        self.on_loss: Callable[[torch.Tensor], None] = _nothing
        self.on_flush: Callable[[], None] = _nothing
        self.measuring = False
        self.sampling = Sampling()
        self.skipped: set[tuple[str, str]] = set()
        self.lasting = False
        self.handle = ops.register(self)
        self._probe = probe
        self._what_if = what_if
        self._count_exponents = count_exponents
        self._on_cuda = device.type == "cuda"
        self._rows = DeviceRows.on(device, count_exponents=count_exponents)
        self._slots: dict[tuple[str, str, str, int, str | None, bool], Slot] = {}
        # By layer, role and call, with the operand or the codes' format: see `_wait_again`.
        self._known: dict[tuple[str, str, int], tuple[object, Known]] = {}
        self._quick = self._in_graph = False
        self._stack = BatchedSums()
        self._taken = Taken()
        self._waiting: list[Entry] = []
        self._micro_batch = -1
        self._keys: list[tuple[str, str]] = []
        self._weighed: set[str] = set()
        # Its own generator: the training's random numbers are nobody else's to draw.
        self._random = random.Random(0)

    @property
    def wants(self) -> bool:
        """Whether a tensor that passes by now would be looked at."""
        return self.measuring or self._probe or self.recording

    @property
    def recording(self) -> bool:
        """Whether a CUDA graph is being captured: its kernels will run at steps yet unknown."""
        return self._on_cuda and torch.cuda.is_current_stream_capturing()

    @property
    def micro_batch(self) -> int:
        """0-based micro-batch in progress."""
        return max(self._micro_batch, 0)

    def key(self, layer: str, role: str, features: int = 0) -> int:
        """The number of a tensor for `receive`; asked at attach, before anything is traced.

        Args:
            layer: Its name.
            role: Of the tensor.
            features: Of the tensor; 0 where they are not known.
        """
        self._keys.append((layer, role))
        if self._rows is not None:
            self._rows.reserve(features)
        return len(self._keys) - 1

    def receive(self, x: torch.Tensor, scale: torch.Tensor | None, key: int, code: int) -> None:
        """Take a tensor from inside a compiled graph; code -1 is the loss."""
        if code < 0:
            self.on_loss(x)
            return
        if not self.wants:
            return
        layer, role = self._keys[key]
        if role == "weight" and not self.weighs(layer):
            return
        # What a compiled graph made may be its own memory, which nobody else may keep.
        self._in_graph = True
        try:
            self.observe(layer, role, x, _operand(code, scale))
        finally:
            self._in_graph = False

    def weighs(self, layer: str) -> bool:
        """Whether the layer's weight is still to be measured in this step; asked once."""
        if not (self.measuring or self.recording) or layer in self._weighed:
            return self.recording
        self._weighed.add(layer)
        return True

    def still_weighs(self, layer: str) -> bool:
        """The same, asked without saying that it will be."""
        return layer not in self._weighed

    def begin(self) -> None:
        """A training forward pass of the model begins inside a graph."""
        self.on_begin()
        self.start_micro_batch()

    def start_micro_batch(self) -> None:
        """A training forward pass of the model begins."""
        self._micro_batch += 1
        if self._rows is not None:
            self._rows.next_micro_batch(recording=self.recording)

    def start_step(self, *, measuring: bool, detailed: bool = True) -> None:
        """Begin the next step, after `take`.

        Args:
            measuring: Whether tensors are measured.
            detailed: Whether errors of casts and channels are, too; on a CPU they always are.
        """
        self.measuring = measuring
        self._quick = measuring and not detailed and self.sampling.whole and self._what_if is None
        self.lasting = False
        self._micro_batch = -1
        self._weighed = set()
        if self._rows is not None:
            self._rows.start_step(measuring=measuring, detailed=detailed)

    def stop(self) -> None:
        """Look at nothing more, whatever still calls."""
        self._probe = False
        self.start_step(measuring=False)

    def observe(
        self,
        layer: str,
        role: str,
        x: torch.Tensor,
        operand: Operand,
        *,
        call_index: int = 0,
        source: str | None = None,
        mu: torch.Tensor | None = None,
    ) -> None:
        """Measure a tensor; its value now is what counts.

        Raises:
            ValueError: As `packed_sums`.
        """
        if self.lasting and self._wait_again((layer, role, call_index), operand, x, operand.scale):
            return
        if mu is not None and self.measuring:
            self._note_mu(layer, role, operand, call_index, mu)
        if self._add_to_slot(layer, role, x, operand, call_index, source):
            return
        held = part_of(x)
        if held is None:
            self.skipped.add((layer, role))
            return
        local, part = held
        part = operand.part or part
        identity = TensorIdentity(
            layer, role, operand.format, call_index, granularity=operand.granularity
        )
        entry = Entry(identity, self.micro_batch, part, source, agreed=operand.agreed)
        if self.measuring or self.recording:
            sample = self.sampling.of(local, self._random)
            if sample is not None:
                self._measure(entry, sample, operand)
        elif self._probe:
            self._probe_sum(entry, local)

    def room(self, *, lasting: bool) -> DeviceRows | None:
        """Rows in which whole plain tensors may wait now, as ones like them did before.

        Args:
            lasting: Whether they and their scales stay as they are until `flush`.
        """
        return self._rows if lasting and self._quick and not self._in_graph else None

    def known(self, layer: str, role: str, how: object) -> Known | None:
        """What was worked out for a tensor that has waited.

        Args:
            layer: Its name.
            role: Of the tensor, in the first call of the layer.
            how: The operand, or the codes' format, that it came with.
        """
        found = self._known.get((layer, role, 0))
        if found is None or found[0] is not how or self._rows is None:
            return None
        _, known = found
        return None if known.slot.apart or known.generation != self._rows.generation else known

    def _wait_again(
        self,
        place: tuple[str, str, int],
        how: object,
        x: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> bool:
        """The shortest way: a tensor that is like the last one at its place, and may wait."""
        if not self._quick or self._in_graph:
            return False
        found = self._known.get(place)
        if found is None or found[0] is not how or type(x) not in PLAIN or self._rows is None:
            return False
        return self._rows.add_known(found[1], x, scale)

    def _note_mu(
        self, layer: str, role: str, operand: Operand, call_index: int, mu: torch.Tensor
    ) -> None:
        identity = TensorIdentity(
            layer, role, operand.format, call_index, granularity=operand.granularity
        )
        factor = mu.detach().double().reshape(())
        _add(self._taken.mus, identity, torch.stack([factor, torch.ones_like(factor)]))

    def _add_to_slot(
        self,
        layer: str,
        role: str,
        x: torch.Tensor,
        operand: Operand,
        call_index: int,
        source: str | None,
    ) -> bool:
        """The short way of a whole tensor on a device, whose row is known after the first time."""
        if (
            self._rows is None
            or self._what_if is not None
            or operand.granularity != "tensor"
            or operand.part is not None
            or type(x) not in PLAIN
            or not self.sampling.whole
            or not x.is_floating_point()
            or x.layout is not torch.strided
        ):
            return False
        recording = self.recording
        if not (self.measuring or recording):
            return False
        key = (layer, role, operand.format, call_index, source, operand.agreed)
        slot = self._slots.get(key)
        if slot is None:
            identity = TensorIdentity(layer, role, operand.format, call_index)
            entry = Entry(identity, None, WHOLE, source, agreed=operand.agreed)
            slot = self._slots[key] = self._rows.slot(entry)
        # Without a scale there is none that could change.
        later = self.lasting or (operand.scale is None and not x.is_inference())
        later = later and not self._in_graph
        known = self._rows.add(slot, x, operand.scale, recording=recording, later=later)
        if known is not None and source is None:
            self._known[layer, role, call_index] = operand, known
        return True

    def flush(self) -> None:
        """Measure what waits to be measured together."""
        self.on_flush()
        if self._rows is not None:
            self._rows.flush(recording=self.recording)

    def observe_history(self, entries: Sequence[Entry], kept: torch.Tensor) -> None:
        """Take largest magnitude and scale in force of tensors, in turn; on the device."""
        if self.measuring:
            self._taken.history_entries += entries
            self._taken.history.append(kept)

    def observe_codes(
        self,
        layer: str,
        role: str,
        codes: torch.Tensor,
        *,
        format: str,
        scale_inv: torch.Tensor,
        call_index: int = 0,
    ) -> None:
        """Measure FP8 codes, one byte an element; the tensor they stand for is code x scale_inv."""
        if self.lasting and self._wait_again((layer, role, call_index), format, codes, scale_inv):
            return
        recording = self.recording
        if not (self.measuring or recording):
            return
        if self._rows is None:
            self.skipped.add((layer, role))
            return
        key = (layer, role, format, call_index, "codes", False)
        slot = self._slots.get(key)
        if slot is None:
            identity = TensorIdentity(layer, role, format, call_index)
            slot = self._slots[key] = self._rows.slot(Entry(identity, None, WHOLE, "codes"))
        known = self._rows.add_codes(
            slot, codes, scale_inv, recording=recording, later=self.lasting
        )
        if known is not None:
            self._known[layer, role, call_index] = format, known

    def take(self) -> Taken:
        """What passed by during the step."""
        taken, self._taken = self._taken, Taken()
        taken.stacked = self._stack.bytes
        waiting, self._waiting = self._waiting, []
        for entry, (sums, channels) in zip(waiting, self._stack.take(), strict=True):
            taken.entries.append(entry)
            taken.sums.append(sums)
            _add_channels(taken.channels, entry, channels)
        if self._rows is not None and self.measuring:
            taken.device_entries, taken.device, channels_of = self._rows.take()
            for entry, channels in channels_of:
                _add_channels(taken.channels, entry, channels)
            for entry, counts in self._rows.histograms():
                _add(taken.exponents, entry.identity, counts)
            taken.kernels = self._rows.take_marks()
            self.skipped |= self._rows.take_lost()
        return taken

    def bytes_of(self, taken: Taken) -> int:
        """Memory that a step's sums, and all that is kept from step to step, take."""
        return taken.bytes + (0 if self._rows is None else self._rows.bytes)

    def _measure(self, entry: Entry, x: torch.Tensor, operand: Operand) -> None:
        if operand.granularity != "tensor":
            self._measure_blocks(entry, x, operand)
        elif self._rows is not None:
            self._rows.add(self._rows.slot(entry), x, operand.scale, recording=self.recording)
        elif self.recording:
            self.skipped.add((entry.identity.layer, entry.identity.role))
            return
        else:
            self._stack.add(x, operand)
            self._waiting.append(entry)
        if self._count_exponents and (self._rows is None or operand.granularity != "tensor"):
            _add(self._taken.exponents, entry.identity, histogram(x))
        if self._what_if is not None:
            self._measure_what_if(entry, x)

    def _measure_blocks(self, entry: Entry, x: torch.Tensor, operand: Operand) -> None:
        row, scales = block_sums(
            x,
            format=operand.format,
            granularity=operand.granularity,
            weight=entry.identity.role == "weight",
        )
        self._taken.entries.append(entry)
        self._taken.sums.append(row)
        _add(self._taken.blocks, entry.identity, scales)
        channels = packed_sums(x, format="fp32", scale=None)[1]
        _add_channels(self._taken.channels, entry, channels)

    def _measure_what_if(self, entry: Entry, x: torch.Tensor) -> None:
        assert self._what_if is not None
        for format, granularity, row, scales in self._what_if(x, entry.identity.role):
            identity = replace(entry.identity, format=format, granularity=granularity, what_if=True)
            self._taken.entries.append(replace(entry, identity=identity, source=None))
            self._taken.sums.append(row)
            if scales is not None:
                _add(self._taken.blocks, identity, scales)

    def _probe_sum(self, entry: Entry, x: torch.Tensor) -> None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self._taken.probe_entries.append(entry)
        self._taken.probes.append(x.detach().sum(dtype=wide))


def _nothing(*_: object) -> None:
    """Nobody listens."""


def _add(
    sums: dict[TensorIdentity, torch.Tensor], identity: TensorIdentity, more: torch.Tensor
) -> None:
    so_far = sums.get(identity)
    sums[identity] = more if so_far is None else so_far + more


def _add_channels(
    sums: dict[TensorIdentity, torch.Tensor], entry: Entry, channels: torch.Tensor
) -> None:
    """Channel sums per identity: what they are merged into does not grow with micro-batches.

    A piece that holds some of the features stands at its place among all of them, so that adding
    over processes concatenates.
    """
    if entry.part.features is not None:
        whole = channels.new_zeros(entry.part.features)
        whole[entry.part.offset : entry.part.offset + len(channels)] = channels
        channels = whole
    _add(sums, entry.identity, channels)
