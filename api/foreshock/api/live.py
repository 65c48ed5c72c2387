"""Scores every committed record once, in order, and says what changed: risk rows, alerts, events.

Ingest hands batches over and never waits; one thread works them off and has them scored elsewhere
(`Scoring`). Nothing is lost when that is slow or a process dies: what is not in memory is read
again from the store. Decides no threshold and sends no alert itself.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Final

import pyarrow as pa

from foreshock.api.alert_log import Alert, AlertSubject
from foreshock.api.alert_text import summary_row
from foreshock.api.columns import tensor_rows
from foreshock.api.exposition import RunReading
from foreshock.api.leases import HOUSEKEEPING
from foreshock.api.live_alerts import AlertFollower, sightings
from foreshock.api.live_parts import LiveParts, RecordStore, UnknownRun
from foreshock.api.live_run import Latest, RunAnalysis
from foreshock.api.live_silence import RunSilence
from foreshock.api.risks import risk_document, risk_table
from foreshock.api.scoring import RunKey, Scored
from foreshock.api.store import StoreError
from foreshock.monitor.record import Risk, encode_number

__all__ = ["LiveAnalysis", "LiveParts", "RecordStore"]

logger = logging.getLogger(__name__)

CHUNK: Final = 256
"""Records of one run scored before the next run has its turn."""

WARM_RECORDS: Final = 2048
"""Records before the newest scored one that bring a fresh scorer to where it was: eight half-lives
of its slowest mean. A shorter attempt is scored anew from its start, to the same risks exactly."""

IDLE_SECONDS: Final = 900.0
"""A run that sent nothing for so long leaves memory; it comes back with its next record."""

_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""Records that are scored in one request; more runs wait for the next one."""

_QUEUE_BYTES: Final = 256 * 1024 * 1024
_FLUSH_ROWS: Final = 2048
_FLUSH_SECONDS: Final = 0.5
_RETRY_SAVE_SECONDS: Final = 5.0
_TICK_SECONDS: Final = 0.2
_RETRY_SECONDS: Final = 1.0
_SWEEP_SECONDS: Final = 1.0
_MOST_DRAINED: Final = 256
_LAST_DIAGNOSES_SECONDS, _STORE_SECONDS = 5.0, 60.0


