"""What the training thread hands to the worker after a step.

Holds no tensor but the packed copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

import torch

from foreshock.monitor.entry import Entry
from foreshock.monitor.record import Event, TensorIdentity
from foreshock.monitor.transfer import Packed

__all__ = ["Snapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One step as the training thread hands it over.

    Attributes:
        step: 0-based optimizer step.
        time: When the step ended.
        scalars: What was known on the host.
        names: Names of the values in the packed groups scalars, gradients and parameters.
        measured: Whether tensors were measured.
        entries: Of the packed group sums, one per tensor that passed by.
        history_entries: Of the packed group history, two numbers each.
        device_entries: Of the packed group device, one per row of the device's buffer.
        probe_entries: Of the packed group probes: plain sums at a step without statistics.
        channels, blocks, exponents, mus: Identity and width of the channel sums, of the histograms
            of block scales and of elements, and of mu's sum and count.
        packed: Groups scalars, losses (one per micro-batch), gradients and parameters (norms),
            sums, history, device, probes, channels, blocks, exponents, mus.
        events: Planned events and the monitor's own.
        kernels: Marks around the kernels of a step whose cost is being measured.
    """

    step: int
    time: datetime
    scalars: Mapping[str, float]
    names: Mapping[str, tuple[str, ...]]
    measured: bool
    entries: tuple[Entry, ...]
    device_entries: tuple[Entry, ...]
    probe_entries: tuple[Entry, ...]
    channels: tuple[tuple[TensorIdentity, int], ...]
    blocks: tuple[tuple[TensorIdentity, int], ...]
    exponents: tuple[tuple[TensorIdentity, int], ...]
    packed: Packed
    events: tuple[Event, ...]
    kernels: tuple[tuple[torch.cuda.Event, torch.cuda.Event], ...] = ()
    mus: tuple[tuple[TensorIdentity, int], ...] = ()
    history_entries: tuple[Entry, ...] = ()

    def emptied(self) -> Snapshot:
        """What is left of a step for which there was no room: its number."""
        return replace(
            self,
            scalars={},
            names=dict.fromkeys(self.names, ()),
            entries=(),
            history_entries=(),
            device_entries=(),
            probe_entries=(),
            channels=(),
            blocks=(),
            exponents=(),
            mus=(),
            packed=Packed(self.packed.names, (0,) * len(self.packed.names), None, None),
            events=(),
            kernels=(),
        )

    def kernel_seconds(self) -> float | None:
        """Time that the marked kernels took; None without marks. Waits for the device."""
        if not self.kernels:
            return None
        self.kernels[-1][1].synchronize()
        return float(sum(start.elapsed_time(end) for start, end in self.kernels)) / 1e3
