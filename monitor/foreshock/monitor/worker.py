"""The thread in which a step becomes a record and goes its ways.

The training thread only puts a snapshot into its queue. Sends nothing over the network; that is
the shipper's thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import pyarrow as pa

from foreshock.monitor.assembly import Assembler
from foreshock.monitor.containment import Containment
from foreshock.monitor.record import Event
from foreshock.monitor.sinks import ClosableSink, Sink
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.spool import Spool

__all__ = ["Worker"]

# A worker this far behind is stuck, in a sink or on a disk; then steps are dropped and counted.
_QUEUE_STEPS: Final = 256
_IDLE_SECONDS: Final = 0.25
# Where it lingers, it takes this many steps together at most.
_TOGETHER: Final = 8


class _Flush(threading.Event):
    """A request to seal what is there; set when done.

    Attributes:
        sealed: Whether the disk took everything.
    """

    sealed = True


class Worker:
    """Owns the spool and the sinks.

    Args:
        assembler: Makes the records.
        spool: Used by the worker's thread only; None keeps nothing.
        sinks: Called with every record.
        guards: Whose failures are reported in the next record.
        on_sealed: Called when there is a batch to ship.
        keeps_place: Whether a step that is dropped must still be gone through, because other
            processes wait for this one's part of it.
        linger: Seconds that a step may wait for others. A thread that wakes up takes the
            interpreter from the training, each time it starts and stops; several steps at once
            cost that once.
    """

    def __init__(
        self,
        assembler: Assembler,
        *,
        spool: Spool | None,
        sinks: Sequence[Sink],
        guards: Sequence[Containment],
        on_sealed: Callable[[], None],
        keeps_place: bool = False,
        linger: float = 0.0,
    ) -> None:
        self.guard = Containment("worker")
        self._assembler, self._spool, self._sinks = assembler, spool, tuple(sinks)
        self._guards = (*guards, self.guard)
        self._on_sealed = on_sealed
        self._dropped = 0
        self._keeps_place = keeps_place
        self._waiting: deque[Snapshot | _Flush | None] = deque()
        self._wake = threading.Event()
        self._linger = linger
        self._thread = threading.Thread(target=self._run, name="foreshock-worker", daemon=True)
        self._thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Take a step, or count it as dropped when the worker is far behind. Never waits."""
        if len(self._waiting) >= _QUEUE_STEPS:
            self._dropped += 1
            if not self._keeps_place:
                return
            snapshot = snapshot.emptied()
        self._waiting.append(snapshot)
        if not self._linger or len(self._waiting) >= _TOGETHER:
            self._wake.set()

    def flush(self, timeout: float) -> bool:
        """Wait until every step taken so far is in a sealed batch and in every sink.

        Returns:
            False if that took too long, or the disk takes no more.
        """
        request = _Flush()
        self._waiting.append(request)
        self._wake.set()
        return request.wait(timeout) and request.sealed

    def close(self, timeout: float) -> bool:
        """Finish what is queued, seal, close the sinks; True if that was done in time."""
        self._waiting.append(None)
        self._wake.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                self._wake.wait(self._linger or _IDLE_SECONDS)
                # Before looking: what comes from now on wakes it again.
                self._wake.clear()
                if not self._waiting:
                    self._seal(only_if_due=True)
                while self._waiting:
                    item = self._waiting.popleft()
                    if item is None:
                        return
                    if isinstance(item, _Flush):
                        self._seal(only_if_due=False)
                        item.sealed = self._spool is None or not self._spool.unsealed
                        item.set()
                    else:
                        self._take(item)
        finally:
            self._finish()

    def _take(self, snapshot: Snapshot) -> None:
        record = None
        with self.guard:
            record = self._assembler.record(snapshot, self._own_events())
            if record is not None:
                self._store(record)
        if record is None:
            return
        for sink in self._sinks:
            with self.guard:
                sink(record)

    def _store(self, record: pa.RecordBatch) -> None:
        if self._spool is not None:
            self._spool.append(record)
            if self._spool.seal_if_due():
                self._on_sealed()

    def _own_events(self) -> list[Event]:
        dropped, self._dropped = self._dropped, 0
        if self._spool is not None:
            dropped += self._spool.take_dropped()
        events = [Event("dropped", detail=f"{dropped} records")] if dropped else []
        for guard in self._guards:
            events += [Event("monitor_error", detail=text) for text in guard.take_unreported()]
        return events

    def _seal(self, *, only_if_due: bool) -> None:
        with self.guard:
            if self._spool is not None and (
                self._spool.seal_if_due() if only_if_due else self._spool.seal()
            ):
                self._on_sealed()

    def _finish(self) -> None:
        self._seal(only_if_due=False)
        for sink in self._sinks:
            if isinstance(sink, ClosableSink):
                with self.guard:
                    sink.close()
