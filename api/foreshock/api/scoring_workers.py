"""Scoring in processes of its own, so that it never takes the interpreter from ingest.

They get Arrow bytes over a pipe and give risks back. An attempt stays with one worker. A worker
that dies or hangs is replaced; whoever asked finds that its states are gone. Decides nothing about
runs.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

import pyarrow as pa

from foreshock.api.scoring import RunKey, Scored, Scorer, ScoringDesk, ScoringTask
from foreshock.api.spawned import ProcessLost, SpawnedProcess, answer_requests

__all__ = ["InlineScoring", "Scoring", "ScoringWorkers"]

logger = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 120.0
"""A worker that takes longer for one request is taken to hang: a request holds a few thousand
records, worth a few seconds."""


class Scoring(Protocol):
    """Where records are scored. One thread at a time may use it."""

    def start(self) -> None:
        """Make ready."""
        ...

    def interrupt(self) -> None:
        """Let a `score` under way return soon, without its answers; from any thread."""
        ...

    def stop(self) -> None:
        """End whatever was started; no `score` is under way."""
        ...

    def holds(self, key: RunKey) -> bool:
        """Whether an attempt's state is there."""
        ...

    def forget(self, key: RunKey) -> None:
        """Drop the state of an attempt."""
        ...

    def score(self, tasks: Sequence[ScoringTask]) -> list[Scored]:
        """Score; what was lost with a worker is missing in the answer."""
        ...


class InlineScoring:
    """Scores in the calling thread: for a machine that cannot spare a process.

    Args:
        new_scorer: Makes a fresh scorer for an attempt.
    """

    def __init__(self, new_scorer: Callable[[], Scorer]) -> None:
        self._desk = ScoringDesk(new_scorer)
        self._held: set[RunKey] = set()

    def start(self) -> None:
        """Nothing to start."""

    def interrupt(self) -> None:
        """Nothing to interrupt: it never waits for anybody."""

    def stop(self) -> None:
        """Nothing to end."""

    def holds(self, key: RunKey) -> bool:
        """See `Scoring.holds`."""
        return key in self._held

    def forget(self, key: RunKey) -> None:
        """See `Scoring.forget`."""
        self._held.discard(key)
        self._desk.forget(key)

    def score(self, tasks: Sequence[ScoringTask]) -> list[Scored]:
        """See `Scoring.score`."""
        self._held.update(task.key for task in tasks)
        return self._desk.score(tasks)


class ScoringWorkers:
    """Scores in spawned processes.

    Args:
        count: Processes; an attempt's run decides which is its own.
        new_scorer: Makes a fresh scorer; must be importable from the worker.
        answer_seconds: See `ANSWER_SECONDS`.
    """

    def __init__(
        self,
        count: int,
        new_scorer: Callable[[], Scorer],
        *,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        if count < 1:
            raise ValueError(f"count is {count}; allowed: 1 or more")
        self._workers = tuple(_Worker(new_scorer, answer_seconds) for _ in range(count))
        self.restarts = 0
        self._stopped = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run."""
        return tuple(pid for worker in self._workers if (pid := worker.process.pid) is not None)

    def start(self) -> None:
        """Start the processes; they load their models while the caller goes on."""
        self._stopped = False
        for worker in self._workers:
            worker.process.start()

    def interrupt(self) -> None:
        """End the processes by force, and start none instead."""
        self._stopped = True
        for worker in self._workers:
            worker.process.interrupt()

    def stop(self) -> None:
        """End the processes."""
        self._stopped = True
        for worker in self._workers:
            worker.stop()

    def holds(self, key: RunKey) -> bool:
        """See `Scoring.holds`."""
        return key in self._of(key).held

    def forget(self, key: RunKey) -> None:
        """See `Scoring.forget`."""
        self._of(key).forget(key)

    def score(self, tasks: Sequence[ScoringTask]) -> list[Scored]:
        """See `Scoring.score`. The workers work at the same time."""
        shares: dict[int, list[ScoringTask]] = {}
        for task in tasks:
            shares.setdefault(self._place(task.key), []).append(task)
        asked = [place for place, share in shares.items() if self._sent(place, share)]
        return [answer for place in asked for answer in self._received(place)]

    def _sent(self, place: int, share: Sequence[ScoringTask]) -> bool:
        try:
            self._workers[place].send(share)
        except ProcessLost as error:
            self._replace(place, error)
            return False
        return True

    def _received(self, place: int) -> Sequence[Scored]:
        try:
            return list(self._workers[place].process.receive())
        except ProcessLost as error:
            self._replace(place, error)
            return ()

    def _replace(self, place: int, error: ProcessLost) -> None:
        if self._stopped:
            return
        logger.warning("a scoring worker is replaced: %s", error)
        self.restarts += 1
        self._workers[place].stop()
        self._workers[place].process.start()

    def _place(self, key: RunKey) -> int:
        return zlib.crc32(key[0].encode()) % len(self._workers)

    def _of(self, key: RunKey) -> _Worker:
        return self._workers[self._place(key)]


@dataclass(frozen=True, slots=True)
class _Request:
    """What goes to a worker beside the records of all tasks, which lie in one Arrow stream.

    Attributes:
        forget: Attempts whose state may go.
        rows: How many of the records belong to each task.
        tasks: The members of `ScoringTask` without the table.
    """

    forget: tuple[RunKey, ...]
    rows: tuple[int, ...]
    tasks: tuple[dict[str, Any], ...]


class _Worker:
    """One process, and whose states it holds."""

    def __init__(self, new_scorer: Callable[[], Scorer], answer_seconds: float) -> None:
        self.process = SpawnedProcess(
            _serve, new_scorer, name="foreshock-scoring", answer_seconds=answer_seconds
        )
        self.held: set[RunKey] = set()
        self._forget: list[RunKey] = []

    def stop(self) -> None:
        self.held.clear()
        self._forget.clear()
        self.process.stop()

    def forget(self, key: RunKey) -> None:
        if key in self.held:
            self.held.discard(key)
            self._forget.append(key)

    def send(self, tasks: Sequence[ScoringTask]) -> None:
        request = _Request(
            forget=tuple(self._forget),
            rows=tuple(task.table.num_rows for task in tasks),
            tasks=tuple(
                {
                    "key": task.key,
                    "silent_until": task.silent_until,
                    "fresh": task.fresh,
                    "state": task.state,
                }
                for task in tasks
            ),
        )
        self._forget.clear()
        self.held.update(task.key for task in tasks)
        body = _encoded(pa.concat_tables([task.table for task in tasks]))
        self.process.send(request, memoryview(body))


def _encoded(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _serve(pipe: Connection, new_scorer: Callable[[], Scorer]) -> None:
    desk = ScoringDesk(new_scorer)
    # Loads the model before anybody waits for it; what fails here fails again where it is answered.
    with suppress(Exception):
        new_scorer()

    def answer(request: _Request, body: bytes) -> list[Scored]:
        for key in request.forget:
            desk.forget(key)
        return desk.score(_tasks(request, pa.ipc.open_stream(body).read_all()))

    answer_requests(pipe, answer)


def _tasks(request: _Request, table: pa.Table) -> list[ScoringTask]:
    tasks, start = [], 0
    for rows, members in zip(request.rows, request.tasks, strict=True):
        tasks.append(ScoringTask(table=table.slice(start, rows), **members))
        start += rows
    return tasks
