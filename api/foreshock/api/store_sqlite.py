"""The store in one SQLite file: the small installation, and the second opinion in tests.

Answers exactly as the ClickHouse store does. For a few runs at a time: a row takes some 150 bytes
and a heatmap reads every row of its role.
"""

from __future__ import annotations

import json
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from foreshock.api.rollup_plan import Stretch
from foreshock.api.store import (
    CHUNK_STEPS,
    SMALLEST_IS_WORST,
    LayerNames,
    Limits,
    SeriesKey,
    StoreBusy,
    StoreError,
    TensorKinds,
    View,
)
from foreshock.api.store_answers import BUCKETS, CELLS, risk_rows, with_layer_names
from foreshock.api.store_reads import RolledReads, RowsToRoll
from foreshock.api.store_schema import (
    FACT_TABLES,
    RISK_SCHEMA,
    ROLLUP_TABLES,
    STORED_TENSOR_FIELDS,
)
from foreshock.api.store_sqlite_query import (
    bounds_sql,
    event_page_sql,
    heatmap_sql,
    newest_sql,
    scalar_series_sql,
    tensor_series_sql,
)
from foreshock.api.store_sqlite_rolled import (
    BLOCKS,
    ROLLED_BLOCKS,
    ROLLUPS_THERE,
    blocks_sql,
    rolled_blocks_sql,
    rolled_bounds_sql,
    rolled_heatmap_sql,
    rolled_series_sql,
    rollups_there_sql,
    rows_to_roll_sql,
)
from foreshock.api.store_sqlite_schema import COLUMNS, KEYS, ddl, missing_columns
from foreshock.api.store_sqlite_values import table_of
from foreshock.api.store_sqlite_writing import (
    doubt_rollups,
    drop_replaced,
    insert,
    note,
    remove,
)
from foreshock.api.store_watch import Watch
from foreshock.monitor.record import ROLES
from foreshock.monitor.record.schema import EVENT_TYPE

__all__ = ["STORE_FILE", "SqliteStore", "copy_sqlite"]

STORE_FILE: Final = "store.sqlite"
"""Name of the copy in a backup."""

_STEPS: Final = pa.schema(
    [("step", pa.int64()), ("time", pa.timestamp("us", tz="UTC")), ("attempt", pa.uint32())]
)
_SCALARS: Final = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
_EVENTS: Final = pa.schema([pa.field("step", pa.int64()), *EVENT_TYPE])
_PLACED_EVENTS: Final = _EVENTS.insert(1, pa.field("position", pa.int64()))
_TENSORS: Final = pa.schema(
    [
        pa.field("step", pa.int64()),
        *(
            pa.field("layer", pa.uint16()) if field.name == "layer" else field
            for field in STORED_TENSOR_FIELDS
        ),
    ]
)
# Virtual-machine steps between two looks at the clock.
_LOOK_EVERY: Final = 20_000
_DAY: Final = 86_400
# Tensor rows rolled up at a time: they pass through Python, and other threads wait.
_PIECE_ROWS: Final = 20_000
_SWEEP_SECONDS: Final = 3600.0


