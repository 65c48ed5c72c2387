"""What a relay has acknowledged, on disk until it has been passed on: one SQLite file.

A batch is held as it came until its reports are in, then as it goes on: made once, in one
transaction, so that whatever is sent again is the same bytes. Its id and the digest of what came
outlive its contents, so that a batch that comes again is known. Reports that carry events are held
too; all others are in memory only. Every call that returns has reached the disk.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any, Final

from foreshock.monitor.record import StepReport, decode_reports, encode_reports

__all__ = ["Batch", "BatchName", "Depot", "DepotFull", "KeptReport", "LaunchRow", "Made", "Taken"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS launches (
    launch_id TEXT PRIMARY KEY, run TEXT NOT NULL, body TEXT NOT NULL, heard REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    id INTEGER PRIMARY KEY AUTOINCREMENT, launch_id TEXT NOT NULL, rank INTEGER NOT NULL,
    sequence INTEGER NOT NULL, digest TEXT NOT NULL, media_type TEXT NOT NULL,
    state INTEGER NOT NULL, body BLOB, reason TEXT,
    UNIQUE (launch_id, rank, sequence)
);
CREATE INDEX IF NOT EXISTS batches_by_state ON batches (state, launch_id, id);
CREATE TABLE IF NOT EXISTS reports (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, launch_id TEXT NOT NULL,
    step INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS reports_by_launch ON reports (launch_id, step);
"""
_MOST_KEPT_REPORTS: Final = 4096
# Longer than anybody sends a batch again; the service would know it even then.
_FORGET_SECONDS: Final = 30 * 86400.0


class _State(IntEnum):
    HELD = 0
    READY = 1
    SENT = 2
    REFUSED = 3


class Taken(Enum):
    """What became of a batch that came."""

    NEW = "new"
    AGAIN = "again"
    CONFLICT = "conflict"


class DepotFull(Exception):
    """There is no room for more; nothing was taken."""


