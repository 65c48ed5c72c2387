"""The store in ClickHouse: the same tables and queries in this process and on servers.

Written by one thread, read by many. Where two rows have one key, the newest batch's wins, merged
or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.store import (
    CHUNK_STEPS,
    SMALLEST_IS_WORST,
    Heatmap,
    LayerNames,
    Series,
    SeriesKey,
    Store,
    TensorKinds,
    View,
)
from foreshock.api.store_answers import (
    bucket_width,
    grid,
    risk_rows,
    series,
    with_layer_names,
    within,
)
from foreshock.api.store_engine import Engine
from foreshock.api.store_query import (
    bounds_sql,
    heatmap_sql,
    scalar_series_sql,
    tensor_series_sql,
    view_sql,
)
from foreshock.api.store_schema import (
    FACT_TABLES,
    RISK_SCHEMA,
    STORED_TENSOR_FIELDS,
    TENSOR_KEY,
    TableOptions,
    ddl,
)
from foreshock.monitor.record import ROLES

__all__ = ["ClickHouseStore"]

# A batch holds no key twice, and reads take the newest batch's row, merged or not; looking for
# twins in every INSERT costs as much as all the rest of it.
_FACT_SETTINGS: Final = {"optimize_on_insert": 0}


class ClickHouseStore(Store):
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
        self._engine = engine
        self._layer_names = layer_names
        self._options = options or TableOptions()
        self._facts = self._engine.writer()
        self._derived = self._engine.writer()
        self._derived_lock = threading.Lock()
        # Removes what is not acknowledged, while others append.
        self._remover = self._engine.writer()
        self._remover_lock = threading.Lock()
        for statement in ddl(self._options):
            self._facts.command(statement)

    def close(self) -> None:
        """Close the engine; nothing may be running."""
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
            StoreError: It failed, and some rows may be in: call `discard_after`.
        """
        # steps last: a step that can be seen has its other rows.
        for table in reversed(FACT_TABLES):
            rows = [group[table] for group in groups if table in group]
            if rows:
                together = pa.concat_tables(rows).unify_dictionaries()
                self._facts.insert(table, together, _FACT_SETTINGS | self._token(table, together))

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
        return self._discard("ver > {low:UInt64}", {"low": commit})

    def discard_between(self, first: int, last: int) -> int:
        """`discard_after` for the batches of these numbers, ends included; others may append."""
        return self._discard(
            "ver BETWEEN {low:UInt64} AND {high:UInt64}", {"low": first, "high": last}
        )

    def _discard(self, which: str, values: Mapping[str, int]) -> int:
        removed = 0
        for table in FACT_TABLES:
            sql = f"SELECT count() AS n FROM {table} WHERE {which}"
            count = int(self._engine.read(sql, values)["n"][0].as_py())
            if count:
                held = self._options.held_in(table)
                with self._remover_lock:
                    self._remover.command(
                        f"ALTER TABLE {held} DELETE WHERE {which} SETTINGS mutations_sync = 2",
                        values,
                    )
            removed += count
        return removed

    def backup(self, folder: Path) -> None:
        """Write a copy of everything into a new folder; parts of tables never change.

        Raises:
            StoreError: It failed, or the engine runs on servers.
        """
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
        with self._derived_lock:
            for table in (*FACT_TABLES, "risk"):
                self._derived.command(
                    f"ALTER TABLE {table} DELETE WHERE run_id = {{run:String}}"
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
        sql = "SELECT DISTINCT name FROM scalars WHERE run_id = {run:String}"
        return sorted(self._engine.read(sql, {"run": run_id})["name"].to_pylist())

    def tensor_kinds(self, run_id: str) -> TensorKinds:
        """Roles and formats of a run's tensors."""
        sql = (
            "SELECT groupUniqArray(role) AS roles, groupUniqArray(format) AS formats"
            " FROM tensor_stats WHERE run_id = {run:String}"
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
        row = self._engine.read(bounds_sql(view), view.parameters).to_pylist()[0]
        return (int(row["low"]), int(row["high"])) if row["n"] else None

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

    def scalar_series(self, view: View, name: str, points: int) -> Series:
        """One scalar in at most `points` buckets of equal width in steps."""
        bounds = self.bounds(view)
        if bounds is None:
            return series(None)
        view = within(view, bounds)
        values = {"name": name, "origin": bounds[0], "width": bucket_width(bounds, points)}
        return series(self._engine.read(scalar_series_sql(view), view.parameters | values))

    def tensor_series(self, view: View, key: SeriesKey, points: int) -> Series:
        """One statistic of one tensor in at most `points` buckets of equal width in steps."""
        bounds = self.bounds(view)
        if bounds is None:
            return series(None)
        view = within(view, bounds)
        values = key.parameters | {"origin": bounds[0], "width": bucket_width(bounds, points)}
        sql = tensor_series_sql(view, key)
        return series(self._engine.read(sql, view.parameters | values))

    def heatmap(
        self, view: View, role: str, statistic: str, points: int, number_format: str | None = None
    ) -> Heatmap:
        """The worst value per layer and bucket, over calls and experts; layers in stored order."""
        bounds = self.bounds(view)
        if bounds is None:
            return Heatmap(steps=(), values={})
        view = within(view, bounds)
        width = bucket_width(bounds, points)
        values: dict[str, Any] = {"role": role, "origin": bounds[0], "width": width}
        if number_format is not None:
            values["format"] = number_format
        smallest = statistic in SMALLEST_IS_WORST
        sql = heatmap_sql(
            view, statistic, smallest=smallest, format_given=number_format is not None
        )
        rows = self._engine.read(sql, view.parameters | values)
        steps = tuple(range(bounds[0], bounds[1] + 1, width))
        names = self._layer_names(view.run_id)
        return Heatmap(steps=steps, values=grid(rows, names, len(steps)))