class SqliteStore(RolledReads):
    """Tables of facts and of risk in one file.

    Args:
        path: The file; one process at a time.
        layer_names: Names behind the stored ids.
        limits: What one query may cost; memory is not limited.
        fsync: Whether facts are synced to disk before `append` returns.
        retention_days: Facts received longer ago are deleted; 0 keeps them.
        rollup_retention_days: Rollups made longer ago are deleted; 0 keeps them.

    Raises:
        StoreError: The file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        layer_names: LayerNames,
        *,
        limits: Limits | None = None,
        fsync: bool = True,
        retention_days: int = 0,
        rollup_retention_days: int = 0,
    ) -> None:
        super().__init__(layer_names, _PIECE_ROWS, expires=retention_days > 0)
        self._path = path
        self._limits = limits or Limits()
        self._fsync = fsync
        self._retention_days = retention_days
        self._rollup_retention_days = rollup_retention_days
        self._watch = Watch(self._limits.seconds)
        self._lock = threading.Lock()
        self._connections: list[sqlite3.Connection] = []
        self._idle: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._connect()
            self._make_tables()
            for _ in range(self._limits.clients):
                self._idle.put(self._connect())
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise StoreError(f"the store in {path} does not open: {error}") from error
        self._swept_at = -_SWEEP_SECONDS

    def _connect(self) -> sqlite3.Connection:
        # Given from thread to thread, one at a time; transactions are begun by hand.
        connection = sqlite3.connect(
            self._path, timeout=self._limits.seconds, check_same_thread=False, isolation_level=None
        )
        self._connections.append(connection)
        synchronous = "FULL" if self._fsync else "NORMAL"
        for pragma in ("journal_mode=WAL", f"synchronous={synchronous}", "temp_store=MEMORY"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    def _make_tables(self) -> None:
        with self._transaction() as writer:
            for statement in ddl():
                writer.execute(statement)
            for table in COLUMNS:
                rows = writer.execute(f"SELECT name FROM pragma_table_info('{table}')")
                for statement in missing_columns(table, {row[0] for row in rows}):
                    writer.execute(statement)

    def close(self) -> None:
        """Close the file; nothing may be running."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def hung_seconds(self) -> float:
        """Above 0 when a query outlived its limit by more than ten seconds: restart the service."""
        return self._watch.hung_seconds()

    def free_bytes(self) -> int | None:
        """Free space on the disk of the store."""
        return shutil.disk_usage(self._path.parent).free

    # Writing

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._watch.running():
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                except BaseException:
                    self._writer.execute("ROLLBACK")
                    raise
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                raise StoreError(str(error)) from error

    def append(self, groups: Sequence[Mapping[str, pa.Table]]) -> None:
        """Insert the rows of several batches in one transaction; durable on return.

        Raises:
            StoreError: It failed, and nothing is in.
        """
        now = int(time.time())
        with self._transaction() as writer:
            for group in groups:
                for table, rows in group.items():
                    insert(writer, table, rows)
                note(writer, group, now)
        if time.monotonic() - self._swept_at > _SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            self._drop_old(now)

    def discard_after(self, commit: int) -> int:
        """Remove facts of batches that were never acknowledged.

        Args:
            commit: Number of the newest acknowledged batch.

        Returns:
            How many rows were removed.

        Raises:
            StoreError: It failed; call again before anything is appended.
        """
        with self._transaction() as writer:
            removed = remove(writer, "ver > ?", commit)
            doubt_rollups(writer, commit + 1)
            writer.execute("DELETE FROM vocabulary WHERE ver > ?", (commit,))
        return removed

    def discard_between(self, first: int, last: int) -> int:
        """`discard_after` for the batches of these numbers, ends included; others may append."""
        with self._transaction() as writer:
            doubt_rollups(writer, first)
            return remove(writer, "ver BETWEEN ? AND ?", first, last)

    def _drop_old(self, now: int) -> None:
        with self._transaction() as writer:
            if self._retention_days:
                remove(writer, "received < ?", now - self._retention_days * _DAY)
            if self._rollup_retention_days:
                before = now - self._rollup_retention_days * _DAY
                for table in ROLLUP_TABLES:
                    writer.execute(f"DELETE FROM {table} WHERE received < ?", (before,))

    def backup(self, folder: Path) -> None:
        """Write a copy of the file into a new folder.

        Raises:
            StoreError: It failed.
        """
        try:
            folder.mkdir(parents=True)
            copy_sqlite(self._path, folder / STORE_FILE)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the backup failed: {error}") from error

    def drop_risks_after(self, version: int) -> None:
        """Remove risk rows that were added later than this, nanoseconds since 1970.

        Raises:
            StoreError: It failed.
        """
        with self._transaction() as writer:
            writer.execute("DELETE FROM risk WHERE ver > ?", (version,))

    def delete_run(self, run_id: str) -> None:
        """Remove everything of a run.

        Raises:
            StoreError: It failed, and nothing was removed.
        """
        with self._rolling, self._transaction() as writer:
            for table in (*FACT_TABLES, "risk", *ROLLUP_TABLES, "appended", "vocabulary"):
                writer.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Add risk rows (`RISK_SCHEMA`) of several (run_id, attempt), in one transaction.

        The newest row of a step and horizon wins.

        Raises:
            StoreError: It failed.
        """
        version = time.time_ns()
        with self._transaction() as writer:
            for run_id, attempt, table in groups:
                insert(writer, "risk", risk_rows(run_id, attempt, version, table))

    # Reading

    def _read(self, sql: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        try:
            connection = self._idle.get(timeout=self._limits.seconds)
        except queue.Empty:
            raise StoreBusy("the store is busy; try again") from None
        until = time.monotonic() + self._limits.seconds
        try:
            with self._watch.running():
                connection.set_progress_handler(lambda: time.monotonic() > until, _LOOK_EVERY)
                return connection.execute(sql, dict(parameters)).fetchall()
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error
        finally:
            self._idle.put(connection)

    def risk_history(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """Risk rows (`RISK_SCHEMA`), by step and horizon; attempt None is the default view."""
        view = View(run_id, attempt, first_step, last_step)
        sql = newest_sql(view, "risk", RISK_SCHEMA.names)
        return table_of(self._read(sql, view.parameters), RISK_SCHEMA)

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        """The newest step of an attempt with a risk row, or None."""
        sql = (
            "SELECT step FROM risk WHERE run_id = :run AND attempt = :attempt"
            " ORDER BY step DESC LIMIT 1"
        )
        rows = self._read(sql, {"run": run_id, "attempt": attempt})
        return int(rows[0][0]) if rows else None

    def bounds(self, view: View) -> tuple[int, int] | None:
        """First and last step of a view, or None if it holds no record."""
        ((low, high),) = self._read(bounds_sql(view), view.parameters)
        return None if low is None else (int(low), int(high))

    def chunks(self, view: View) -> list[int]:
        """Which chunks of `CHUNK_STEPS` steps hold records of a view, rising."""
        found, first = [], view.first_step
        while first <= view.last_step:
            rest = View(view.run_id, view.attempt, first, view.last_step)
            bounds = self.bounds(rest)
            if bounds is None:
                break
            found.append(bounds[0] // CHUNK_STEPS)
            first = (found[-1] + 1) * CHUNK_STEPS
        return found

    def step_window(self, view: View) -> pa.Table:
        """step, time and attempt of the records of a view, by step."""
        return self._rows(view, "steps", _STEPS)

    def scalar_rows(self, view: View) -> pa.Table:
        """step, name and value of the scalars of a view, by step."""
        return self._rows(view, "scalars", _SCALARS)

    def event_rows(self, view: View) -> pa.Table:
        """`step` and the columns of an event, by step and position."""
        return self._rows(view, "events", _EVENTS)

    def event_page(
        self, view: View, kind: str | None, after: tuple[int, int], limit: int
    ) -> pa.Table:
        """The first `limit` events of a view behind a step and position; see `Store`."""
        values = view.parameters | {"after_step": after[0], "after_position": after[1]}
        values |= {"limit": limit, "kind": kind}
        sql = event_page_sql(view, _PLACED_EVENTS.names, kind_given=kind is not None)
        return table_of(self._read(sql, values), _PLACED_EVENTS)

    def tensor_rows(self, view: View) -> pa.Table:
        """`step` and `STORED_TENSOR_FIELDS`, by step and layer in stored order."""
        rows = self._rows(view, "tensor_stats", _TENSORS)
        return with_layer_names(rows, self._layer_names(view.run_id))

    def _rows(self, view: View, table: str, schema: pa.Schema) -> pa.Table:
        return table_of(self._read(newest_sql(view, table, schema.names), view.parameters), schema)

    def scalar_names(self, run_id: str) -> list[str]:
        """Names of the scalars that a run ever recorded, sorted."""
        return self._words(run_id, "scalar")

    def tensor_kinds(self, run_id: str) -> TensorKinds:
        """Roles and formats of a run's tensors."""
        roles = self._words(run_id, "role")
        return TensorKinds(
            roles=[role for role in ROLES if role in roles], formats=self._words(run_id, "format")
        )

    def _words(self, run_id: str, what: str) -> list[str]:
        sql = "SELECT word FROM vocabulary WHERE run_id = :run AND what = :what ORDER BY word"
        return [row[0] for row in self._read(sql, {"run": run_id, "what": what})]

    def counts(self, run_id: str, *, exact: bool = True) -> dict[str, int]:
        """Rows per table of facts: distinct keys, or raw rows as they lie on disk."""
        found = {}
        for table in FACT_TABLES:
            what = ", ".join(KEYS[table]) if exact else "*"
            rows = f"SELECT {'DISTINCT ' if exact else ''}{what} FROM {table} WHERE run_id = :run"
            found[table] = int(self._read(f"SELECT count(*) FROM ({rows})", {"run": run_id})[0][0])
        return found

    # For series and heatmaps

    def _rolled_bounds(self, view: View) -> tuple[int, int] | None:
        ((low, high),) = self._read(rolled_bounds_sql(view), view.parameters)
        return None if low is None else (int(low), int(high))

    def _blocks(self, view: View) -> tuple[pa.Table, pa.Table]:
        rolled = self._read(rolled_blocks_sql(view), view.parameters)
        return table_of(rolled, ROLLED_BLOCKS), table_of(
            self._read(blocks_sql(view), view.parameters), BLOCKS
        )

    def _scalar_buckets(self, view: View, values: Mapping[str, Any]) -> pa.Table:
        sql = scalar_series_sql(view)
        return table_of(self._read(sql, {**view.parameters, **values}), BUCKETS)

    def _tensor_buckets(self, view: View, key: SeriesKey, values: Mapping[str, Any]) -> pa.Table:
        sql = tensor_series_sql(view, key)
        return table_of(self._read(sql, {**view.parameters, **values}), BUCKETS)

    def _cells(self, view: View, statistic: str, values: Mapping[str, Any]) -> pa.Table:
        sql = heatmap_sql(
            view,
            statistic,
            smallest=statistic in SMALLEST_IS_WORST,
            format_given=values["format"] is not None,
        )
        return table_of(self._read(sql, {**view.parameters, **values}), CELLS)

    def _rolled_buckets(
        self, run_id: str, stretches: Sequence[Stretch], values: Mapping[str, Any]
    ) -> pa.Table:
        sql = rolled_series_sql(format_given="format" in values)
        given = {"run": run_id, "stretches": _listed(stretches), **values}
        return table_of(self._read(sql, given), BUCKETS)

    def _rolled_cells(
        self, run_id: str, stretches: Sequence[Stretch], values: Mapping[str, Any]
    ) -> pa.Table:
        smallest = values["name"] in SMALLEST_IS_WORST
        sql = rolled_heatmap_sql(smallest=smallest, format_given=values["format"] is not None)
        given = {"run": run_id, "stretches": _listed(stretches), **values}
        return table_of(self._read(sql, given), CELLS)

    # Rollups

    def _to_roll(self, table: str, rows: RowsToRoll, layers: tuple[int, int]) -> pa.Table:
        sql, schema = rows_to_roll_sql()[table]
        given = rows.parameters | {"low": layers[0], "high": layers[1]}
        return table_of(self._read(sql, given), schema)

    def _rollups_there(self, rows: RowsToRoll) -> pa.Table:
        found = self._read(rollups_there_sql(), rows.parameters)
        return table_of(found, ROLLUPS_THERE)

    def _keep_rollups(self, table: str, rows: pa.Table) -> None:
        now = pa.repeat(pa.scalar(int(time.time())), rows.num_rows)
        with self._transaction() as writer:
            insert(writer, table, rows.append_column("received", now))
            if table == "steps_64":
                drop_replaced(writer, rows)


def _listed(stretches: Sequence[Stretch]) -> str:
    return json.dumps([[each.attempt, each.first, each.last] for each in stretches])


def copy_sqlite(source: Path, target: Path) -> None:
    """A consistent copy of an SQLite file that others may be writing to.

    Raises:
        sqlite3.Error: One of the two cannot be used.
    """
    with closing(sqlite3.connect(source)) as original, closing(sqlite3.connect(target)) as copy:
        original.backup(copy)
