"""Batches become durable exactly once: one writer thread, group commit, facts first, then ledger.

A group is at most so many batches or milliseconds. Its facts go into the store, then its ledger
rows into the registry in one transaction, and only then is anybody told. What a kill or an error in
between leaves in the store is removed (`commits.py`), so what is stored is what was acknowledged.
Decodes nothing and knows no HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.attempts import StreamPoint, assign_epochs
from foreshock.api.commits import Commits, ExclusiveCommits
from foreshock.api.ledger import BatchKey, Ledger, LedgerEntry, Span
from foreshock.api.registry import Registry
from foreshock.api.store import Store, StoreError
from foreshock.api.store_rows import BatchFacts, Placed, place, split

__all__ = [
    "BatchConflict",
    "CommitListener",
    "Gone",
    "Incoming",
    "Ingest",
    "IngestLimits",
    "NoListener",
    "Overloaded",
    "Receipt",
    "Refused",
    "Unavailable",
]

_log = logging.getLogger(__name__)


class BatchConflict(Exception):
    """The id of a batch was used before for other contents."""


class Gone(Exception):
    """The run of the batch was deleted while the batch waited."""


class Refused(ValueError):
    """The batch can never be stored, e.g. too many layers."""


class Unavailable(Exception):
    """Nothing can be made durable now; the same batch may be sent again later."""


class Overloaded(Unavailable):
    """Too many batches are waiting."""


class CommitListener(Protocol):
    """Told about what became durable; must return at once and never raise."""

    def committed(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """Records of one attempt are durable.

        Args:
            run_id: Their run.
            attempt: Their attempt.
            table: `record.SCHEMA`, in the order of the batch.
        """


class NoListener:
    """Listens to nothing."""

    def committed(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A validated batch on its way in.

    Attributes:
        run_id: The run of its launch.
        key: Its identity.
        digest: Of the decoded body.
        table: `record.SCHEMA`, validated, not empty.
    """

    run_id: str
    key: BatchKey
    digest: str
    table: pa.Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that a batch is durable.

    Attributes:
        duplicate: It had been before.
        attempts: The attempts its records belong to.
        records: How many records it holds.
    """

    duplicate: bool
    attempts: tuple[int, ...]
    records: int


@dataclass(frozen=True, slots=True)
class _Job:
    batch: Incoming
    facts: BatchFacts
    future: Future[Receipt]
    since: float


@dataclass(frozen=True, slots=True)
class _Planned:
    job: _Job
    entry: LedgerEntry
    placed: Placed


class _Plan:
    """What one group will write; sees the batches planned before it as if they were stored."""

    def __init__(self, registry: Registry, ledger: Ledger, newest: int) -> None:
        self._registry = registry
        self._ledger = ledger
        self._newest = newest
        self._points: dict[tuple[str, int], dict[int, StreamPoint]] = {}
        self.planned: dict[BatchKey, _Planned] = {}
        self.repeats: list[_Job] = []

    def add(self, job: _Job) -> None:
        """Place a batch.

        Raises:
            BatchConflict: Its id was used for other contents.
            Gone: Its run was deleted.
            Refused: It can never be stored.
        """
        batch = job.batch
        owner = self._registry.launch_owner(batch.key.launch_id)
        if owner is None or owner.run_id != batch.run_id:
            raise Gone("its run was deleted; POST /api/v1/runs, then retry")
        earlier = self._earlier(batch.key)
        if earlier is not None:
            if earlier.digest != batch.digest:
                raise BatchConflict("this batch id was used before for other contents")
            self.repeats.append(job)
            return
        try:
            layer_ids = self._registry.layer_ids(batch.run_id, job.facts.layer_names)
        except ValueError as error:
            raise Refused(str(error)) from None
        self._place(job, layer_ids)

    def _place(self, job: _Job, layer_ids: Mapping[str, int]) -> None:
        batch = job.batch
        steps = batch.table["step"].to_numpy()
        before, after = self._neighbours(batch.key)
        epochs = assign_epochs(steps, before, after)
        numbers = {
            int(epoch): self._registry.attempt(
                batch.run_id, batch.key.launch_id, int(epoch), int(steps[epochs == epoch].min())
            )
            for epoch in np.unique(epochs)
        }
        attempts = np.array([numbers[int(epoch)] for epoch in epochs], np.int64)
        point = StreamPoint(batch.key.sequence, int(epochs[0]), int(epochs[-1]), int(steps[-1]))
        entry = LedgerEntry(
            run_id=batch.run_id,
            key=batch.key,
            digest=batch.digest,
            commit=self._newest + len(self.planned) + 1,
            point=point,
            attempts=tuple(sorted(numbers.values())),
            spans=_spans(batch.table, attempts),
            records=batch.table.num_rows,
            received_at=datetime.now(UTC),
        )
        self._points.setdefault(batch.key.stream, {})[batch.key.sequence] = point
        placed = Placed(
            run_id=batch.run_id, attempts=attempts, commit=entry.commit, layer_ids=layer_ids
        )
        self.planned[batch.key] = _Planned(job, entry, placed)

    def _earlier(self, key: BatchKey) -> LedgerEntry | None:
        if key in self.planned:
            return self.planned[key].entry
        tip = self._ledger.tip(key.stream)
        if tip is None or tip.sequence < key.sequence:
            return None
        return self._ledger.find(key)

    def _neighbours(self, key: BatchKey) -> tuple[StreamPoint | None, StreamPoint | None]:
        before, after = self._ledger.neighbours(key)
        for point in self._points.get(key.stream, {}).values():
            if point.sequence < key.sequence and (
                before is None or before.sequence < point.sequence
            ):
                before = point
            if point.sequence > key.sequence and (after is None or after.sequence > point.sequence):
                after = point
        return before, after

    def rows(self) -> list[dict[str, pa.Table]]:
        """Rows of the store, per batch."""
        return [place(item.job.facts, item.placed) for item in self.planned.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestLimits:
    """How much is written at once, and how much may wait.

    Attributes:
        group_batches: Most batches in one group.
        group_seconds: Longest wait for a group to fill.
        queue_batches: Batches that may wait.
        queue_bytes: Their bytes in memory, likewise.
        min_free_bytes: Below so much free disk nothing is written.
    """

    group_batches: int = 32
    group_seconds: float = 0.02
    queue_batches: int = 256
    queue_bytes: int = 1024**3
    min_free_bytes: int = 0


class Ingest:
    """The writer thread and the queue before it.

    Args:
        registry: Layers and attempts of the batches.
        store: Where facts go.
        listener: Told what became durable.
        commits: How batches are numbered and acknowledged; None: nobody else writes to the store.
        limits: How much at once.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        listener: CommitListener,
        commits: Commits | None = None,
        limits: IngestLimits | None = None,
    ) -> None:
        self._registry = registry
        self._store = store
        self._listener = listener
        self._commits = commits or ExclusiveCommits(Ledger(registry), store)
        self._ledger = self._commits.ledger
        self._limits = limits or IngestLimits()
        self._queue: queue.Queue[_Job | None] = queue.Queue(self._limits.queue_batches)
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self.no_deletion = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="foreshock-ingest", daemon=True)

    def start(self) -> None:
        """Remove what was never acknowledged, then start writing.

        Raises:
            StoreError: The store does not work.
        """
        self._commits.start()
        if not self._registry.database.shared:
            # Replicas do it while they run (`deletions.py`).
            for run_id in self._registry.deleted():
                self._remove(run_id)
        self._thread.start()

    def stop(self) -> None:
        """Refuse new batches, finish those waiting, end the thread."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._queue.put(None)
        self._thread.join()
        self._commits.stop()

    @property
    def alive(self) -> bool:
        """Whether batches can still become durable."""
        return self._thread.is_alive() and not self._stopping

    @property
    def disk_full(self) -> bool:
        """Whether too little disk is free to take batches."""
        free = self._store.free_bytes()
        return free is not None and free < self._limits.min_free_bytes

    @property
    def waiting(self) -> int:
        """How many batches wait for the writer, about."""
        return self._queue.qsize()

    def known(self, key: BatchKey, digest: str) -> Receipt | None:
        """The receipt of a batch that is durable already, before its body is read in full.

        Raises:
            BatchConflict: Its id was used for other contents.
        """
        if self._ledger.beyond(key):
            return None
        entry = self._ledger.find(key)
        if entry is None:
            return None
        if entry.digest != digest:
            raise BatchConflict("this batch id was used before for other contents")
        return Receipt(duplicate=True, attempts=entry.attempts, records=entry.records)

    def submit(self, batch: Incoming) -> Future[Receipt]:
        """Hand a batch to the writer; takes it apart in the calling thread.

        Returns:
            Done once the batch is durable; fails with BatchConflict, Refused or Unavailable.

        Raises:
            Overloaded: Too much is waiting already.
            Unavailable: The service is stopping.
        """
        job = _Job(batch, split(batch.table), Future(), time.monotonic())
        # A client that goes away must not take back a batch that is being written.
        job.future.set_running_or_notify_cancel()
        with self._lock:
            if self._stopping:
                raise Unavailable("the service is stopping")
            if (
                self._waiting_bytes + batch.table.nbytes > self._limits.queue_bytes
                and self._waiting_bytes
            ):
                raise Overloaded("too many bytes are waiting to be written")
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                raise Overloaded("too many batches are waiting to be written") from None
            self._waiting_bytes += batch.table.nbytes
        return job.future

    def delete(self, run_id: str) -> None:
        """Delete a run: no batch of it is taken any more, and its facts are gone on return.

        Raises:
            StoreError: The facts could not all be removed; the next start removes them.
            SQLAlchemyError: The registry could not be written; nothing has happened.
        """
        with self.no_deletion:
            # Between two groups of the writer: none may have a batch of the run in hand.
            with self._writing:
                self._registry.delete(run_id)
                self._ledger.forget()
            if self._registry.database.shared:
                # Another replica may have something of it in hand, so it is done again.
                self._store.delete_run(run_id)
            else:
                self._remove(run_id)

    def _remove(self, run_id: str) -> None:
        self._store.delete_run(run_id)
        self._registry.facts_removed(run_id)

    # The writer thread

    def _run(self) -> None:
        more = True
        while more:
            jobs, more = self._collect()
            if jobs:
                self._settle(jobs)
                with self._lock:
                    self._waiting_bytes -= sum(job.batch.table.nbytes for job in jobs)

    def _collect(self) -> tuple[list[_Job], bool]:
        first = self._queue.get()
        if first is None:
            return [], False
        jobs = [first]
        # What waited while the group before was written has waited enough.
        until = first.since + self._limits.group_seconds
        while len(jobs) < self._limits.group_batches:
            try:
                job = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if job is None:
                return jobs, False
            jobs.append(job)
        return jobs, True

    def _settle(self, jobs: Sequence[_Job]) -> None:
        """Store a group; if that fails, each batch on its own, so that one cannot hold the rest."""
        with self._writing:
            error = _guarded(lambda: self._store_group(jobs))
        if error is None:
            return
        # Another replica may have deleted a run that is remembered here.
        self._registry.forget()
        if len(jobs) > 1:
            for job in jobs:
                self._settle([job])
            return
        expected = isinstance(error, StoreError | SQLAlchemyError)
        _log.error("a batch was not stored: %s", error, exc_info=None if expected else error)
        if not jobs[0].future.done():
            jobs[0].future.set_exception(Unavailable("the batch could not be made durable"))

    def _store_group(self, jobs: Sequence[_Job]) -> None:
        if self.disk_full:
            raise StoreError(f"less than {self._limits.min_free_bytes} bytes are free on the disk")
        launches = {job.batch.key.launch_id for job in jobs if not job.future.done()}
        with self._commits.claim(launches, len(jobs)) as newest:
            plan = _Plan(self._registry, self._ledger, newest)
            for job in jobs:
                if job.future.done():
                    continue
                try:
                    plan.add(job)
                except (BatchConflict, Gone, Refused) as error:
                    job.future.set_exception(error)
            if plan.planned:
                self._store.append(plan.rows())
                self._commits.commit([item.entry for item in plan.planned.values()])
        self._acknowledge(plan)

    def _acknowledge(self, plan: _Plan) -> None:
        for item in plan.planned.values():
            entry = item.entry
            item.job.future.set_result(
                Receipt(duplicate=False, attempts=entry.attempts, records=entry.records)
            )
        for job in plan.repeats:
            job.future.set_result(
                self.known(job.batch.key, job.batch.digest)
                or Receipt(duplicate=True, attempts=(), records=job.batch.table.num_rows)
            )
        for item in plan.planned.values():
            for attempt, table in _by_attempt(item.job.batch.table, item.placed.attempts):
                tell = partial(self._listener.committed, item.entry.run_id, attempt, table)
                error = _guarded(tell)
                if error is not None:
                    _log.error("the listener failed", exc_info=error)


def _guarded(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - the one guard of this worker: it must live on
        return error
    return None


def _by_attempt(
    table: pa.Table, attempts: np.ndarray[Any, np.dtype[np.int64]]
) -> list[tuple[int, pa.Table]]:
    numbers = np.unique(attempts)
    if len(numbers) == 1:
        return [(int(numbers[0]), table)]
    return [(int(n), table.filter(pa.array(attempts == n))) for n in numbers]


_LOSS: Final = "loss"


def _spans(table: pa.Table, attempts: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Span, ...]:
    losses = pc.map_lookup(table["scalars"], pa.scalar(_LOSS), "first").to_pylist()
    steps = table["step"].to_numpy()
    spans = []
    for number in np.unique(attempts):
        rows = np.flatnonzero(attempts == number)
        known = [losses[row] for row in rows[::-1] if losses[row] is not None]
        first, last = int(steps[rows].min()), int(steps[rows].max())
        spans.append(Span(int(number), first, last, known[0] if known else None))
    return tuple(spans)
