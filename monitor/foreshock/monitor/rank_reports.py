"""What this rank tells a relay about a step.

Made in the worker thread from numbers that are on the host already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Self

import numpy as np
import torch

from foreshock.monitor.record import Event, Held, Place, StepReport
from foreshock.monitor.record.reports import event_key
from foreshock.monitor.reduction import RankStep
from foreshock.monitor.report_sender import ReportSender
from foreshock.monitor.settings import WatchSettings
from foreshock.monitor.table import FIELDS, SumTable

__all__ = ["Reporter", "report_of"]

_MOST: Final = 4
_AMAX: Final = FIELDS.index("amax")
_HEADROOM: Final = FIELDS.index("headroom_log2")


class Reporter:
    """Makes this rank's reports and queues them.

    Of rank 0, whose extremes and events stand in the record, only the health is told.

    Args:
        sender: Takes them.
        rank: Global rank.
        device: Where this process trains.
        errors: Failures of the monitor so far.
    """

    def __init__(
        self, sender: ReportSender, *, rank: int, device: torch.device, errors: Callable[[], int]
    ) -> None:
        self._sender = sender
        self._rank = rank
        self._device = device
        self._errors = errors

    @classmethod
    def of(
        cls, settings: WatchSettings, rank: int, device: torch.device, errors: Callable[[], int]
    ) -> Self | None:
        """As a watch is told; None where it names no relay."""
        if settings.collect is None:
            return None
        sender = ReportSender(
            settings.collect, run=settings.run, launch_id=settings.launch_id, token=settings.token
        )
        return cls(sender, rank=rank, device=device, errors=errors)

    def close(self, timeout: float) -> bool:
        """Send what is left for at most `timeout` seconds; True if nothing is left."""
        return self._sender.close(timeout)

    def take(self, step: RankStep, events: Sequence[Event]) -> None:
        """One step of this process; never raises."""
        with self._sender.guard:
            emits = self._rank == 0
            report = report_of(
                step.step,
                self._rank,
                table=None if emits else step.table,
                events=() if emits else events,
                health={
                    "step_seconds": step.scalars.get("step_seconds"),
                    "overhead_ratio": step.scalars.get("overhead_ratio"),
                    "errors": self._errors(),
                    "dropped": self._sender.dropped,
                    "device_bytes": self._bytes(),
                },
                broken=step.broken,
            )
            self._sender.submit(report)

    def _bytes(self) -> int | None:
        # The allocator's own count on the host: nothing waits for the device.
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else None


def report_of(
    step: int,
    rank: int,
    *,
    table: SumTable | None = None,
    events: Sequence[Event] = (),
    health: Mapping[str, float | None],
    broken: bool = False,
) -> StepReport:
    """One rank's report.

    Args:
        step: 0-based optimizer step.
        rank: Global rank.
        table: Its sums; the tensors of the largest magnitude and of the least headroom are told,
            four of each. None at a step without.
        events: What happened on this rank.
        health: step_seconds, overhead_ratio, errors, dropped, device_bytes; what is None or no
            number is not told.
        broken: Whether it met a non-finite value.

    Raises:
        ReportError: A value is not allowed.
    """
    mine = 1 << rank
    return StepReport(
        step=step,
        ranks=mine,
        broken=mine if broken else 0,
        largest={} if table is None else _places(table, rank, _AMAX, sign=-1),
        tightest={} if table is None else _places(table, rank, _HEADROOM, sign=1),
        events={event_key(event): event for event in events},
        health=dict(_health(health, rank)),
    )


def _health(values: Mapping[str, float | None], rank: int) -> Iterable[tuple[str, Held]]:
    for name, value in values.items():
        # A count of nothing is no news, and what is not told costs nothing.
        if value is None or not math.isfinite(value) or value == 0:
            continue
        # Six digits: more than a duration is worth, and half the characters.
        held = Held(float(f"{value:.6g}"), rank)
        yield f"{name}_max", held
        if name == "step_seconds":
            yield f"{name}_min", held


def _places(table: SumTable, rank: int, column: int, *, sign: int) -> dict[Place, Held]:
    # As a record has it; shorter as text too.
    with np.errstate(over="ignore"):
        values = table.values[:, column].astype(np.float32)
    rows = np.argsort(sign * values, kind="stable")
    found: dict[Place, Held] = {}
    for row in rows:
        identity = table.entries[row].identity
        if identity.what_if or not np.isfinite(values[row]):
            continue
        expert = -1 if identity.expert is None else identity.expert
        place = Place(identity.layer, identity.role, identity.call_index, expert)
        # The shortest text that reads as this float32.
        found.setdefault(place, Held(float(str(values[row])), rank))
        if len(found) == _MOST:
            break
    return found
