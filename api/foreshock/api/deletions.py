"""Deleted runs, where replicas share database and store: each forgets them, and all goes twice.

Whoever deletes a run removes it from database and store. Other replicas learn of it here within a
second or two; what one of them wrote about the run meanwhile (a risk, a rollup) is removed later,
when nothing can be under way any more.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.leases import HOUSEKEEPING, Leases
from foreshock.api.registry import Registry
from foreshock.api.store import Store, StoreError

__all__ = ["AGAIN", "Deletions"]

_log = logging.getLogger(__name__)

AGAIN: Final = timedelta(minutes=10)
"""Longer than any INSERT takes."""

_EVERY_SECONDS: Final = 1.0


class Deletions:
    """One thread that looks for runs that are deleted.

    Args:
        registry: Its database names them; its memory of them is dropped.
        store: What is left of them goes.
        leases: One replica removes it for all.
        forget: Called with each run_id once: the live analysis drops it.
    """

    def __init__(
        self, registry: Registry, store: Store, leases: Leases, forget: Callable[[str], None]
    ) -> None:
        self._registry = registry
        self._store = store
        self._leases = leases
        self._forget = forget
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="foreshock-deletions", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the run in hand."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(30)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look(datetime.now(UTC))
            except (SQLAlchemyError, StoreError) as error:
                _log.warning("deleted runs were not looked after: %s", type(error).__name__)
            except Exception:  # noqa: BLE001 the worker's one guard: the next round may succeed
                _log.exception("deleted runs were not looked after, in an unforeseen way")
            self._stop.wait(_EVERY_SECONDS)

    def look(self, now: datetime) -> None:
        """One round.

        Args:
            now: The time.

        Raises:
            SQLAlchemyError: The database does not answer.
            StoreError: The store does not; it is tried again.
        """
        deleted = self._registry.deleted()
        for run_id in deleted.keys() - self._seen:
            self._registry.forget_run(run_id)
            self._forget(run_id)
            self._seen.add(run_id)
        self._seen &= deleted.keys()
        if not self._leases.holds(HOUSEKEEPING):
            return
        for run_id, when in deleted.items():
            if now - when > AGAIN and not self._stop.is_set():
                self._store.delete_run(run_id)
                self._registry.facts_removed(run_id)
