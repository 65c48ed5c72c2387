"""Writes rollups in the background: of chunks that a run has passed, and of runs that are over.

Looks at a run when it has passed a border of `CHUNK_STEPS` steps, and when one that was over sent
more; what came late is found by what the rows of a chunk are now, and until then reads take the
rows. Rests as long as it worked, so that it never takes more than half a core.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.leases import HOUSEKEEPING, Leases
from foreshock.api.ledger import Ledger
from foreshock.api.registry import Registry, Run
from foreshock.api.registry_tables import writes
from foreshock.api.store import CHUNK_STEPS, Store, StoreError

__all__ = ["Roller", "settled_number"]

_log = logging.getLogger(__name__)

_FIRST_SECONDS: Final = 5.0
_EVERY_SECONDS: Final = 30.0
_QUIET: Final = timedelta(hours=1)
"""A run that sent nothing for so long is taken for over; if it goes on, it is rolled up again."""


def settled_number(registry: Registry) -> int:
    """Batches up to this number are acknowledged, or will never be and are removed."""
    newest = Ledger(registry).newest_commit()
    # Only then: whatever of the lower numbers is still under way is found here.
    with registry.engine.begin() as connection:
        first = connection.execute(sa.select(sa.func.min(writes.c.first))).scalar()
    return newest if first is None else min(newest, int(first) - 1)


class Roller:
    """One thread that keeps rollups up to date.

    Args:
        registry: Which runs there are, and how far they are.
        store: Rows and rollups.
        leases: A run is rolled up by the replica that has it, what is over by one for all.
        every_seconds: Pause between two looks.
        first_seconds: Pause before the first.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        leases: Leases,
        *,
        every_seconds: float = _EVERY_SECONDS,
        first_seconds: float = _FIRST_SECONDS,
    ) -> None:
        self._registry = registry
        self._store = store
        self._leases = leases
        self._every_seconds = every_seconds
        self._first_seconds = first_seconds
        self._seen: dict[str, object] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="foreshock-rollups", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the chunk in hand."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause = self._first_seconds
        while not self._stop.wait(pause):
            pause = self._every_seconds
            try:
                self.look()
            except (SQLAlchemyError, StoreError) as error:
                _log.warning("rollups were not made: %s", error)
            except Exception:  # noqa: BLE001 the worker's one guard: the next round may succeed
                _log.exception("rollups were not made, in an unforeseen way")

    def look(self) -> int:
        """One round over all runs.

        Returns:
            How many chunks were rolled up.

        Raises:
            SQLAlchemyError: The database does not answer.
            StoreError: The store does not; the rest is for the next round.
        """
        settled = settled_number(self._registry)
        rolled = 0
        runs = self._registry.runs()
        self._seen = {run.run_id: self._seen.get(run.run_id) for run in runs}
        for run in runs:
            state = _state(run)
            if self._stop.is_set() or state == self._seen[run.run_id]:
                continue
            if run.current is None or not self._mine(run, run.current.number):
                continue
            count, complete = self._roll(run, settled)
            rolled += count
            if complete:
                self._seen[run.run_id] = state
        return rolled

    def _mine(self, run: Run, attempt: int) -> bool:
        # Takes no lease, for whoever hears of a run should have it. Two at once do no harm.
        over = _over(run, attempt)
        return self._leases.holds(run.run_id) or (over and self._leases.holds(HOUSEKEEPING))

    def _roll(self, run: Run, settled: int) -> tuple[int, bool]:
        """Roll up what is due; how many chunks, and whether none has to wait."""
        open_from = _open_chunks(run)
        rolled, complete = 0, True
        for stale in self._store.stale_chunks(run.run_id):
            if stale.chunk >= open_from.get(stale.attempt, stale.chunk):
                continue
            if stale.newest > settled or self._stop.is_set():
                complete = False
                continue
            began = time.monotonic()
            self._store.roll(run.run_id, stale.attempt, stale.chunk, settled)
            rolled += 1
            self._stop.wait(time.monotonic() - began)
        return rolled, complete


def _over(run: Run, number: int) -> bool:
    """Whether an attempt seems to send no more."""
    current = run.current
    if current is None or run.finished or number != current.number:
        return True
    heard = current.last_received
    return heard is not None and datetime.now(UTC) - heard > _QUIET


def _open_chunks(run: Run) -> dict[int, float]:
    """Per attempt, the first chunk that may still get records in their turn."""
    return {
        attempt.number: float("inf")
        if _over(run, attempt.number)
        else (attempt.last_step or 0) // CHUNK_STEPS
        for attempt in run.attempts
    }


def _state(run: Run) -> object:
    """Changes when there may be something to do: late records wait for the next border too."""
    return [
        (a.number, a.last_received if _over(run, a.number) else (a.last_step or 0) // CHUNK_STEPS)
        for a in run.attempts
    ]
