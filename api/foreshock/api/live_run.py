"""The live analysis of one attempt of one run: its order of records, its scorer, its newest values.

Records are scored once each, in the order of their steps, so that a risk is the same live and on
replay. Knows no thread, no queue and no store.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from foreshock.api.alert_log import AlertSubject
from foreshock.api.columns import RecordColumns, RecordReader
from foreshock.api.exposition import RunReading
from foreshock.monitor.record import Event, Risk, StatisticColumns, TensorIdentity

__all__ = ["Latest", "RunAnalysis", "Scorer"]

logger = logging.getLogger(__name__)

HOLD_SECONDS: Final = 2.0
"""How long records wait for a step missing before them."""

_RECENT: Final = 4096
_MOST_PENDING: Final = 8192


class Scorer(Protocol):
    """What scores one record after the other; `foreshock.api.scorer.LocalScorer` is one."""

    def score(
        self,
        *,
        step: int,
        scalars: Mapping[str, float],
        events: Sequence[Event] = (),
        identities: Sequence[TensorIdentity] | None = None,
        statistics: StatisticColumns | None = None,
    ) -> Risk:
        """The risk after this record."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Latest:
    """The newest answer for a run.

    Attributes:
        subject: Whose it is.
        step: Newest scored step.
        time: When it ended.
        risk: The answer.
        step_seconds: Median of the recent steps; None if not measured.
        steps_per_record: Usual distance of two records, in steps.
        safe_since: Time of the last checkpoint seen, or of the first record; what came after it is
            lost if the run diverges now.
    """

    subject: AlertSubject
    step: int
    time: datetime
    risk: Risk
    step_seconds: float | None
    steps_per_record: int
    safe_since: datetime

    @property
    def hours_at_risk(self) -> float:
        """Hours of training since `safe_since`."""
        return max((self.time - self.safe_since).total_seconds(), 0.0) / 3600.0


