"""Reports of one launch until their step's record has come. Pure; knows no clock and no disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from foreshock.monitor.record import Event, StepReport
from foreshock.monitor.record.reports import MOST_EVENTS, join

__all__ = ["Addition", "Gathering"]


@dataclass(frozen=True, slots=True)
class Addition:
    """What is known beside the record of a step.

    Attributes:
        report: Of the step's ranks, or None when nobody reported in time.
        late: Events of steps whose records had gone on, each with its step in the detail.
        newly_silent: Ranks that reported at the step before and did not at this one, one bit each.
    """

    report: StepReport | None
    late: tuple[Event, ...] = ()
    newly_silent: int = 0


class Gathering:
    """Joins reports by step; bounded.

    Args:
        most_steps: Steps for which reports wait; the lowest without an event goes first.

    Attributes:
        late: Rank-steps that came after their record had gone on.
        dropped: Rank-steps given up for want of room, or because their step never had a record.
        events_lost: Late events given up for want of room.
    """

    def __init__(self, most_steps: int) -> None:
        self._most = most_steps
        self._pending: dict[int, StepReport] = {}
        self._closed = -1
        self._carried: list[Event] = []
        self._present = 0
        self.late = 0
        self.dropped = 0
        self.events_lost = 0

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, report: StepReport) -> None:
        """Take a report; one that comes twice changes nothing."""
        if report.step <= self._closed:
            self.late += report.ranks.bit_count()
            self._carry(report)
            return
        known = self._pending.get(report.step)
        self._pending[report.step] = report if known is None else join(known, report)
        if len(self._pending) > self._most:
            self._give_up(min(self._pending, key=self._worth))

    def ranks_at(self, step: int) -> int:
        """How many ranks have reported a step."""
        report = self._pending.get(step)
        return 0 if report is None else report.ranks.bit_count()

    def close(self, step: int) -> Addition:
        """What is known of a step whose record goes on now.

        Records come in the order of their steps. A step back, after a rollback, opens the later
        ones again.
        """
        for earlier in [known for known in self._pending if known < step]:
            self._give_up(earlier)
        report = self._pending.pop(step, None)
        self._closed = step
        present = 0 if report is None else report.ranks
        newly_silent, self._present = self._present & ~present, present
        late, self._carried = tuple(self._carried), []
        return Addition(report, late, newly_silent)

    def take(self, most: int) -> list[StepReport]:
        """Remove and return what waits, the lowest steps first; for the next relay."""
        steps = sorted(self._pending)[:most]
        return [self._pending.pop(step) for step in steps]

    def put_back(self, reports: Iterable[StepReport]) -> None:
        """Keep what the next relay did not take."""
        for report in reports:
            self.add(report)

    def _worth(self, step: int) -> tuple[bool, int]:
        return bool(self._pending[step].events), step

    def _give_up(self, step: int) -> None:
        report = self._pending.pop(step)
        self.dropped += report.ranks.bit_count()
        self._carry(report)

    def _carry(self, report: StepReport) -> None:
        for event in report.events.values():
            detail = f"at step {report.step}, told late"
            if event.detail:
                detail += f": {event.detail}"
            late = replace(event, detail=detail)
            # A report may come twice.
            if late in self._carried:
                continue
            if len(self._carried) >= MOST_EVENTS:
                self.events_lost += 1
            else:
                self._carried.append(late)