class LiveAnalysis:
    """The queue, the thread and the runs in memory.

    Args:
        parts: What it works with.
        queue_batches: Batches that may wait; a run whose batch finds no place is read again from
            the store.
        idle_seconds: When a silent run leaves memory.
    """

    def __init__(
        self, parts: LiveParts, *, queue_batches: int = 1024, idle_seconds: float = IDLE_SECONDS
    ) -> None:
        self._parts = parts
        self._idle_seconds = idle_seconds
        self._queue: queue.Queue[tuple[RunKey, pa.Table]] = queue.Queue(queue_batches)
        self._lock = threading.Lock()
        self._queued_bytes = 0
        self._dirty: set[RunKey] = set()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-analysis", daemon=True)
        # Only the worker changes it; readers copy it under the lock.
        self._runs: dict[RunKey, RunAnalysis] = {}
        self._unsaved: dict[RunKey, list[tuple[datetime, Risk]]] = {}
        self._saved_at = time.monotonic()
        self._failed: dict[RunKey, float] = {}
        self._gone: list[tuple[str, threading.Event]] = []
        self._swept_at = time.monotonic()
        self._working = False
        self._alerts = AlertFollower(parts.log, parts.diagnose, self._tell, self._failure)
        self._silence = RunSilence(parts.watch, parts.registry, parts.log, self._tell)

    def start(self) -> None:
        """Start the thread; records that an earlier process did not score come first."""
        for run in self._parts.registry.runs():
            newest = run.current
            if newest is None or newest.last_step is None:
                continue
            scored = self._parts.store.last_risk_step(run.run_id, newest.number)
            if scored is None or scored < newest.last_step:
                self._dirty.add((run.run_id, newest.number))
        self._silence.recall()
        self._parts.scoring.start()
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the thread and keep the risk rows; what was not scored is scored after a restart."""
        self._stop.set()
        self._wake.set()
        for seconds in (timeout, _STORE_SECONDS) if self._thread.ident is not None else ():
            self._thread.join(seconds)
            if self._thread.is_alive():  # It waits, and neither pipe nor store may close under it.
                self._parts.scoring.interrupt()
        self._alerts.close()
        self._parts.scoring.stop()

    def committed(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """A batch is durable; returns at once.

        Args:
            run_id: Its run.
            attempt: Its attempt.
            table: Its records, of `SCHEMA`.
        """
        key = (run_id, attempt)
        self._silence.heard(run_id, attempt, table)
        tally = self._parts.tally
        tally.waits(key)
        tally.add("foreshock_ingest_batches_total")
        tally.add("foreshock_ingest_records_total", table.num_rows)
        tally.add("foreshock_ingest_tensors_total", tensor_rows(table))
        with self._lock:
            fits = self._queued_bytes + table.nbytes <= _QUEUE_BYTES
            if fits:
                try:
                    self._queue.put_nowait((key, table))
                    self._queued_bytes += table.nbytes
                except queue.Full:
                    fits = False
            if not fits:
                self._dirty.add(key)
        if not fits:
            tally.add("foreshock_analysis_rereads_total")
        self._wake.set()

    def delete(self, run_id: str, seconds: float = 10.0) -> None:
        """Forget a run that the registry does not know any more; waits for the thread to do so."""
        done = threading.Event()
        with self._lock:
            self._gone.append((run_id, done))
        self._wake.set()
        done.wait(seconds)

    def latest(self, run_id: str) -> Latest | None:
        """The newest answer for a run in memory, of its highest attempt; None if it is not."""
        with self._lock:
            found = [run for (owner, _), run in self._runs.items() if owner == run_id]
        newest = max(found, key=lambda run: run.subject.attempt, default=None)
        return None if newest is None else newest.latest

    def readings(self) -> Sequence[RunReading]:
        """The newest values of each run in memory, the most recently active first."""
        with self._lock:
            runs = sorted(self._runs.values(), key=lambda run: -run.touched)
        newest: dict[str, RunReading] = {}
        for run in sorted(runs, key=lambda run: run.subject.attempt):
            reading = run.reading()
            if reading is not None:
                newest[run.subject.run_id] = self._with_state(run.subject.run_id, reading)
        order = dict.fromkeys(run.subject.run_id for run in runs)
        return [newest[run_id] for run_id in order if run_id in newest]

    def _with_state(self, run_id: str, reading: RunReading) -> RunReading:
        watch = self._parts.watch
        return replace(
            reading,
            state=watch.state(run_id, time.time()),
            received=watch.received(run_id),
            clock_skew=watch.skew(run_id),
        )

    @property
    def queue_length(self) -> int:
        """Batches that wait."""
        return self._queue.qsize()

    @property
    def idle(self) -> bool:
        """Whether everything committed so far is scored and saved."""
        with self._lock:
            runs = list(self._runs.values())
            waiting = bool(self._dirty) or not self._queue.empty() or self._queued_bytes > 0
        waiting |= self._working or bool(self._unsaved) or self._alerts.busy
        return not (waiting or any(run.behind or run.pending for run in runs))

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                busy = self._turn()
            except Exception:  # noqa: BLE001 the worker's guard: one bad turn must not end it
                self._failure("the live analysis failed in an unforeseen way")
                busy = False
            if not busy:
                self._wake.wait(_TICK_SECONDS)
        try:
            self._alerts.finish(_LAST_DIAGNOSES_SECONDS)
            self._save(everything=True)
        except Exception:  # noqa: BLE001 what is not saved is scored again after the restart
            self._failure("the last risk rows could not be saved")

    def _failure(self, message: str) -> None:
        logger.exception(message)
        self._parts.tally.add("foreshock_analysis_errors_total")

    def _turn(self) -> bool:
        """One round over queue and runs; whether there is more to do at once."""
        self._working = True
        now = time.monotonic()
        self._drop_gone()
        taken, dirty = self._drain()
        active = {key for key, run in self._runs.items() if run.behind or run.pending}
        chosen: list[tuple[RunAnalysis, pa.Table]] = []
        space, busy = _REQUEST_BYTES, False
        for key in sorted(self._mine(active | dirty | set(taken)), key=self._turns):
            if now < self._failed.get(key, 0.0) or space <= 0:
                self._wait(key, taken.get(key, ()), dirty=key in dirty)
                busy |= space <= 0
                continue
            found, more = self._serve(key, taken.get(key, ()), dirty=key in dirty)
            busy |= more
            if found is not None:
                chosen.append(found)
                space -= found[1].nbytes
        self._score(chosen)
        self._alerts.work()
        self._save(everything=False)
        if now - self._swept_at > _SWEEP_SECONDS:
            self._swept_at = now
            self._forget(now)
            self._silence.keep_ends()
            if self._parts.leases.holds(HOUSEKEEPING):
                self._silence.sweep()
        self._working = False
        return busy

    def _drain(self) -> tuple[dict[RunKey, list[pa.Table]], set[RunKey]]:
        """Take what waits: batches by run, and the runs to be read from the store."""
        taken: dict[RunKey, list[pa.Table]] = {}
        for _ in range(min(self._queue.qsize(), _MOST_DRAINED)):
            key, table = self._queue.get_nowait()
            taken.setdefault(key, []).append(table)
        with self._lock:
            self._queued_bytes -= sum(t.nbytes for tables in taken.values() for t in tables)
            dirty, self._dirty = self._dirty, set()
        return taken, dirty

    def _drop_gone(self) -> None:
        with self._lock:
            gone, self._gone = self._gone, []
            lost = {run_id for run_id, _ in gone}
            self._dirty -= {key for key in self._dirty if key[0] in lost}
            for key in [key for key in self._runs if key[0] in lost]:
                del self._runs[key]
                self._parts.scoring.forget(key)
        self._unsaved = {k: risks for k, risks in self._unsaved.items() if k[0] not in lost}
        for run_id, done in gone:
            self._alerts.forget(run_id)
            self._silence.forget(run_id)
            self._parts.log.delete(run_id)
            done.set()

    def _mine(self, keys: set[RunKey]) -> set[RunKey]:
        """What is this replica's; a run that went to another one leaves memory."""
        leases = self._parts.leases
        mine = leases.mine({run_id for run_id, _ in keys})
        for key in [key for key in self._runs if not leases.holds(key[0])]:
            with self._lock:
                del self._runs[key]
            self._unsaved.pop(key, None)
            self._parts.scoring.forget(key)
        return {key for key in keys if key[0] in mine}

    def missed(self, run_id: str, attempt: int, last_step: int) -> None:
        """The store may hold records up to this step that were not handed over; from any thread."""
        key = (run_id, attempt)
        with self._lock:
            run = self._runs.get(key)
            if run is None or run.newest < last_step:
                self._dirty.add(key)
        self._wake.set()

    def heard_elsewhere(self, run_id: str, attempt: int, last_step: int, received: float) -> None:
        """Another replica took a batch, at this time (seconds since 1970)."""
        self._silence.heard_elsewhere(run_id, attempt, last_step, received)

    def ended_elsewhere(self, run_id: str) -> None:
        """A run said that it is over, at any replica."""
        self._parts.watch.ended(run_id)

    def run_ids(self) -> set[str]:
        """Runs in memory, or about to be."""
        with self._lock:
            return {key[0] for key in (*self._runs, *self._dirty)}

    def _turns(self, key: RunKey) -> tuple[bool, float]:
        """Runs whose records are in memory first, then the one that has waited longest."""
        run = self._runs.get(key)
        return (True, 0.0) if run is None else (run.behind, run.served)

    def _wait(self, key: RunKey, tables: Sequence[pa.Table], *, dirty: bool) -> None:
        """Leave a run for a later turn; its records are in the store."""
        if tables or dirty or key not in self._runs:
            with self._lock:
                self._dirty.add(key)

    def _serve(
        self, key: RunKey, tables: Sequence[pa.Table], *, dirty: bool
    ) -> tuple[tuple[RunAnalysis, pa.Table] | None, bool]:
        """Give one run its batches; the records to score, and whether there may be more at once.

        A failure is the run's own; it is read from the store again a little later.
        """
        try:
            run = self._hand_over(key, tables, dirty=dirty)
            return self._chunk(run)
        except UnknownRun:
            logger.warning("run %s is gone; its records are not scored", key[0])
        except Exception:  # noqa: BLE001 one run's trouble must not stop the others
            self._failure(f"analysis of run {key[0]} failed")
            self._fail(key)
        return None, False

    def _fail(self, key: RunKey) -> None:
        self._failed[key] = time.monotonic() + _RETRY_SECONDS
        with self._lock:
            self._dirty.add(key)

    def _hand_over(self, key: RunKey, tables: Sequence[pa.Table], *, dirty: bool) -> RunAnalysis:
        run = self._runs.get(key)
        if run is None:
            run = self._opened(*key)
            run.touched = time.monotonic()
            with self._lock:
                self._runs[key] = run
        if tables:
            run.touched = time.monotonic()
        if dirty:
            run.fall_behind()
        late = sum(run.offer(table) for table in tables)
        if late:
            self._parts.tally.add("foreshock_late_records_total", late)
            self._begin_anew(run)
        elif not (self._parts.scoring.holds(key) or run.fresh or run.restore()):
            self._begin_anew(run)
        return run

    def _begin_anew(self, run: RunAnalysis) -> None:
        newest = max(run.last_step, run.silent_until)
        run.begin(self._parts.store.step_before(*run.key, newest, WARM_RECORDS))

    def _opened(self, run_id: str, attempt: int) -> RunAnalysis:
        """An attempt that was not in memory; its scorer is yet to be brought to where it was."""
        parts = self._parts
        named = parts.registry.run(run_id)
        if named is None:
            raise UnknownRun(f"the registry does not know run {run_id}")
        subject = AlertSubject(run_id, named.project, named.name, attempt)
        run = RunAnalysis(subject, named.world_size)
        scored = parts.store.last_risk_step(run_id, attempt)
        if scored is not None:
            run.begin(parts.store.step_before(run_id, attempt, scored, WARM_RECORDS))
            run.silent_until = scored
        older = [n for owner, n in parts.log.open_attempts() if owner == run_id and n < attempt]
        if older:
            self._alerts.finish(_LAST_DIAGNOSES_SECONDS)
        for number in older:
            before = AlertSubject(run_id, named.project, named.name, number)
            self._tell(parts.log.close(before, named.highest_step or 0, _newer(attempt)))
        return run

    def _chunk(self, run: RunAnalysis) -> tuple[tuple[RunAnalysis, pa.Table] | None, bool]:
        """The next records of a run, and whether there may be more at once."""
        ready = None if run.behind else run.ready(time.monotonic(), CHUNK)
        if ready is not None:
            return (run, ready), run.pending > 0
        if not run.behind:
            return None, False
        table = self._parts.store.next_records(*run.key, run.last_step, CHUNK)
        run.behind = table.num_rows == CHUNK
        return ((run, table) if table.num_rows else None), run.behind

    def _score(self, chosen: Sequence[tuple[RunAnalysis, pa.Table]]) -> None:
        """Have the records of many runs scored together."""
        if not chosen:
            return
        answers = self._parts.scoring.score([run.task(table) for run, table in chosen])
        by_key = {answer.key: answer for answer in answers}
        for run, table in chosen:
            run.served = time.monotonic()
            held, answer = self._parts.leases.holds(run.key[0]), by_key.get(run.key)
            if held and answer is not None:
                self._take(run, table, answer)
                continue
            # Lost with its worker, or the lease ran out meanwhile and may be back at the next look:
            # the store has the records, the run a state to go on from.
            self._parts.tally.add("foreshock_analysis_errors_total", int(held))
            self._parts.scoring.forget(run.key)
            self._fail(run.key)

    def _take(self, run: RunAnalysis, table: pa.Table, answer: Scored) -> None:
        run.scored(table, answer)
        self._parts.tally.scored(answer.seconds, table.num_rows)
        if not (run.behind or run.pending):
            self._parts.tally.answered(run.key)
        if answer.failed:
            self._parts.tally.add("foreshock_analysis_errors_total", answer.failed)
        if answer.risks:
            self._unsaved.setdefault(run.key, []).extend(answer.risks)
        for seen in sightings(run, table, [risk for _, risk in answer.risks]):
            self._alerts.follow(run.subject, seen)
        self._publish(run)

    def _tell(self, changed: Sequence[Alert]) -> None:
        for alert in changed:
            subject = alert.subject
            self._parts.stream.publish(
                "alert", subject.run_id, summary_row(alert), project=subject.project
            )
        if changed:
            self._parts.alerted()

    def _publish(self, run: RunAnalysis) -> None:
        latest, reading = run.latest, run.reading()
        if latest is None or reading is None:
            return
        subject = latest.subject
        who = {"run_id": subject.run_id, "run": subject.run, "attempt": subject.attempt}
        scalars = {name: encode_number(value) for name, value in reading.scalars.items()}
        step = {"step": latest.step, "time": latest.time.isoformat(), "scalars": scalars}
        publish = partial(self._parts.stream.publish, project=subject.project)
        publish("step", subject.run_id, who | step)
        publish("risk", subject.run_id, who | risk_document(latest.risk))

    def _save(self, *, everything: bool) -> None:
        """Give risk rows to the store, in groups."""
        now = time.monotonic()
        # What is in the store is not looked at again, so its alert must be in the log before.
        saved = {k: risks for k, risks in self._unsaved.items() if not self._alerts.waits(k)}
        waiting = sum(map(len, saved.values()))
        due = waiting >= _FLUSH_ROWS or now - self._saved_at >= _FLUSH_SECONDS
        if not waiting or not (due or everything):
            return
        self._saved_at = now
        # One INSERT for all runs: the store copes with few large ones, not with many small ones.
        groups = {key: (*key, risk_table(risks)) for key, risks in saved.items()}
        try:
            self._parts.store.append_risks(list(groups.values()))
        except StoreError:
            self._failure("risk rows could not be saved together")
            # One shard may be away: what lies on the others must not wait for it, nor be
            # written again and again.
            self._saved_at = now + _RETRY_SAVE_SECONDS
            self._save_apart(groups)
            return
        for key in saved:
            del self._unsaved[key]

    def _save_apart(self, groups: Mapping[RunKey, tuple[str, int, pa.Table]]) -> None:
        for key, group in groups.items():
            try:
                self._parts.store.append_risks([group])
            except StoreError:
                continue
            del self._unsaved[key]

    def _forget(self, now: float) -> None:
        """Drop runs that went silent, and attempts that a newer one has replaced."""
        newest: dict[str, int] = {}
        for run_id, attempt in self._runs:
            newest[run_id] = max(attempt, newest.get(run_id, 0))
        for key, run in list(self._runs.items()):
            idle = now - run.touched > self._idle_seconds or key[1] < newest[key[0]]
            if idle and not (run.behind or run.pending or key in self._unsaved):
                with self._lock:
                    del self._runs[key]
                self._failed.pop(key, None)
                self._parts.scoring.forget(key)


def _newer(attempt: int) -> str:
    return f"attempt {attempt} began"