class RunAnalysis:
    """One attempt.

    Args:
        subject: Whose it is.
        scorer: Fresh; belongs to this object from now on.

    Attributes:
        subject: As given.
        last_step: Newest step given to the scorer; -1 before the first.
        silent_until: Steps up to here only bring the scorer to where it was; they were answered.
        behind: Whether the store holds records that are not in this object's memory.
        touched: Monotonic seconds of the last sign of life; kept by the caller.
    """

    def __init__(self, subject: AlertSubject, scorer: Scorer) -> None:
        self.subject = subject
        self.last_step = -1
        self.silent_until = -1
        self.behind = True
        self.touched = 0.0
        self._scorer = scorer
        self._reader = RecordReader()
        self._pending: pa.Table | None = None
        self._held_since: float | None = None
        self._gaps: deque[int] = deque(maxlen=16)
        self._scored: deque[int] = deque(maxlen=_RECENT)
        self._step_seconds: deque[float] = deque(maxlen=32)
        self._scalars: dict[str, float] = {}
        self._dropped, self._dropped_until = 0.0, -1
        self._with_tensors: RecordColumns | None = None
        self._safe_since: datetime | None = None
        self._latest: Latest | None = None

    @property
    def latest(self) -> Latest | None:
        """The newest answer; None until the scorer is where it was."""
        return self._latest if self.last_step >= self.silent_until else None

    @property
    def pending(self) -> int:
        """Records waiting."""
        return 0 if self._pending is None else self._pending.num_rows

    def offer(self, table: pa.Table) -> int:
        """Take records of a committed batch, in any order.

        Steps that are already scored are dropped. While the store is ahead of memory nothing is
        kept, for the store has it.

        Returns:
            How many records came too late: a later step is scored, and they are not.
        """
        steps = table["step"].to_numpy()
        new = steps > self.last_step
        late = int((~new & ~np.isin(steps, list(self._scored))).sum()) if not new.all() else 0
        if self.behind:
            return 0
        fresh = table.filter(pa.array(new)) if not new.all() else table
        held = [fresh] if self._pending is None else [self._pending, fresh]
        self._pending = pa.concat_tables(held) if fresh.num_rows else self._pending
        if self.pending > _MOST_PENDING:
            self.fall_behind()
        return late

    def fall_behind(self) -> None:
        """Forget what waits; it is to be read from the store."""
        self._pending, self._held_since, self.behind = None, None, True

    def ready(self, now: float, most: int) -> pa.Table | None:
        """Records whose turn it is: sorted, at most `most`, up to the first missing step.

        A gap wider than the run's usual distance of records is waited for, but not for ever.

        Args:
            now: Monotonic seconds.
            most: Largest number of records.
        """
        if self._pending is None:
            return None
        table = _sorted_once(self._pending)
        ready = self._count_ready(table["step"].to_numpy(), now)
        count = min(ready, most)
        self._pending = table.slice(count) if count < table.num_rows else None
        return table.slice(0, count) if count else None

    def _count_ready(self, steps: np.ndarray[Any, np.dtype[np.int64]], now: float) -> int:
        usual = max(self._gaps, default=None)
        if usual is None:
            return len(steps)
        gaps = np.diff(steps, prepend=self.last_step) > usual
        if not gaps.any():
            self._held_since = None
            return len(steps)
        first = int(gaps.argmax())
        if first > 0:
            return first
        if self._held_since is None:
            self._held_since = now
        if now - self._held_since < HOLD_SECONDS:
            return 0
        self._held_since = None
        return len(steps)

    def rewind(self, scorer: Scorer, after: int) -> None:
        """Begin anew behind a step: what was answered already is scored again, in silence.

        Args:
            scorer: Fresh.
            after: The records after this step are to come, from the store.
        """
        self._scorer = scorer
        self.silent_until = max(self.silent_until, self.last_step)
        self.last_step = after
        self.fall_behind()

    def score(self, table: pa.Table) -> Iterator[tuple[RecordColumns, Risk | None]]:
        """Score sorted records one by one; None where the scorer failed, and the run goes on.

        Args:
            table: Records of `SCHEMA` with rising steps.
        """
        for record in self._reader.read(table):
            risk = self._risk(record)
            self._remember(record)
            if risk is not None:
                self._latest = self._answer(record, risk)
            yield record, risk
        if self._with_tensors is not None:
            # A view would keep the whole batch alive.
            self._with_tensors = _detached(self._with_tensors)

    def _risk(self, record: RecordColumns) -> Risk | None:
        try:
            return self._scorer.score(
                step=record.step,
                scalars=record.scalars,
                events=record.events,
                identities=None if record.layout is None else record.layout.identities,
                statistics=record.statistics,
            )
        except Exception:
            # One record that the scorer cannot take must not end the run's analysis.
            logger.exception("run %s, step %d: scoring failed", self.subject.run, record.step)
            return None

    def _remember(self, record: RecordColumns) -> None:
        if self.last_step >= 0 and record.step > self.last_step:
            self._gaps.append(record.step - self.last_step)
        self.last_step = max(self.last_step, record.step)
        self._scored.append(record.step)
        self._scalars |= record.scalars
        if "step_seconds" in record.scalars:
            self._step_seconds.append(record.scalars["step_seconds"])
        if record.layout is not None:
            self._with_tensors = record
        if record.step > self._dropped_until:
            self._dropped += sum(_dropped(event) for event in record.events)
            self._dropped_until = record.step
        checkpoint = any(event.kind == "checkpoint" for event in record.events)
        if self._safe_since is None or checkpoint:
            self._safe_since = record.time

    def _answer(self, record: RecordColumns, risk: Risk) -> Latest:
        return Latest(
            subject=self.subject,
            step=record.step,
            time=record.time,
            risk=risk,
            step_seconds=float(np.median(self._step_seconds)) if self._step_seconds else None,
            steps_per_record=int(np.median(self._gaps)) if self._gaps else 1,
            safe_since=self._safe_since or record.time,
        )

    def reading(self) -> RunReading | None:
        """The newest values for a scrape; None before the first."""
        latest, measured = self.latest, self._with_tensors
        if latest is None:
            return None
        return RunReading(
            project=self.subject.project,
            run=self.subject.run,
            step=latest.step,
            time=latest.time.timestamp(),
            scalars=dict(self._scalars),
            risk=latest.risk,
            dropped=self._dropped,
            layout=None if measured is None else measured.layout,
            statistics=None if measured is None else measured.statistics,
        )


def _detached(record: RecordColumns) -> RecordColumns:
    statistics = record.statistics or {}
    return replace(record, statistics={name: values.copy() for name, values in statistics.items()})


def _sorted_once(table: pa.Table) -> pa.Table:
    """Sorted by step, the first of equal steps kept."""
    steps = table["step"].to_numpy()
    kept, index = np.unique(steps, return_index=True)
    if len(kept) == len(steps) and (index[1:] > index[:-1]).all():
        return table
    return table.take(pa.array(index))


def _dropped(event: Event) -> float:
    """How many records a `dropped` event speaks of: the first number of its detail, else 1."""
    if event.kind != "dropped":
        return 0.0
    words = (event.detail or "").split()
    numbers = [word for word in words if word.isdecimal()]
    return float(numbers[0]) if numbers else 1.0