@dataclass(frozen=True, slots=True)
class BatchName:
    """The id of a batch: `{launch_id}-{rank}-{sequence}`."""

    launch_id: str
    rank: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.launch_id}-{self.rank}-{self.sequence}"


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch without its contents; `id` counts batches in the order in which they came."""

    id: int
    name: BatchName
    media_type: str


@dataclass(frozen=True, slots=True)
class Made:
    """A batch as it goes on.

    Attributes:
        media_type, body: As named.
        last_step: Highest step in it.
        newest_report: Number of the newest report that it may hold.
    """

    media_type: str
    body: bytes
    last_step: int
    newest_report: int


@dataclass(frozen=True, slots=True)
class LaunchRow:
    """A launch as it was announced.

    Attributes:
        run: Name of the run.
        body: Of POST /runs.
    """

    run: str
    body: dict[str, Any]

    @property
    def project(self) -> str:
        """Name of the project."""
        return str(self.body.get("project"))

    @property
    def world_size(self) -> int | None:
        """Ranks of the job, if they are known."""
        size = self.body.get("world_size")
        return size if isinstance(size, int) else None


@dataclass(frozen=True, slots=True)
class KeptReport:
    """A report with events that has not gone on."""

    run: str
    launch_id: str
    report: StepReport


class Depot:
    """One file, one process; any thread.

    Args:
        path: The file, made if need be.
        max_bytes: Bound on the contents of batches.

    Attributes:
        given_up: Refused batches and reports removed for want of room.

    Raises:
        sqlite3.Error: The file is damaged or cannot be made.
    """

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = FULL")
        self._base.executescript(_SCHEMA)
        self._max_bytes = max_bytes
        self.given_up = 0
        self._count()

    @property
    def size(self) -> int:
        """Bytes of the batches on disk."""
        return self._bytes

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    def announce(self, launch_id: str, run: str, body: dict[str, Any]) -> bool:
        """Keep the body of POST /runs; False if the launch belongs to another run."""
        with self._transaction():
            self._base.execute(
                "INSERT INTO launches VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET heard = ?",
                (launch_id, run, json.dumps(body), time.time(), time.time()),
            )
            row = self._one("SELECT run FROM launches WHERE launch_id = ?", launch_id)
            return bool(row[0] == run)

    def launch(self, launch_id: str) -> LaunchRow | None:
        """A launch, or None if it was not announced here."""
        with self._lock:
            row = self._one("SELECT run, body FROM launches WHERE launch_id = ?", launch_id)
        return None if row is None else LaunchRow(row[0], json.loads(row[1]))

    def put(
        self, name: BatchName, *, digest: str, media_type: str, body: bytes, ready: bool
    ) -> Taken:
        """Take a batch; all or nothing.

        Args:
            name: Its id.
            digest: Of the body as it came.
            media_type: Of the body.
            body: Contents.
            ready: Whether it may go on as it is.

        Raises:
            DepotFull: It was not taken.
        """
        with self._transaction():
            known = self._one(
                "SELECT digest FROM batches WHERE launch_id = ? AND rank = ? AND sequence = ?",
                name.launch_id,
                name.rank,
                name.sequence,
            )
            if known is not None:
                return Taken.AGAIN if known[0] == digest else Taken.CONFLICT
            self._make_room(len(body))
            state = _State.READY if ready else _State.HELD
            row = (name.launch_id, name.rank, name.sequence, digest, media_type, state, body)
            self._base.execute(
                "INSERT INTO batches (launch_id, rank, sequence, digest, media_type, state, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            self._bytes += len(body)
            self._touch(name.launch_id)
            return Taken.NEW

    def held(self) -> list[Batch]:
        """Batches that wait for their reports, in the order in which they came."""
        return self._batches("WHERE state = ? ORDER BY id", _State.HELD)

    def first_ready(self) -> list[Batch]:
        """Of each launch the batch that goes on next, the one that came first in front."""
        return self._batches(
            "WHERE id IN (SELECT MIN(id) FROM batches WHERE state = ? GROUP BY launch_id) "
            "ORDER BY id",
            _State.READY,
        )

    def count_waiting(self) -> int:
        """Batches that have not gone on."""
        with self._lock:
            row = self._one("SELECT COUNT(*) FROM batches WHERE state <= ?", _State.READY)
            return int(row[0])

    def body(self, batch: Batch) -> bytes:
        """The contents of a batch that has not gone on."""
        with self._lock:
            return bytes(self._one("SELECT body FROM batches WHERE id = ?", batch.id)[0])

    def seal(self, batch: Batch, made: Made) -> None:
        """Replace a held batch by what goes on; the reports in it are done with."""
        with self._transaction():
            self._bytes += len(made.body) - self._length(batch)
            self._base.execute(
                "UPDATE batches SET state = ?, media_type = ?, body = ? WHERE id = ?",
                (_State.READY, made.media_type, made.body, batch.id),
            )
            self._remove_reports(
                "launch_id = ? AND step <= ? AND id <= ?",
                batch.name.launch_id,
                made.last_step,
                made.newest_report,
            )

    def sent(self, batch: Batch) -> None:
        """The next one has it; only its id and digest are kept."""
        with self._transaction():
            self._bytes -= self._length(batch)
            self._base.execute(
                "UPDATE batches SET state = ?, body = NULL WHERE id = ?", (_State.SENT, batch.id)
            )

    def refuse(self, batch: Batch, reason: str) -> None:
        """The next one will never take it; kept, with the reason, while there is room."""
        with self._transaction():
            self._base.execute(
                "UPDATE batches SET state = ?, reason = ? WHERE id = ?",
                (_State.REFUSED, reason, batch.id),
            )

    def keep(self, run: str, launch_id: str, reports: Sequence[StepReport]) -> None:
        """Keep reports until they have gone on; bounded, the oldest go first."""
        rows = [(run, launch_id, r.step, encode_reports([r])) for r in reports]
        with self._transaction():
            self._base.executemany(
                "INSERT INTO reports (run, launch_id, step, body) VALUES (?, ?, ?, ?)", rows
            )
            self._reports += len(rows)
            excess = self._reports - _MOST_KEPT_REPORTS
            if excess > 0:
                self.given_up += excess
                self._remove_reports("id IN (SELECT id FROM reports ORDER BY id LIMIT ?)", excess)

    def newest_report(self) -> int:
        """A number that later reports exceed."""
        with self._lock:
            return int(self._one("SELECT COALESCE(MAX(id), 0) FROM reports")[0])

    def reports_sent(self, launch_id: str, steps: Sequence[int], newest: int) -> None:
        """The next one has the reports of these steps up to that number."""
        marks = ", ".join("?" for _ in steps)
        with self._transaction():
            self._remove_reports(
                f"launch_id = ? AND id <= ? AND step IN ({marks})", launch_id, newest, *steps
            )

    def kept(self) -> list[KeptReport]:
        """Reports with events that have not gone on."""
        with self._lock, closing(self._base.cursor()) as cursor:
            rows = cursor.execute("SELECT run, launch_id, body FROM reports ORDER BY id").fetchall()
        return [
            KeptReport(run, launch_id, report)
            for run, launch_id, body in rows
            for report in decode_reports(body)
        ]

    def forget_old(self) -> None:
        """Forget launches that were not heard of for a month and of which nothing waits."""
        old = (
            "SELECT launch_id FROM launches WHERE heard < ? AND launch_id NOT IN "
            "(SELECT launch_id FROM batches WHERE state IN (0, 1))"
        )
        before = time.time() - _FORGET_SECONDS
        with self._transaction():
            gone = f"launch_id IN ({old})"
            bodies = f"SELECT COALESCE(SUM(LENGTH(body)), 0) FROM batches WHERE {gone}"
            self._bytes -= int(self._one(bodies, before)[0])
            self._base.execute(f"DELETE FROM batches WHERE {gone}", (before,))
            self._remove_reports(gone, before)
            self._base.execute(f"DELETE FROM launches WHERE {gone}", (before,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it reaches the disk, or nothing."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                self._count()
                raise

    def _count(self) -> None:
        self._bytes = int(self._one("SELECT COALESCE(SUM(LENGTH(body)), 0) FROM batches")[0])
        self._reports = int(self._one("SELECT COUNT(*) FROM reports")[0])

    def _one(self, query: str, *values: object) -> Any:
        with closing(self._base.cursor()) as cursor:
            return cursor.execute(query, values).fetchone()

    def _batches(self, where: str, *values: object) -> list[Batch]:
        columns = "id, launch_id, rank, sequence, media_type"
        with self._lock, closing(self._base.cursor()) as cursor:
            rows = cursor.execute(f"SELECT {columns} FROM batches {where}", values).fetchall()
        return [
            Batch(number, BatchName(launch, rank, sequence), media)
            for number, launch, rank, sequence, media in rows
        ]

    def _length(self, batch: Batch) -> int:
        return int(self._one("SELECT LENGTH(body) FROM batches WHERE id = ?", batch.id)[0] or 0)

    def _touch(self, launch_id: str) -> None:
        self._base.execute(
            "UPDATE launches SET heard = ? WHERE launch_id = ?", (time.time(), launch_id)
        )

    def _make_room(self, size: int) -> None:
        """Give up batches that were refused, the oldest first; nothing else that was taken."""
        refused = "SELECT COALESCE(SUM(LENGTH(body)), 0) FROM batches WHERE state = ?"
        if self._bytes - int(self._one(refused, _State.REFUSED)[0]) + size > self._max_bytes:
            raise DepotFull(f"{self._bytes} bytes wait already; allowed: {self._max_bytes}")
        while self._bytes + size > self._max_bytes:
            row = self._one(
                "SELECT id, LENGTH(body) FROM batches WHERE state = ? AND body IS NOT NULL "
                "ORDER BY id LIMIT 1",
                _State.REFUSED,
            )
            self._base.execute("UPDATE batches SET body = NULL WHERE id = ?", (row[0],))
            self._bytes -= int(row[1])
            self.given_up += 1

    def _remove_reports(self, where: str, *values: object) -> None:
        gone = self._base.execute(f"DELETE FROM reports WHERE {where}", values)
        self._reports -= gone.rowcount
