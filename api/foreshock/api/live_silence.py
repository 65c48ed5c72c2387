"""Silent runs: notes every batch, raises an alert when a run falls silent, takes it back.

Where `silence.py` meets the registry, the alert log and the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.alert_log import Alert, AlertLog, AlertSubject
from foreshock.api.ledger import Ledger
from foreshock.api.registry import Registry, Run
from foreshock.api.silence import Heard, SilenceChange, SilenceWatch

__all__ = ["END", "RunSilence"]

END: Final = "end"
"""Kind of the event by which a run says that it is over."""

STALE_ALERT: Final = timedelta(hours=6)
"""An open alert of a run that sent nothing for so long ends, and the run is watched no longer."""

_RECALLED: Final = 16


class RunSilence:
    """Watches all runs of a service.

    Args:
        watch: The bookkeeping.
        registry: Names and ends of runs.
        log: The alerts.
        tell: Called with the alerts that changed.
    """

    def __init__(
        self,
        watch: SilenceWatch,
        registry: Registry,
        log: AlertLog,
        tell: Callable[[Sequence[Alert]], None],
    ) -> None:
        self._watch = watch
        self._registry = registry
        self._log = log
        self._tell = tell
        self._ended: dict[str, tuple[int, int]] = {}

    def recall(self) -> None:
        """Watch the runs that an earlier process heard of, unless it was long ago or they ended."""
        now = time.time()
        ledger = Ledger(self._registry)
        alerted = {run_id for run_id, _, kind in self._log.open_kinds() if kind == "silence"}
        for run in self._registry.runs():
            heard = None if run.current is None else run.current.last_received
            if heard is None or run.finished or now - heard.timestamp() > _hours(STALE_ALERT):
                continue
            times = ledger.newest_received(run.run_id, _RECALLED)
            batches = [_recalled(run, received.timestamp()) for received in times]
            self._watch.recall(run.run_id, batches, now=now, alerted=run.run_id in alerted)

    def heard(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """A batch of records is durable; cheap, for it is called from ingest."""
        times = table["time"].cast(pa.int64()).to_numpy()
        steps = table["step"].to_numpy()
        ended = _ends(table)
        heard = Heard(
            received=time.time(),
            first=float(times[0]) / 1e6,
            last=float(times[-1]) / 1e6,
            records=table.num_rows,
            attempt=attempt,
            step=int(steps.max()),
            ended=ended,
        )
        self._watch.heard(run_id, heard)
        if ended:
            self._ended[run_id] = attempt, heard.step

    def forget(self, run_id: str) -> None:
        """A run is gone."""
        self._watch.forget(run_id)
        self._ended.pop(run_id, None)

    def heard_elsewhere(self, run_id: str, attempt: int, step: int, received: float) -> None:
        """Another replica took a batch, which this one knows from the registry alone."""
        known = self._watch.received(run_id)
        if known is None or received > known:
            # Records' own times are not in the registry; those of receipt tell the cadence too.
            heard = Heard(
                received=received,
                first=received,
                last=received,
                records=1,
                attempt=attempt,
                step=step,
            )
            self._watch.heard(run_id, heard)

    def keep_ends(self) -> None:
        """Write down which runs are over; not for ingest's thread."""
        for run_id, (attempt, step) in list(self._ended.items()):
            if self._registry.run_id(run_id) is not None:
                self._registry.end_run(run_id, attempt, step)
            self._ended.pop(run_id, None)

    def sweep(self) -> None:
        """Raise and take back alerts, one replica for all; not for ingest's thread."""
        for change in self._watch.sweep(time.time(), _hours(STALE_ALERT)):
            self._change(change)
        self._close_old()

    def _change(self, change: SilenceChange) -> None:
        run = self._registry.run(change.run_id)
        if run is None:
            self._watch.forget(change.run_id)
            return
        subject = AlertSubject(change.run_id, run.project, run.name, change.attempt)
        if change.silent:
            self._tell(self._log.silence(subject, change.step))
        else:
            reason = "the run ended" if change.ended else "the run sends records again"
            self._tell(self._log.end_silence(subject, change.step, reason))

    def _close_old(self) -> None:
        for run_id, attempt, _ in self._log.open_kinds():
            if self._watch.received(run_id) is not None:
                continue
            run = self._registry.run(run_id)
            if run is None:
                continue
            newest = run.current
            heard = (None if newest is None else newest.last_received) or run.created_at
            if datetime.now(UTC) - heard > STALE_ALERT:
                subject = AlertSubject(run_id, run.project, run.name, attempt)
                reason = "the run has sent nothing since"
                self._tell(self._log.close(subject, run.highest_step or 0, reason))


def _hours(span: timedelta) -> float:
    return span.total_seconds()


def _recalled(run: Run, received: float) -> Heard:
    # Records' own times are not in the ledger; those of receipt tell the cadence too.
    current = run.current
    return Heard(
        received=received,
        first=received,
        last=received,
        records=1,
        attempt=0 if current is None else current.number,
        step=-1 if current is None else current.last_step or 0,
    )


def _ends(table: pa.Table) -> bool:
    """Whether the last record says that the run is over."""
    lengths = pc.fill_null(pc.list_value_length(table["events"]), 0).to_numpy()
    newest = int(np.argmax(table["step"].to_numpy()))
    if not lengths[newest]:
        return False
    return any(event["kind"] == END for event in table["events"][newest].as_py())
