"""What other replicas do to runs: records that came in elsewhere, risks and alerts from elsewhere.

Looks into the database once a second. A run of this replica with records that it has not seen is
read from the store; for a run of another replica its newest step, risk and alerts become events
here too, so that a reader may follow any replica. Decides nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.alert_log import Alert, AlertLog
from foreshock.api.alert_text import summary_row
from foreshock.api.leases import HOUSEKEEPING, RunLeases
from foreshock.api.registry import Registry
from foreshock.api.registry_tables import attempts, leases, run_ends, runs
from foreshock.api.risks import risk_document, stored_risk
from foreshock.api.store import Store, StoreError
from foreshock.api.stream import EventStream
from foreshock.monitor.record import encode_number

__all__ = ["ReplicaFeed", "publish_alerts", "publish_stored"]

_log = logging.getLogger(__name__)

_EVERY_SECONDS: Final = 1.0
_KEEP_EVERY: Final = 4
_SHOWN_ROUNDS: Final = 4
_RECENT: Final = timedelta(hours=1)


class Analysis(Protocol):
    """The live analysis, as seen from here."""

    def missed(self, run_id: str, attempt: int, last_step: int) -> None:
        """The store may hold records up to this step that the analysis has not been given."""

    def run_ids(self) -> Collection[str]:
        """Runs in memory."""

    def heard_elsewhere(self, run_id: str, attempt: int, last_step: int, received: float) -> None:
        """Another replica took a batch, at this time (seconds since 1970)."""

    def ended_elsewhere(self, run_id: str) -> None:
        """A run said that it is over, at any replica."""


class ReplicaFeed:
    """One thread that looks around.

    Args:
        registry: Its database.
        store: Risks of other replicas' runs.
        held: What is this replica's; renewed here.
        log: Alerts; brought up to date here.
        analysis: Told about records that came in elsewhere.
        publish: Called with run_id, number, last_step, project and name of another replica's run.
        tell: Called with alerts that changed elsewhere.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        held: RunLeases,
        log: AlertLog,
        analysis: Analysis,
        publish: Callable[[Any], None],
        tell: Callable[[Collection[Alert]], None],
    ) -> None:
        self._registry = registry
        self._store = store
        self._leases = held
        self._log = log
        self._analysis = analysis
        self._publish = publish
        self._tell = tell
        self._seen: dict[tuple[str, int], int] = {}
        self._told: dict[tuple[str, int], int] = {}
        self._checked: dict[tuple[str, int], int] = {}
        self._rounds_left: dict[tuple[str, int], int] = {}
        self._rounds = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="foreshock-replicas", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and give up the leases."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(30)
        self._leases.leave()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except (SQLAlchemyError, StoreError) as error:
                _log.warning("could not look for other replicas' work: %s", type(error).__name__)
            except Exception:  # noqa: BLE001 the worker's one guard: the next round may succeed
                _log.exception("could not look for other replicas' work")
            self._stop.wait(_EVERY_SECONDS)

    def look(self) -> None:
        """One round.

        Raises:
            SQLAlchemyError: The database does not answer.
            StoreError: The store does not.
        """
        self._rounds += 1
        if self._rounds % _KEEP_EVERY == 1:
            self._leases.keep({*self._analysis.run_ids(), HOUSEKEEPING})
            self._leases.mine({HOUSEKEEPING})
        self._tell(self._log.refresh())
        now = self._registry.database.now()
        for row in self._recent():
            key = (row.run_id, row.number)
            changed = self._seen.get(key) != row.last_step
            self._seen[key] = row.last_step
            if changed:
                self._note(row)
            if self._leases.holds(row.run_id):
                self._own(key, row.last_step, changed=changed)
            elif row.until is None or row.until < now:
                self._take_over(key, row.last_step)
            else:
                self._checked.pop(key, None)
                self._show(key, row, changed=changed)

    def _note(self, row: Any) -> None:
        # Whoever looks for silent runs has to know of batches that came in elsewhere.
        received = row.last_received
        if received.tzinfo is None:
            received = received.replace(tzinfo=UTC)
        step = row.last_step
        self._analysis.heard_elsewhere(row.run_id, row.number, step, received.timestamp())
        if row.ended is not None and (row.ended, row.ended_step) >= (row.number, step):
            self._analysis.ended_elsewhere(row.run_id)

    def _own(self, key: tuple[str, int], last_step: int, *, changed: bool) -> None:
        # Seen a round ago and not told yet: perhaps it did not come in here.
        if not changed and self._told.get(key) != last_step:
            self._told[key] = last_step
            self._analysis.missed(*key, last_step)

    def _take_over(self, key: tuple[str, int], last_step: int) -> None:
        """A run that nobody has is taken if it has records without a risk."""
        if self._checked.get(key) == last_step:
            return
        scored = self._store.last_risk_step(*key)
        if (scored is None or scored < last_step) and self._leases.mine({key[0]}):
            self._analysis.missed(*key, last_step)
        self._checked[key] = last_step

    def _show(self, key: tuple[str, int], row: Any, *, changed: bool) -> None:
        """Another replica's run; its risk follows its records by a moment."""
        if changed:
            self._rounds_left[key] = _SHOWN_ROUNDS
        if self._rounds_left.get(key, 0) > 0:
            self._rounds_left[key] -= 1
            self._publish(row)

    def _recent(self) -> list[Any]:
        query = (
            sa.select(
                attempts.c.run_id,
                attempts.c.number,
                attempts.c.last_step,
                attempts.c.last_received,
                run_ends.c.attempt.label("ended"),
                run_ends.c.step.label("ended_step"),
                runs.c.project,
                runs.c.name,
                leases.c.until,
            )
            .join(runs, runs.c.run_id == attempts.c.run_id)
            .join(run_ends, run_ends.c.run_id == attempts.c.run_id, isouter=True)
            .join(leases, leases.c.name == attempts.c.run_id, isouter=True)
            .where(attempts.c.last_received > datetime.now(UTC) - _RECENT)
            .where(attempts.c.last_step.is_not(None))
        )
        with self._registry.engine.begin() as connection:
            rows = connection.execute(query.order_by(attempts.c.number)).all()
        # As after a restart: what a lost replica left of an attempt that is over stays unscored.
        return list({row.run_id: row for row in rows}.values())


def publish_stored(store: Store, stream: EventStream, row: Any) -> None:
    """Events `step` and `risk` of a run that another replica analyses, as its live ones.

    Args:
        store: Where that replica keeps what it finds.
        stream: This replica's readers.
        row: run_id, number, last_step, project and name.
    """
    if not stream.readers:
        return
    who = {"run_id": row.run_id, "run": row.name, "attempt": row.number}
    window = store.scalar_window(row.run_id, row.number, row.last_step, row.last_step).to_pylist()
    if window:
        time = window[0]["time"].isoformat()
        scalars = {
            name: encode_number(value)
            for name, value in window[0].items()
            if name not in ("step", "time") and value is not None
        }
        step = who | {"step": row.last_step, "time": time, "scalars": scalars}
        stream.publish("step", row.run_id, step, project=row.project)
    scored = store.last_risk_step(row.run_id, row.number)
    if scored is not None:
        rows = store.risk_history(row.run_id, row.number, scored, scored).to_pylist()
        risk = who | risk_document(stored_risk(scored, rows))
        stream.publish("risk", row.run_id, risk, project=row.project)


def publish_alerts(stream: EventStream, changed: Collection[Alert]) -> None:
    """An event for each alert."""
    for alert in changed:
        subject = alert.subject
        stream.publish("alert", subject.run_id, summary_row(alert), project=subject.project)
