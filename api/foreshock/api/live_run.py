"""The live analysis of one attempt of one run: the order of its records, and its newest answer.

Records are scored once each, in the order of their steps, so that a risk is the same live and on
replay. Knows no thread, no queue, no store and no scorer: those are the caller's.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.alert_log import AlertSubject
from foreshock.api.alert_model import Stakes
from foreshock.api.columns import RecordColumns, RecordReader
from foreshock.api.exposition import RunReading
from foreshock.api.scoring import Newest, RunKey, Scored, ScoringTask, Snapshot
from foreshock.monitor.record import Risk

__all__ = ["Latest", "RunAnalysis"]

HOLD_SECONDS: Final = 2.0
"""How long records wait for a step missing before them."""

_RECENT: Final = 4096
_MOST_PENDING: Final = 8192
_SMALL_BATCH: Final = 8


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
        world_size: Processes of its job, if that is known.

    Attributes:
        subject: As given.
        last_step: Newest step given to the scorer; -1 before the first.
        silent_until: Steps up to here only bring the scorer to where it was; they were answered.
        fresh: Whether the next task begins anew.
        behind: Whether the store holds records that are not in this object's memory.
        touched: Monotonic seconds of the last sign of life; kept by the caller.
        served: Monotonic seconds when it was scored last; kept by the caller.
    """

    def __init__(self, subject: AlertSubject, world_size: int | None = None) -> None:
        self.subject = subject
        self._world_size = world_size
        self.last_step = -1
        self.silent_until = -1
        self.behind = True
        self.touched = 0.0
        self.served = 0.0
        self.fresh = True
        self._snapshot: Snapshot | None = None
        self._pending: pa.Table | None = None
        self._held_since: float | None = None
        self._gaps: deque[int] = deque(maxlen=16)
        self._scored: deque[int] = deque(maxlen=_RECENT)
        self._newest: Newest | None = None
        self._measured = _Measured()

    @property
    def key(self) -> RunKey:
        """run_id and attempt."""
        return self.subject.run_id, self.subject.attempt

    @property
    def latest(self) -> Latest | None:
        """The newest answer; None until the scorer is where it was."""
        newest = self._newest
        if newest is None or newest.step < self.silent_until:
            return None
        return Latest(
            subject=self.subject,
            step=newest.step,
            time=newest.time,
            risk=newest.risk,
            step_seconds=newest.step_seconds,
            steps_per_record=newest.steps_per_record,
            safe_since=newest.safe_since,
        )

    @property
    def stakes(self) -> Stakes:
        """Time and machines, as of the newest answer."""
        latest = self.latest
        if latest is None:
            return Stakes(world_size=self._world_size)
        return Stakes(
            step_seconds=latest.step_seconds,
            hours_at_risk=latest.hours_at_risk,
            world_size=self._world_size,
        )

    @property
    def pending(self) -> int:
        """Records waiting."""
        return 0 if self._pending is None else self._pending.num_rows

    @property
    def newest(self) -> int:
        """The newest step that is scored or waits."""
        waiting = self._pending
        if waiting is None or not waiting.num_rows:
            return self.last_step
        return max(self.last_step, int(pc.max(waiting["step"]).as_py()))

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

        A gap wider than the run's usual distance of records is waited for, but not for ever: then
        the run falls behind, since what is missing may have come in at another replica and lie in
        the store.

        Args:
            now: Monotonic seconds.
            most: Largest number of records.
        """
        if self._pending is None:
            return None
        table = _sorted_once(self._pending)
        count = min(self._count_ready(table["step"].to_numpy(), now), most)
        if self.behind:
            return None
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
        if now - self._held_since >= HOLD_SECONDS:
            self.fall_behind()
        return 0

    def begin(self, after: int) -> None:
        """Begin anew behind a step: what was answered already is scored again, in silence.

        Args:
            after: The records after this step are to come, from the store.
        """
        self.silent_until = max(self.silent_until, self.last_step)
        self.last_step = after
        self.fresh, self._snapshot = True, None
        self.fall_behind()

    def restore(self) -> bool:
        """Go back to the newest state that was kept; whether there is one."""
        if self._snapshot is None:
            return False
        self.silent_until = max(self.silent_until, self.last_step)
        self.last_step = self._snapshot.step
        self.fresh = True
        self.fall_behind()
        return True

    def task(self, table: pa.Table) -> ScoringTask:
        """What is to be scored, for these records."""
        state = None if self._snapshot is None or not self.fresh else self._snapshot.state
        return ScoringTask(
            key=self.key,
            table=table,
            silent_until=self.silent_until,
            fresh=self.fresh,
            state=state,
        )

    def scored(self, table: pa.Table, answer: Scored) -> None:
        """Take in the answer for these records."""
        self.fresh = False
        steps = table["step"].to_pylist()
        for before, step in zip([self.last_step, *steps], steps, strict=False):
            if before >= 0:
                self._gaps.append(step - before)
        self.last_step = steps[-1]
        self._scored.extend(steps)
        self._newest = answer.newest or self._newest
        self._snapshot = answer.snapshot or self._snapshot
        self._measured.take(table)

    def reading(self) -> RunReading | None:
        """The newest values for a scrape; None before the first."""
        newest = self._newest
        if newest is None or newest.step < self.silent_until:
            return None
        measured = self._measured.read()
        return RunReading(
            project=self.subject.project,
            run=self.subject.run,
            step=newest.step,
            time=newest.time.timestamp(),
            scalars=newest.scalars,
            risk=newest.risk,
            dropped=newest.dropped,
            layout=None if measured is None else measured.layout,
            statistics=None if measured is None else measured.statistics,
            safe_since=newest.safe_since.timestamp(),
            checkpoint=None if newest.checkpoint is None else newest.checkpoint.timestamp(),
        )


class _Measured:
    """The newest record with tensors; taken apart only when somebody looks."""

    def __init__(self) -> None:
        self._reader = RecordReader()
        self._lock = threading.Lock()
        self._row: pa.Table | None = None
        self._read: tuple[pa.Table, RecordColumns] | None = None

    def take(self, table: pa.Table) -> None:
        lengths = pc.fill_null(pc.list_value_length(table["tensors"]), 0).to_numpy()
        places = np.flatnonzero(lengths)
        if not places.size:
            return
        place = int(places[-1])
        # A slice would keep the whole batch alive.
        small = table.num_rows <= _SMALL_BATCH
        self._row = table.slice(place, 1) if small else table.take(pa.array([place]))

    def read(self) -> RecordColumns | None:
        with self._lock:
            row, known = self._row, self._read
            if row is None:
                return None
            if known is None or known[0] is not row:
                known = self._read = row, next(iter(self._reader.read(row)))
            return known[1]


def _sorted_once(table: pa.Table) -> pa.Table:
    """Sorted by step, the first of equal steps kept."""
    steps = table["step"].to_numpy()
    kept, index = np.unique(steps, return_index=True)
    if len(kept) == len(steps) and (index[1:] > index[:-1]).all():
        return table
    return table.take(pa.array(index))
