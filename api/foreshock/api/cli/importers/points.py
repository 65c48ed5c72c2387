"""What every importer produces: points of series in the log's order, and a report of the rest.

A point is one value of one series at one step. Points become records here: a series whose step
goes back begins the next attempt, as it does in a live run; of two values at the same step the
later counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from foreshock.monitor.record import StepRecord

__all__ = [
    "ImportProblem",
    "Imported",
    "ImportedRun",
    "Moment",
    "Point",
    "Report",
    "Stage",
    "assemble",
    "clock",
    "scalar_runs",
]

_MOST_ATTEMPTS: Final = 64
_MOST_SHOWN: Final = 10
_MAX_STEP: Final = 2**63 - 1
# Logs without times get made-up ones that follow from the step, so that a repeat is the same.
_NO_CLOCK: Final = datetime(2000, 1, 1, tzinfo=UTC)


class ImportProblem(ValueError):
    """The log cannot be imported; the message is one line for a person."""


@dataclass(slots=True)
class Report:
    """What was read and what was not.

    Attributes:
        format: Name of the format.
        values: Values that became part of a record.
        repeated: Values that stood there already, the same.
        replaced: Values that another of the same series and step took the place of.
        nonfinite: Values that are NaN or infinite; they are kept.
        skipped: What was left out, by name, and how often.
        names: Names in the log to the names in the records.
        notes: Assumptions made, one line each.
    """

    format: str
    values: int = 0
    repeated: int = 0
    replaced: int = 0
    nonfinite: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "values": self.values,
            "nonfinite": self.nonfinite,
            "repeated": self.repeated,
            "replaced": self.replaced,
            "names": {ours: theirs for theirs, ours in self.names.items()},
            "left_out": {name: count for name, count in self.skipped.items() if count},
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [f"read as {self.format}: {self.values} values"]
        if self.nonfinite:
            found[0] += f", {self.nonfinite} of them not finite"
        renamed = [f"{theirs} as {ours}" for theirs, ours in self.names.items() if ours != theirs]
        if renamed:
            found.append(f"  taken: {', '.join(renamed)}")
        if self.replaced:
            found.append(f"  {self.replaced} values stood twice at a step; the later one counts")
        left_out = [(name, count) for name, count in self.skipped.most_common() if count]
        for name, count in left_out[:_MOST_SHOWN]:
            found.append(f"  left out: {name}" + (f", {count} times" if count > 1 else ""))
        if len(left_out) > _MOST_SHOWN:
            found.append(f"  left out: {len(left_out) - _MOST_SHOWN} more kinds; --json names all")
        return found + [f"  note: {note}" for note in self.notes]


@dataclass(frozen=True, slots=True)
class Point:
    """One value.

    Attributes:
        series: Name of what it is a value of.
        step: Optimizer step.
        value: Any float.
        time: When, if the log says so.
    """

    series: str
    step: int
    value: float
    time: datetime | None = None


@dataclass(slots=True)
class Moment:
    """All values of one step of one attempt."""

    values: dict[str, float] = field(default_factory=dict)
    time: datetime | None = None


Stage = dict[int, Moment]
"""One attempt: step to its values."""


@dataclass(frozen=True, slots=True)
class ImportedRun:
    """One run of a log.

    Attributes:
        name: Its name in the log; None when the log has none.
        attempts: Records of each attempt, steps rising within.
    """

    name: str | None
    attempts: tuple[tuple[StepRecord, ...], ...]


@dataclass(frozen=True, slots=True)
class Imported:
    """A whole log."""

    runs: tuple[ImportedRun, ...]
    report: Report


def assemble(points: Iterable[Point], report: Report) -> list[Stage]:
    """Attempts out of points in the log's order.

    Raises:
        ImportProblem: A step is no step, or steps go back too often to be restarts.
    """
    stages: list[Stage] = [{}]
    last: dict[str, tuple[int, float]] = {}
    for point in points:
        if not 0 <= point.step <= _MAX_STEP:
            raise ImportProblem(f"step {point.step} of {point.series}; allowed: 0 or more")
        before = last.get(point.series)
        if before is not None and point.step == before[0]:
            same = _same(point.value, before[1])
            report.repeated += same
            report.replaced += not same
        elif before is not None and point.step < before[0]:
            stages.append({})
            last.clear()
            _check_attempts(len(stages), point.series)
        last[point.series] = (point.step, point.value)
        moment = stages[-1].setdefault(point.step, Moment())
        moment.values[point.series] = point.value
        moment.time = moment.time or point.time
    values = [v for stage in stages for moment in stage.values() for v in moment.values.values()]
    report.values += len(values)
    report.nonfinite += sum(not math.isfinite(value) for value in values)
    return [stage for stage in stages if stage]


def _check_attempts(count: int, series: str) -> None:
    if count > _MOST_ATTEMPTS:
        raise ImportProblem(
            f"steps of {series} go back more than {_MOST_ATTEMPTS} times; is the step counted per"
            " epoch, or do several runs or processes write one log? Name the step with"
            " --map step=NAME, the runs with --map run=NAME, or keep the lines of one process"
        )


def _same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def clock(step: int, time: datetime | None) -> datetime:
    """The time of a record: the log's, or one made up from the step."""
    if time is not None:
        return time
    return _NO_CLOCK + timedelta(seconds=min(step, 10**10))


def scalar_runs(
    points: Mapping[str | None, Iterable[Point]], report: Report
) -> tuple[ImportedRun, ...]:
    """Runs of scalars only.

    Args:
        points: Name of the run to its points in the log's order.
        report: Counted into; keeps the names that have a value.
    """
    runs = []
    measured: set[str] = set()
    for name, found in points.items():
        stages = assemble(found, report)
        measured |= {series for stage in stages for m in stage.values() for series in m.values}
        attempts = tuple(
            tuple(
                StepRecord(
                    step=step, time=clock(step, m.time), scalars=dict(sorted(m.values.items()))
                )
                for step, m in sorted(stage.items())
            )
            for stage in stages
        )
        if attempts:
            runs.append(ImportedRun(name, attempts))
    report.names = {theirs: ours for theirs, ours in report.names.items() if ours in measured}
    return tuple(runs)
