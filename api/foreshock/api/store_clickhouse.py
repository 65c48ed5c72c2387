"""The store in ClickHouse: the same tables and queries in this process and on servers.

Written by one thread, read by many. Where two rows have one key, the newest batch's wins, merged
or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.rollup_plan import Stretch
from foreshock.api.store import (
    CHUNK_STEPS,
    SMALLEST_IS_WORST,
    LayerNames,
    SeriesKey,
    StoreError,
    StoreUnreachable,
    TensorKinds,
    View,
)
from foreshock.api.store_answers import risk_rows, with_layer_names
from foreshock.api.store_engine import Engine
from foreshock.api.store_query import (
    bounds_sql,
    event_page_sql,
    heatmap_sql,
    scalar_series_sql,
    tensor_series_sql,
    view_sql,
)
from foreshock.api.store_query_rolled import (
    blocks_sql,
    rolled_blocks_sql,
    rolled_bounds_sql,
    rolled_heatmap_sql,
    rolled_series_sql,
    rollups_there_sql,
    rows_to_roll_sql,
)
from foreshock.api.store_reads import RolledReads, RowsToRoll, stamped
from foreshock.api.store_schema import (
    FACT_TABLES,
    RISK_SCHEMA,
    ROLLUP_TABLES,
    STORED_TENSOR_FIELDS,
    TENSOR_KEY,
    TableOptions,
    ddl,
)
from foreshock.monitor.record import ROLES

__all__ = ["ClickHouseStore"]

# A batch holds no key twice, and reads take the newest batch's row, merged or not; looking for
# twins in every INSERT costs as much as all the rest of it.
# An INSERT of a few thousand rows has no work for a second thread, and making threads costs as much
# as it does.
_FACT_SETTINGS: Final = {"optimize_on_insert": 0, "max_threads": 1, "max_insert_threads": 1}

# Tensor rows rolled up at a time: some 60 MB.
_PIECE_ROWS: Final = 250_000


class ClickHouseStore(RolledReads):
    """Tables of facts and of risk.

    Args:
        engine: Where they are; closed with the store.
        layer_names: Names behind the stored ids.
        options: How the tables are made.
    """

    def __init__(
        self, engine: Engine, layer_names: LayerNames, options: TableOptions | None = None
    ) -> None:
        """Make the tables if they are not there.

        Raises:
            StoreError: They cannot be made.
        """
        self._options = options or TableOptions()
        super().__init__(layer_names, _PIECE_ROWS, expires=self._options.retention_days > 0)
        self._engine = engine
        self._writers = {table: self._engine.writer() for table in FACT_TABLES}
        self._beside = ThreadPoolExecutor(len(FACT_TABLES), "foreshock-insert")
        self._derived = self._engine.writer()
        self._derived_lock = threading.Lock()
        # Removes what is not acknowledged, while others append.
        self._remover = self._engine.writer()
        self._remover_lock = threading.Lock()
        self._roller = self._engine.writer()
        for statement in ddl(self._options):
            self._derived.command(statement)

    def close(self) -> None:
        """Close the engine; nothing may be running."""
        self._beside.shutdown()
        self._engine.close()

    def hung_seconds(self) -> float:
        """Above 0 when a query outlived its limit by more than ten seconds: restart the service."""
        return self._engine.hung_seconds()

    def free_bytes(self) -> int | None:
        """Free space on the disk of the store; None where that is for its servers to watch."""
        return self._engine.free_bytes()

    # Writing: the ingest thread

    def append(self, groups: Sequence[Mapping[str, pa.Table]]) -> None:
        """Insert the rows of several batches, one INSERT per table; returns once they are durable.

        Raises:
            StoreUnreachable: Nothing is in.
            StoreError: It failed, and some rows may be in: call `discard_after`.
        """
        tables = {}
        for table in FACT_TABLES:
            rows = [group[table] for group in groups if table in group]
            if rows:
                tables[table] = pa.concat_tables(rows).unify_dictionaries()
        # steps last: a step that can be seen has its other rows.
        steps = tables.pop("steps", None)
        self._insert_side_by_side(tables)
        if steps is not None:
            try:
                self._insert("steps", steps)
            except StoreUnreachable as error:
                raise StoreError(str(error)) if tables else error from error

    def _insert_side_by_side(self, tables: Mapping[str, pa.Table]) -> None:
        # However few its rows, an INSERT waits for the disk a dozen times.
        jobs = [self._beside.submit(self._insert, table, rows) for table, rows in tables.items()]
        failures = [error for error in (job.exception() for job in jobs) if error is not None]
        unreachable = [error for error in failures if isinstance(error, StoreUnreachable)]
        if unreachable and len(unreachable) < len(jobs):
            # Another of them may be in.
            raise StoreError(str(failures[0])) from failures[0]
        if failures:
            raise failures[0]

    def _insert(self, table: str, rows: pa.Table) -> None:
        self._writers[table].insert(table, rows, _FACT_SETTINGS | self._token(table, rows))

    def _token(self, table: str, rows: pa.Table) -> dict[str, Any]:
        # The transport may send a request again whose connection broke; every try of ours has
        # numbers of its own, so equal tokens are one and the same INSERT.
        if not self._options.server:
            return {}
        span = pc.min_max(rows["ver"])
        token = f"{table}-{span['min']}-{span['max']}"
        return {"insert_deduplicate": 1, "insert_deduplication_token": token}

    def discard_after(self, commit: int) -> int:
        """Remove facts of batches that were never acknowledged.

        Args:
            commit: Number of the newest acknowledged batch.

        Returns:
            How many rows were removed.

        Raises:
            StoreError: It failed; call again before anything is appended.
        """
        return self._discard("ver >= {low:UInt64}", {"low": commit + 1})

    def discard_between(self, first: int, last: int) -> int:
        """`discard_after` for the batches of these numbers, ends included; others may append."""
        return self._discard(
            "ver BETWEEN {low:UInt64} AND {high:UInt64}", {"low": first, "high": last}
        )

    def _discard(self, which: str, values: Mapping[str, int]) -> int:
        # Rollups that may have counted such facts go too, with what they replaced, and are made
        # again.
        doubtful = "SELECT run_id, attempt, block FROM steps_64 WHERE newest >= {low:Int64}"
        self._discard_from("steps_64", f"(run_id, attempt, block) IN ({doubtful})", values)
        return sum(self._discard_from(table, which, values) for table in FACT_TABLES)

    def _discard_from(self, table: str, which: str, values: Mapping[str, int]) -> int:
        sql = f"SELECT count() AS n FROM {table} WHERE {which}"
        count = int(self._engine.read(sql, values)["n"][0].as_py())
        if count:
            held = self._options.held_in(table)
            with self._remover_lock:
                self._remover.command(
                    f"ALTER TABLE {held} DELETE WHERE {which} SETTINGS mutations_sync = 2", values
                )
        return count

    def backup(self, folder: Path) -> None:
        """Write a copy of everything into a new folder; parts of tables never change.

        Raises:
            StoreError: It failed, or the engine runs on servers.
        """
        # Else a rollup might be in the copy without its values.
        with self._rolling:
            self._engine.backup(folder)

    def drop_risks_after(self, version: int) -> None:
        """Remove risk rows that were added later than this, nanoseconds since 1970.

        Raises:
            StoreError: It failed.
        """
        with self._derived_lock:
            self._derived.command(
                "ALTER TABLE risk DELETE WHERE ver > {version:UInt64} SETTINGS mutations_sync = 2",
                {"version": version},
            )

    def delete_run(self, run_id: str) -> None:
        """Remove everything of a run; on return it is gone from the disk.

        Raises:
            StoreError: It failed, and some may be left; call again.
        """
        with self._rolling, self._derived_lock:
            for table in (*FACT_TABLES, "risk", *ROLLUP_TABLES):
                held = self._options.held_in(table)
                self._derived.command(
                    f"ALTER TABLE {held} DELETE WHERE run_id = {{run:String}}"
                    " SETTINGS mutations_sync = 2",
                    {"run": run_id},
                )

    # Writing: live analysis

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Add risk rows (`RISK_SCHEMA`) of several (run_id, attempt), in one INSERT.

        The newest row of a step and horizon wins.

        Raises:
            StoreError: It failed.
        """
        version = time.time_ns()
        tables = [risk_rows(run_id, attempt, version, table) for run_id, attempt, table in groups]
        if tables:
            with self._derived_lock:
                self._derived.insert("risk", pa.concat_tables(tables))

    # Reading

    def risk_history(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """Risk rows (`RISK_SCHEMA`), by step and horizon; attempt None is the default view."""
        view = View(run_id, attempt, first_step, last_step)
        columns = ", ".join(RISK_SCHEMA.names)
        sql = f"SELECT {columns} {view_sql(view, 'risk')}"
        sql += " ORDER BY step, horizon, ver DESC LIMIT 1 BY step, horizon"
        return self._engine.read(sql, view.parameters).cast(RISK_SCHEMA)

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        """The newest step of an attempt with a risk row, or None."""
        view = View(run_id, attempt)
        sql = f"SELECT max(step) AS newest, count() AS n {view_sql(view, 'risk')}"
        row = self._engine.read(sql, view.parameters).to_pylist()[0]
        return int(row["newest"]) if row["n"] else None

    def step_window(self, view: View) -> pa.Table:
        """step, time and attempt of the records of a view, by step."""
        sql = f"SELECT step, time, attempt {view_sql(view, 'steps')}"
        sql += " ORDER BY step, attempt DESC, ver DESC LIMIT 1 BY step"
        return self._engine.read(sql, view.parameters)

    def scalar_rows(self, view: View) -> pa.Table:
        """step, name and value of the scalars of a view, by step."""
        sql = f"SELECT step, name, value {view_sql(view, 'scalars')}"
        sql += " ORDER BY step, name, ver DESC LIMIT 1 BY step, name"
        return self._engine.read(sql, view.parameters)

    def scalar_names(self, run_id: str) -> list[str]:
        """Names of the scalars that a run ever recorded, sorted."""
        sql = (
            "SELECT DISTINCT name FROM scalars WHERE run_id = {run:String} UNION DISTINCT"
            " SELECT DISTINCT name FROM values_64 WHERE run_id = {run:String} AND role = ''"
        )
        return sorted(self._engine.read(sql, {"run": run_id})["name"].to_pylist())

    def tensor_kinds(self, run_id: str) -> TensorKinds:
        """Roles and formats of a run's tensors."""
        sql = (
            "SELECT groupUniqArray(role) AS roles, groupUniqArray(format) AS formats"
            " FROM (SELECT DISTINCT role, format FROM tensor_stats WHERE run_id = {run:String}"
            " UNION ALL SELECT DISTINCT role, format FROM values_64"
            " WHERE run_id = {run:String} AND role != '')"
        )
        row = self._engine.read(sql, {"run": run_id}).to_pylist()[0]
        return TensorKinds(
            roles=[role for role in ROLES if role in row["roles"]], formats=sorted(row["formats"])
        )

    def event_rows(self, view: View) -> pa.Table:
        """`step` and the columns of an event, by step and position."""
        sql = (
            "SELECT step, kind, micro_batch, layer, role, rank, detail"
            f" {view_sql(view, 'events')} ORDER BY step, position, ver DESC"
            " LIMIT 1 BY step, position"
        )
        return self._engine.read(sql, view.parameters)

    def event_page(
        self, view: View, kind: str | None, after: tuple[int, int], limit: int
    ) -> pa.Table:
        """The first `limit` events of a view behind a step and position; see `Store`."""
        values = view.parameters | {"after_step": after[0], "after_position": after[1]}
        values |= {"limit": limit} | ({} if kind is None else {"kind": kind})
        return self._engine.read(event_page_sql(view, kind_given=kind is not None), values)

    def tensor_rows(self, view: View) -> pa.Table:
        """`step` and `STORED_TENSOR_FIELDS`, by step and layer in stored order."""
        key = ", ".join(TENSOR_KEY)
        names = ", ".join(field.name for field in STORED_TENSOR_FIELDS)
        sql = f"SELECT step, {names} {view_sql(view, 'tensor_stats')}"
        sql += f" ORDER BY step, {key}, ver DESC LIMIT 1 BY {key}"
        rows = self._engine.read(sql, view.parameters)
        return with_layer_names(rows, self._layer_names(view.run_id))

    def chunks(self, view: View) -> list[int]:
        """Which chunks of `CHUNK_STEPS` steps hold records of a view, rising."""
        sql = f"SELECT DISTINCT intDiv(step, {CHUNK_STEPS}) AS chunk {view_sql(view, 'steps')}"
        found = self._engine.read(sql + " ORDER BY chunk", view.parameters)["chunk"]
        return [int(chunk) for chunk in found.to_pylist()]

    def bounds(self, view: View) -> tuple[int, int] | None:
        """First and last step of a view, or None if it holds no record."""
        return self._bounds(bounds_sql(view), view.parameters)

    def counts(self, run_id: str, *, exact: bool = True) -> dict[str, int]:
        """Rows per table of facts: distinct keys, or raw rows as they lie on disk."""
        keys = {
            "steps": "attempt, step",
            "scalars": "attempt, step, name",
            "events": "attempt, step, position",
            "tensor_stats": ", ".join(TENSOR_KEY),
        }
        found = {}
        for table, key in keys.items():
            what = f"uniqExact({key})" if exact else "count()"
            sql = f"SELECT {what} AS n FROM {table} WHERE run_id = {{run:String}}"
            found[table] = int(self._engine.read(sql, {"run": run_id})["n"][0].as_py())
        return found

    # For series and heatmaps

    def _held_bounds(self, view: View) -> tuple[int, int] | None:
        since = self._facts_since()
        return self._bounds(bounds_sql(view, aged=since > 0), view.parameters | {"since": since})

    def _rolled_bounds(self, view: View) -> tuple[int, int] | None:
        since = self._rollups_since()
        sql = rolled_bounds_sql(view, aged=since > 0)
        return self._bounds(sql, view.parameters | {"since": since})

    def _bounds(self, sql: str, values: Mapping[str, Any]) -> tuple[int, int] | None:
        row = self._engine.read(sql, values).to_pylist()[0]
        return (int(row["low"]), int(row["high"])) if row["n"] else None

    def _blocks(self, view: View) -> tuple[pa.Table, pa.Table]:
        since, rolled_since = self._facts_since(), self._rollups_since()
        rolled = rolled_blocks_sql(view, aged=rolled_since > 0)
        raw = blocks_sql(view, aged=since > 0)
        return (
            self._engine.read(rolled, view.parameters | {"since": rolled_since}),
            self._engine.read(raw, view.parameters | {"since": since}),
        )

    def _facts_since(self) -> int:
        return _since(self._options.retention_days)

    def _rollups_since(self) -> int:
        return _since(self._options.rollup_retention_days)

    def _scalar_buckets(self, view: View, values: Mapping[str, Any]) -> pa.Table:
        return self._engine.read(scalar_series_sql(view), view.parameters | dict(values))

    def _tensor_buckets(self, view: View, key: SeriesKey, values: Mapping[str, Any]) -> pa.Table:
        return self._engine.read(tensor_series_sql(view, key), view.parameters | dict(values))

    def _cells(self, view: View, statistic: str, values: Mapping[str, Any]) -> pa.Table:
        sql = heatmap_sql(
            view,
            statistic,
            smallest=statistic in SMALLEST_IS_WORST,
            format_given=values["format"] is not None,
        )
        return self._engine.read(sql, view.parameters | _given(values))

    def _rolled_buckets(
        self, run_id: str, stretches: Sequence[Stretch], values: Mapping[str, Any]
    ) -> pa.Table:
        sql = rolled_series_sql(format_given="format" in values)
        rows = self._engine.read(sql, _of_stretches(run_id, stretches) | dict(values))
        names = ["finite" if name == "held" else name for name in rows.column_names]
        return rows.rename_columns(names)

    def _rolled_cells(
        self, run_id: str, stretches: Sequence[Stretch], values: Mapping[str, Any]
    ) -> pa.Table:
        smallest = values["name"] in SMALLEST_IS_WORST
        sql = rolled_heatmap_sql(smallest=smallest, format_given=values["format"] is not None)
        return self._engine.read(sql, _of_stretches(run_id, stretches) | _given(values))

    # Rollups

    def _to_roll(self, table: str, rows: RowsToRoll, layers: tuple[int, int]) -> pa.Table:
        sql = rows_to_roll_sql()[table]
        return self._engine.read(sql, rows.parameters | {"low": layers[0], "high": layers[1]})

    def _rollups_there(self, rows: RowsToRoll) -> pa.Table:
        return self._engine.read(rollups_there_sql(), rows.parameters)

    def _disown(self, rows: RowsToRoll, blocks: pa.Array, version: int) -> None:
        # A merge keeps the newest values alone, while the blocks are still known by the old ones.
        nothing = pa.repeat(pa.scalar(0, pa.int64()), len(blocks))
        names = ("facts", "versions", "newest", "held", "first_step", "last_step")
        table = pa.table({"block": blocks} | dict.fromkeys(names, nothing))
        self._keep_rollups("steps_64", stamped(table, rows, version))

    def _keep_rollups(self, table: str, rows: pa.Table) -> None:
        self._roller.insert(table, rows)


_DAY: Final = 86_400
# Rows of a batch go into their tables one after the other.
_MARGIN_SECONDS: Final = 600


def _since(days: int) -> int:
    """Rows received before this time (seconds since 1970) may be gone; 0 = none."""
    return int(time.time()) - days * _DAY + _MARGIN_SECONDS if days else 0


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _of_stretches(run_id: str, stretches: Sequence[Stretch]) -> dict[str, Any]:
    return {
        "run": run_id,
        "attempts": [each.attempt for each in stretches],
        "firsts": [each.first for each in stretches],
        "lasts": [each.last for each in stretches],
        "low": stretches[0].first,
        "high": stretches[-1].last,
    }
