"""Tables of the store, as ClickHouse DDL and as the Arrow schemas that go in and out.

The columns of tensor statistics are those of the record; run, attempt and layer are ids. Every fact
carries `ver`, the number of its batch in the ledger: the higher one wins where two rows have one
key, and rows above the ledger's newest number are not acknowledged. Holds no query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from foreshock.monitor.record import STATISTICS, TENSOR_TYPE

__all__ = [
    "FACT_TABLES",
    "NO_EXPERT",
    "RISK_SCHEMA",
    "ROLLUP_TABLES",
    "STORED_TENSOR_FIELDS",
    "TENSOR_KEY",
    "TableOptions",
    "create_database",
    "ddl",
]

FACT_TABLES: Final = ("steps", "scalars", "events", "tensor_stats")
ROLLUP_TABLES: Final = ("values_64", "steps_64")
"""Made from the facts; the second says which of the first are whole, and is written last."""

NO_EXPERT: Final = -1
"""`expert` outside mixtures of experts: a sort key holds no nulls."""

TENSOR_KEY: Final = (
    "layer",
    "role",
    "call_index",
    "format",
    "what_if",
    "expert",
    "granularity",
    "attempt",
    "step",
)

STORED_TENSOR_FIELDS: Final = tuple(field for field in TENSOR_TYPE if field.name != "exponents")
"""Columns of a tensor that the store keeps; histograms are for whoever reads the spool."""

RISK_SCHEMA: Final = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("time", pa.timestamp("us", tz="UTC")),
        pa.field("horizon", pa.int32()),
        pa.field("probability", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("expected_lead", pa.float64()),
        pa.field("kind", pa.string()),
        pa.field("state", pa.string()),
        pa.field("model_version", pa.string()),
    ]
)
"""One row per step and horizon; nulls where the model cannot say."""

_CODECS: Final = {
    "step": "CODEC(Delta(8), ZSTD(1))",
    "block": "CODEC(Delta(8), ZSTD(1))",
    "ver": "CODEC(Delta(8), ZSTD(1))",
}
_TYPES: Final = {pa.float32(): "Float32", pa.int32(): "Int32", pa.int64(): "Int64"}


def _statistic_columns() -> dict[str, str]:
    return {
        name: f"Nullable({_TYPES[TENSOR_TYPE.field(name).type]}) CODEC(ZSTD(1))"
        for name in STATISTICS
    } | {"source": "LowCardinality(Nullable(String))"}


_COLUMNS: Final[dict[str, dict[str, str]]] = {
    "steps": {"time": "DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1))"},
    "scalars": {"name": "LowCardinality(String)", "value": "Float64 CODEC(ZSTD(1))"},
    "events": {
        "position": "UInt32",
        "kind": "LowCardinality(String)",
        "micro_batch": "Nullable(Int32)",
        "layer": "Nullable(String)",
        "role": "Nullable(String)",
        "rank": "Nullable(Int32)",
        "detail": "Nullable(String)",
    },
    "tensor_stats": {
        "layer": "UInt16",
        "call_index": "Int32",
        "role": "LowCardinality(String)",
        "expert": "Int32",
        "format": "LowCardinality(String)",
        "granularity": "LowCardinality(String)",
        "what_if": "Bool",
        "numel": "Int64 CODEC(ZSTD(1))",
        "observations": "Nullable(Int32) CODEC(ZSTD(1))",
        **_statistic_columns(),
    },
    "risk": {
        "time": "DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1))",
        "horizon": "Int32",
        "probability": "Nullable(Float64)",
        "low": "Nullable(Float64)",
        "high": "Nullable(Float64)",
        "expected_lead": "Nullable(Float64)",
        "kind": "LowCardinality(Nullable(String))",
        "state": "LowCardinality(String)",
        "model_version": "LowCardinality(String)",
    },
    # A block is 64 steps; see rollups.py for the columns. A scalar has an empty role.
    "values_64": {
        "name": "LowCardinality(String)",
        "role": "LowCardinality(String)",
        "layer": "UInt16",
        "call_index": "Int32",
        "expert": "Int32",
        "format": "LowCardinality(String)",
        "granularity": "LowCardinality(String)",
        "what_if": "Bool",
        "picked": "UInt8",
        "first_step": "Int64 CODEC(Delta(8), ZSTD(1))",
        "finite": "UInt16 CODEC(ZSTD(1))",
        "smallest": "Nullable(Float64) CODEC(ZSTD(1))",
        "average": "Nullable(Float64) CODEC(ZSTD(1))",
        "largest": "Nullable(Float64) CODEC(ZSTD(1))",
        "others": "UInt16 CODEC(ZSTD(1))",
        "other": "Nullable(Float64) CODEC(ZSTD(1))",
    },
    "steps_64": {
        "facts": "Int64",
        "versions": "Int64",
        "newest": "Int64",
        "held": "Int64",
        "first_step": "Int64",
        "last_step": "Int64",
    },
}

_ORDER: Final = {
    "steps": "run_id, attempt, step",
    "scalars": "run_id, name, attempt, step",
    "events": "run_id, attempt, step, position",
    # One series lies together per 1,024 steps, so a series reads short ranges and a window of the
    # newest steps touches one or two chunks, however long the run.
    "tensor_stats": f"run_id, intDiv(step, 1024), {', '.join(TENSOR_KEY)}",
    "risk": "run_id, attempt, step, horizon",
    # One statistic of one tensor over the whole run lies together, and so does one of a role.
    "values_64": (
        "run_id, name, role, layer, call_index, expert, format, what_if, granularity, picked,"
        " attempt, block"
    ),
    "steps_64": "run_id, attempt, block",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """How the tables are made; columns, keys and queries are the same everywhere.

    Attributes:
        fsync: Sync every INSERT of facts to disk before it returns.
        retention_days: Delete what was received longer ago; 0 keeps everything.
        rollup_retention_days: Delete rollups made longer ago; 0 keeps them.
        server: On servers, where a request may be sent twice: an INSERT with a token that was
            seen before does nothing.
        cluster: Name of a cluster: every table is replicated within its shard, and a Distributed
            table of the same name stands before the shards. Empty for none.
    """

    fsync: bool = True
    retention_days: int = 0
    rollup_retention_days: int = 0
    server: bool = False
    cluster: str = ""

    def held_in(self, table: str) -> str:
        """Where the rows of a table are: what ALTER and DELETE name, with the cluster."""
        return f"{table}_local ON CLUSTER '{self.cluster}'" if self.cluster else table


def create_database(name: str, cluster: str = "") -> str:
    """The statement that makes the database; safe to run again."""
    return f"CREATE DATABASE IF NOT EXISTS {name}" + (f" ON CLUSTER '{cluster}'" if cluster else "")


def ddl(options: TableOptions) -> list[str]:
    """Statements that make the tables; safe to run again."""
    statements = []
    for table, columns in _COLUMNS.items():
        statements.append(_create(table, columns, options))
        if options.cluster:
            statements.append(
                f"CREATE TABLE IF NOT EXISTS {table} ON CLUSTER '{options.cluster}'"
                f" AS {table}_local ENGINE = Distributed('{options.cluster}', currentDatabase(),"
                f" {table}_local, cityHash64(run_id))"
            )
        if table == "tensor_stats":
            statements += _additions(table, _statistic_columns(), options)
        statements.append(_retention(table, options))
        if not options.server:
            # A table of an older build was made without them.
            statements.append(f"ALTER TABLE {table} MODIFY SETTING {_joined(_in_process(table))}")
    return statements


def _create(table: str, columns: dict[str, str], options: TableOptions) -> str:
    position = "block" if table in ROLLUP_TABLES else "step"
    full = {"run_id": "LowCardinality(String)", "attempt": "UInt32", position: "Int64", **columns}
    full |= {"ver": "UInt64", "received": "DateTime DEFAULT now() CODEC(Delta(4), ZSTD(1))"}
    body = ", ".join(f"{name} {kind} {_CODECS.get(name, '')}" for name, kind in full.items())
    # Partitions by time of receipt: a record's own time is the client's and may be anything.
    return (
        f"CREATE TABLE IF NOT EXISTS {options.held_in(table)} "
        f"({body}, INDEX ver_range ver TYPE minmax GRANULARITY 16) "
        f"ENGINE = {_engine(table, options)} PARTITION BY toYYYYMM(received) "
        f"ORDER BY ({_order(table)}) SETTINGS {_table_settings(table, options)}"
    )


def _engine(table: str, options: TableOptions) -> str:
    if not options.cluster:
        return "ReplacingMergeTree(ver)"
    # {shard} and {replica} are macros of each server.
    path = f"/clickhouse/tables/{{shard}}/{{database}}/{table}"
    return f"ReplicatedReplacingMergeTree('{path}', '{{replica}}', ver)"


def _table_settings(table: str, options: TableOptions) -> str:
    synced = int(options.fsync and table in FACT_TABLES)
    settings: dict[str, int | str] = {"fsync_after_insert": synced, "fsync_part_directory": synced}
    settings["ttl_only_drop_parts"] = 1
    # When the days change, parts that are there learn their new end without being written anew.
    settings["materialize_ttl_recalculate_only"] = 1
    if options.cluster:
        settings["replicated_deduplication_window"] = _TOKENS
    elif options.server:
        settings["non_replicated_deduplication_window"] = _TOKENS
    else:
        settings |= _in_process(table)
    return _joined(settings)


def _in_process(table: str) -> dict[str, int | str]:
    """What spares the few cores and the disk that the engine shares with the service.

    Servers have their own, and the older of them do not know all of these.
    """
    settings: dict[str, int | str] = {"auto_statistics_types": "''"}
    if table in FACT_TABLES:
        # An INSERT is one file, and so one sync, instead of fourteen or one per column; what a
        # merge makes is laid out for reading.
        settings |= {"min_level_for_full_part_storage": 1, "min_level_for_wide_part": 1}
        # Every merge of a row costs as much as its INSERT; it is merged fewer times.
        settings["merge_selector_base"] = _MERGE_BASE
    return settings


def _joined(settings: Mapping[str, int | str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in settings.items())


# A merge takes parts whose sum is so many times the largest; the engine's own choice is 5.
_MERGE_BASE: Final = 10

# INSERTs whose tokens a table remembers: minutes of full load, for retries within seconds.
_TOKENS: Final = 10_000


def _order(table: str) -> str:
    # With the batch's number in a fact's key a merge never drops an older row of a key: the newer
    # one may turn out not to be acknowledged, and is then removed. Readers take the newest.
    return f"{_ORDER[table]}, ver" if table in FACT_TABLES else _ORDER[table]


def _additions(table: str, columns: dict[str, str], options: TableOptions) -> list[str]:
    # A table of an older build lacks the statistics that came since; its rows have nulls there.
    added = ", ".join(f"ADD COLUMN IF NOT EXISTS {name} {kind}" for name, kind in columns.items())
    places = [options.held_in(table)]
    if options.cluster:
        places.append(f"{table} ON CLUSTER '{options.cluster}'")
    return [f"ALTER TABLE {place} {added}" for place in places]


def _retention(table: str, options: TableOptions) -> str:
    # A date in the far future stands for "keep": a table without TTL refuses REMOVE TTL.
    rollups = table in ROLLUP_TABLES
    days = options.rollup_retention_days if rollups else options.retention_days
    span = f"INTERVAL {days} DAY" if days else "INTERVAL 50 YEAR"
    return f"ALTER TABLE {options.held_in(table)} MODIFY TTL received + {span}"
