"""A step in progress, and what of it the worker gets.

Runs in the training thread; queues device work and reads no value.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import torch

from foreshock.monitor.collector import Taken
from foreshock.monitor.record import Event
from foreshock.monitor.scalars import Value, mean
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.transfer import pack

__all__ = ["Step", "closing_events", "snapshot_of"]


@dataclass(slots=True)
class Step:
    """A step in progress, or one that has ended and waits for late `log` calls."""

    number: int
    measured: bool
    losses: list[torch.Tensor] = field(default_factory=list)
    logged: dict[str, list[Value]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    scalars: dict[str, Value] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    taken: Taken = field(default_factory=Taken)
    time: datetime | None = None


def snapshot_of(step: Step, device: torch.device) -> Snapshot:
    """The step as the worker gets it; its copy to the host starts here.

    Raises:
        ValueError: The step has not ended.
    """
    if step.time is None:
        raise ValueError(f"step {step.number} has not ended")
    scalars = step.scalars | {name: mean(values) for name, values in step.logged.items()}
    tensors = {k: v for k, v in scalars.items() if isinstance(v, torch.Tensor)}
    taken = step.taken
    groups: dict[str, Sequence[torch.Tensor]] = {
        "scalars": list(tensors.values()),
        "losses": step.losses,
        "gradients": list(step.gradients.values()),
        "parameters": list(step.parameters.values()),
        "sums": taken.sums,
        "device": [] if taken.device is None else [taken.device],
        "probes": taken.probes,
        "channels": list(taken.channels.values()),
        "blocks": list(taken.blocks.values()),
        "exponents": list(taken.exponents.values()),
    }
    return Snapshot(
        step=step.number,
        time=step.time,
        scalars={k: float(v) for k, v in scalars.items() if k not in tensors},
        names={
            "scalars": tuple(tensors),
            "gradients": tuple(step.gradients),
            "parameters": tuple(step.parameters),
        },
        measured=step.measured,
        entries=tuple(taken.entries),
        device_entries=taken.device_entries,
        probe_entries=tuple(taken.probe_entries),
        channels=tuple((identity, c.numel()) for identity, c in taken.channels.items()),
        blocks=tuple((identity, b.numel()) for identity, b in taken.blocks.items()),
        exponents=tuple((identity, e.numel()) for identity, e in taken.exponents.items()),
        packed=pack(groups, device),
        events=tuple(step.events),
        kernels=tuple(taken.kernels),
    )


def closing_events(rank: int) -> list[Event]:
    """What the last record of a launch says: that it came to its end, unless it dies of an error.

    Args:
        rank: Of this process.
    """
    # At exit, Python still holds what ended the program.
    failing = sys.exc_info()[0] is not None or getattr(sys, "last_type", None) is not None
    return [] if failing else [Event("end", rank=rank)]
