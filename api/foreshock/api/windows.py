"""Pieces of a run out of the store: the next and the newest records.

Counts in records, where the store counts in steps. Writes risk rows through and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from foreshock.api.store import Store, View
from foreshock.monitor.record import SCHEMA

__all__ = ["DIAGNOSIS_RECORDS", "RunRecords", "steps_after"]

DIAGNOSIS_RECORDS: Final = 256
"""Records that a diagnosis looks back over."""

_WIDEN: Final = 8


class RunRecords:
    """Reads records of attempts by their number.

    Args:
        store: The store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def next_records(self, run_id: str, attempt: int, after: int, count: int) -> pa.Table:
        """The first `count` records with step > after, sorted by step."""
        bounds = self._store.bounds(View(run_id, attempt, first_step=after + 1))
        if bounds is None:
            return SCHEMA.empty_table()
        first, end = bounds
        span = count
        while True:
            last = min(first + span - 1, end)
            steps = self._steps(run_id, attempt, first, last)
            if len(steps) >= count or last == end:
                break
            span *= _WIDEN
        if not len(steps):
            # Deleted, or expired, since the first look.
            return SCHEMA.empty_table()
        return self._store.record_window(run_id, attempt, first, int(steps[:count][-1]))

    def newest_records(self, run_id: str, attempt: int, up_to: int, count: int) -> pa.Table:
        """The last `count` records with step <= up_to, sorted by step."""
        after = self.step_before(run_id, attempt, up_to, count)
        return self._store.record_window(run_id, attempt, after + 1, up_to)

    def step_before(self, run_id: str, attempt: int, up_to: int, count: int) -> int:
        """The step that exactly the last `count` records with step <= up_to come after, or -1."""
        bounds = self._store.bounds(View(run_id, attempt, last_step=up_to))
        if bounds is None:
            return -1
        begin, last = bounds
        span = count
        while True:
            first = max(last - span + 1, begin)
            steps = self._steps(run_id, attempt, first, last)
            if len(steps) >= count or first == begin:
                break
            span *= _WIDEN
        return int(steps[-count:][0]) - 1 if len(steps) else -1

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Keep risk rows of several (run_id, attempt)."""
        self._store.append_risks(groups)

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        """Newest step with a risk row."""
        return self._store.last_risk_step(run_id, attempt)

    def _steps(
        self, run_id: str, attempt: int, first: int, last: int
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        steps = self._store.step_window(View(run_id, attempt, first, last))["step"].to_numpy()
        return np.asarray(steps, dtype=np.int64)


def steps_after(store: Store, view: View, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The first `count` steps of a view that hold a record; never looks at many more."""
    bounds = store.bounds(view)
    if bounds is None:
        return np.array([], np.int64)
    first, end = bounds
    span = count
    while True:
        last = min(first + span - 1, end)
        window = replace(view, first_step=first, last_step=last)
        steps = np.asarray(store.step_window(window)["step"].to_numpy(), dtype=np.int64)
        if len(steps) >= count or last == end:
            return steps[:count]
        span *= _WIDEN
