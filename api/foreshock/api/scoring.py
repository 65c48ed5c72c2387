"""Scores records of many runs at once: one state per attempt, in whatever process it stands.

The work that a scoring worker does, without the worker. Knows no store, no queue and no alert.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import pyarrow as pa

from foreshock.api.scoring_records import KnownLayout, ScoringRecord, scoring_records
from foreshock.monitor.record import Event, Risk

if TYPE_CHECKING:
    from foreshock.api.artifact import Artifact

__all__ = [
    "Newest",
    "RunKey",
    "Scored",
    "Scorer",
    "ScoringDesk",
    "ScoringTask",
    "ShippedScorers",
    "Snapshot",
]

logger = logging.getLogger(__name__)

SNAPSHOT_RECORDS: Final = 32
"""A run's state leaves the process it is in after so many records; what came since is scored again
after a crash."""

RunKey = tuple[str, int]
"""run_id and attempt."""


class Scorer(Protocol):
    """What scores one record after the other; `foreshock.api.scorer.LocalScorer` is one."""

    def score_record(self, record: ScoringRecord) -> Risk:
        """The risk after this record."""
        ...

    @property
    def state(self) -> Any:
        """All that it learned from the records so far; can be pickled, and holds no model."""
        ...

    @state.setter
    def state(self, state: Any) -> None: ...


class ShippedScorers:
    """Makes scorers with the shipped model, which each process loads once.

    scikit-learn and skops come with it: more than half of what a service would load before it
    listens, and only a process that scores needs them.

    Args:
        threshold_factor: Of the model's alarm threshold.
    """

    def __init__(self, threshold_factor: float = 1.0) -> None:
        self._factor = threshold_factor

    @cached_property
    def model(self) -> Artifact | None:
        """The model; None if none is installed."""
        from foreshock.api.artifact import load_shipped

        return load_shipped()

    def __call__(self) -> Scorer:
        """A fresh scorer."""
        from foreshock.api.scorer import LocalScorer

        return LocalScorer(self.model, threshold_factor=self._factor)

    def __reduce__(self) -> tuple[type[ShippedScorers], tuple[float]]:
        # The model stays where it is: the other process reads its own.
        return ShippedScorers, (self._factor,)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's state behind a step.

    Attributes:
        step: The newest step that is in it.
        state: For `ScoringTask.state`; only this package's own processes may read it.
    """

    step: int
    state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringTask:
    """One attempt's share of what is to be scored.

    Attributes:
        key: The attempt.
        table: Its next records, of `SCHEMA`, with rising steps.
        silent_until: Records up to this step were answered already: they only move the state on.
        fresh: Begin anew, from `state` if there is one.
        state: See `Snapshot`.
    """

    key: RunKey
    table: pa.Table
    silent_until: int = -1
    fresh: bool = False
    state: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Newest:
    """The newest of an attempt.

    Attributes:
        step: Newest scored step.
        time: When it ended.
        risk: The answer.
        scalars: Newest value of each scalar.
        dropped: Records its monitor said it dropped.
        step_seconds: Median of the recent steps; None if not measured.
        steps_per_record: Usual distance of two records, in steps.
        safe_since: Time of the last checkpoint seen, or of the first record.
        checkpoint: Time of the last checkpoint seen; None if there was none.
    """

    step: int
    time: datetime
    risk: Risk
    scalars: dict[str, float]
    dropped: float
    step_seconds: float | None
    steps_per_record: int
    safe_since: datetime
    checkpoint: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What became of a task.

    Attributes:
        key: Its attempt.
        risks: Time and risk of each record after `silent_until` that could be scored.
        failed: Records after `silent_until` that the scorer could not take.
        newest: None before the first answer.
        seconds: Time the records took, all together.
        snapshot: The state, now and then.
    """

    key: RunKey
    risks: tuple[tuple[datetime, Risk], ...]
    failed: int
    newest: Newest | None
    seconds: float
    snapshot: Snapshot | None = None


class _RunScoring:
    """One attempt: its scorer and its newest values."""

    def __init__(self, scorer: Scorer) -> None:
        self.layout = KnownLayout()
        self.records = 0
        self._scorer = scorer
        self._last_step = -1
        self._gaps: deque[int] = deque(maxlen=16)
        self._step_seconds: deque[float] = deque(maxlen=32)
        self._scalars: dict[str, float] = {}
        self._dropped, self._dropped_until = 0.0, -1
        self._first: datetime | None = None
        self._checkpoint: datetime | None = None
        self._newest: tuple[ScoringRecord, Risk] | None = None

    def freeze(self) -> bytes:
        # The layout is large and made anew from the next record; a model is in every process.
        own = {k: v for k, v in self.__dict__.items() if k not in ("layout", "_scorer")}
        return pickle.dumps((own, self._scorer.state), pickle.HIGHEST_PROTOCOL)

    def thaw(self, state: bytes) -> None:
        # From this service's own memory; nothing from outside is ever unpickled.
        own, self._scorer.state = pickle.loads(state)
        self.__dict__.update(own)

    def score(self, record: ScoringRecord) -> Risk | None:
        """None where the scorer failed; the run goes on."""
        risk: Risk | None = None
        try:
            risk = self._scorer.score_record(record)
        except Exception:
            # One record that the scorer cannot take must not end the run's analysis.
            logger.exception("step %d: scoring failed", record.step)
        self._remember(record)
        if risk is not None:
            self._newest = (record, risk)
        return risk

    def _remember(self, record: ScoringRecord) -> None:
        self.records += 1
        if self._last_step >= 0 and record.step > self._last_step:
            self._gaps.append(record.step - self._last_step)
        self._last_step = max(self._last_step, record.step)
        self._scalars |= record.scalars
        if "step_seconds" in record.scalars:
            self._step_seconds.append(record.scalars["step_seconds"])
        if record.step > self._dropped_until:
            self._dropped += sum(_dropped(event) for event in record.events)
            self._dropped_until = record.step
        self._first = self._first or record.time
        if any(event.kind == "checkpoint" for event in record.events):
            self._checkpoint = record.time

    @property
    def newest(self) -> Newest | None:
        if self._newest is None:
            return None
        record, risk = self._newest
        return Newest(
            step=record.step,
            time=record.time,
            risk=risk,
            scalars=dict(self._scalars),
            dropped=self._dropped,
            step_seconds=float(np.median(self._step_seconds)) if self._step_seconds else None,
            steps_per_record=int(np.median(self._gaps)) if self._gaps else 1,
            safe_since=self._checkpoint or self._first or record.time,
            checkpoint=self._checkpoint,
        )


class ScoringDesk:
    """The states of many attempts.

    Args:
        new_scorer: Makes a fresh scorer for an attempt.
    """

    def __init__(self, new_scorer: Callable[[], Scorer]) -> None:
        self._new_scorer = new_scorer
        self._runs: dict[RunKey, _RunScoring] = {}

    def forget(self, key: RunKey) -> None:
        """Drop the state of an attempt."""
        self._runs.pop(key, None)

    def score(self, tasks: Sequence[ScoringTask]) -> list[Scored]:
        """Score each task's records, in order.

        Args:
            tasks: At most one per attempt. An attempt is begun with `fresh`.
        """
        runs = [self._run(task) for task in tasks]
        started = time.perf_counter()
        layouts = [
            run.layout
            for run, task in zip(runs, tasks, strict=True)
            for _ in range(task.table.num_rows)
        ]
        rows = iter(scoring_records(pa.concat_tables([t.table for t in tasks]), layouts))
        reading = (time.perf_counter() - started) / max(len(layouts), 1)
        return [
            self._scored(run, task, rows, reading) for run, task in zip(runs, tasks, strict=True)
        ]

    def _run(self, task: ScoringTask) -> _RunScoring:
        if task.fresh:
            self._runs[task.key] = _RunScoring(self._new_scorer())
            if task.state is not None:
                self._runs[task.key].thaw(task.state)
        return self._runs[task.key]

    def _scored(
        self, run: _RunScoring, task: ScoringTask, rows: Iterator[ScoringRecord], reading: float
    ) -> Scored:
        started = time.perf_counter()
        before = run.records
        risks, failed, step = [], 0, -1
        for _ in range(task.table.num_rows):
            record = next(rows)
            step = record.step
            risk = run.score(record)
            if step <= task.silent_until:
                continue
            if risk is None:
                failed += 1
            else:
                risks.append((record.time, risk))
        due = run.records // SNAPSHOT_RECORDS > before // SNAPSHOT_RECORDS
        return Scored(
            key=task.key,
            risks=tuple(risks),
            failed=failed,
            newest=run.newest,
            seconds=time.perf_counter() - started + reading * task.table.num_rows,
            snapshot=Snapshot(step, run.freeze()) if due else None,
        )


def _dropped(event: Event) -> float:
    """How many records a `dropped` event speaks of: the first number of its detail, else 1."""
    if event.kind != "dropped":
        return 0.0
    words = (event.detail or "").split()
    numbers = [word for word in words if word.isdecimal()]
    return float(numbers[0]) if numbers else 1.0
