"""A step in progress, and what of it the worker gets.

Runs in the training thread; queues device work and reads no value.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import torch

from foreshock.monitor.collector import Taken
from foreshock.monitor.record import Event
from foreshock.monitor.scalars import Norms, Value, mean
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.transfer import pack

__all__ = ["Losses", "Step", "closing_events", "planned_event", "snapshot_of"]


# Far more than the micro-batches of two steps.
_KEPT: Final = 4096


class Losses:
    """The losses of a step, one per micro-batch, as copies: the loop may divide them in place.

    What is newly allocated while torch.compile warms up or captures a CUDA graph is the graph's own
    and must not be held, so on a device the places are made at once. A place is used again after
    4,096 losses.

    Args:
        device: Where the training is.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        self._places = torch.zeros(2 * _KEPT if on_cuda else 0, dtype=torch.float32, device=device)
        self._next = 0
        self._came: list[torch.Tensor] = []
        # A replay computes them anew at the same places, and tells nobody.
        self._captured: list[torch.Tensor] = []

    def came(self, loss: torch.Tensor) -> None:
        """Keep a loss."""
        if not loss.is_cuda:
            self._came.append(loss.detach().clone())
        elif torch.cuda.is_current_stream_capturing():
            place = self._places[_KEPT + len(self._captured) % _KEPT]
            self._captured.append(place.copy_(loss.detach()))
        else:
            self._came.append(self._places[self._next].copy_(loss.detach()))
            self._next = (self._next + 1) % _KEPT

    def take(self) -> list[torch.Tensor]:
        """Those of the step that has ended."""
        came, self._came = self._came, []
        return came or [loss.clone() for loss in self._captured]


@dataclass(slots=True)
class Step:
    """A step in progress, or one that has ended and waits for late `log` calls."""

    number: int
    measured: bool
    detailed: bool = True
    losses: list[torch.Tensor] = field(default_factory=list)
    logged: dict[str, list[Value]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    scalars: dict[str, Value] = field(default_factory=dict)
    gradients: Norms = field(default_factory=Norms)
    parameters: Norms = field(default_factory=Norms)
    taken: Taken = field(default_factory=Taken)
    time: datetime | None = None

    @property
    def nothing_ran(self) -> bool:
        """Whether tensors were to be measured and gradients came, but no layer was seen."""
        seen = self.taken.entries or self.taken.history_entries or self.taken.device_entries
        return self.measured and bool(self.gradients.names) and not seen


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
        "gradients": step.gradients.vectors,
        "parameters": step.parameters.vectors,
        "sums": taken.sums,
        "history": taken.history,
        "device": [] if taken.device is None else [taken.device],
        "probes": taken.probes,
        "channels": list(taken.channels.values()),
        "blocks": list(taken.blocks.values()),
        "exponents": list(taken.exponents.values()),
        "mus": list(taken.mus.values()),
    }
    return Snapshot(
        step=step.number,
        time=step.time,
        scalars={k: float(v) for k, v in scalars.items() if k not in tensors},
        names={
            "scalars": tuple(tensors),
            "gradients": step.gradients.names,
            "parameters": step.parameters.names,
        },
        measured=step.measured,
        entries=tuple(taken.entries),
        history_entries=tuple(taken.history_entries),
        device_entries=taken.device_entries,
        probe_entries=tuple(taken.probe_entries),
        channels=tuple((identity, c.numel()) for identity, c in taken.channels.items()),
        blocks=tuple((identity, b.numel()) for identity, b in taken.blocks.items()),
        exponents=tuple((identity, e.numel()) for identity, e in taken.exponents.items()),
        mus=tuple((identity, m.numel()) for identity, m in taken.mus.items()),
        packed=pack(groups, device),
        events=tuple(step.events),
        kernels=tuple(taken.kernels),
    )


def planned_event(
    kind: str, detail: object, *, layer: str | None, role: str | None, rank: int
) -> Event:
    """What somebody tells of their own training.

    Raises:
        TypeError: kind, layer or role is no text.
    """
    for name, value in (("kind", kind), ("layer", layer or ""), ("role", role or "")):
        if not isinstance(value, str):
            raise TypeError(f"event({name}={value!r}); allowed: text")
    text = None if detail is None else str(detail)
    return Event(kind, layer=layer, role=role, rank=rank, detail=text)


def closing_events(rank: int) -> list[Event]:
    """What the last record of a launch says: that it came to its end, unless it dies of an error.

    Args:
        rank: Of this process.
    """
    # At exit, Python still holds what ended the program.
    failing = sys.exc_info()[0] is not None or getattr(sys, "last_type", None) is not None
    return [] if failing else [Event("end", rank=rank)]
