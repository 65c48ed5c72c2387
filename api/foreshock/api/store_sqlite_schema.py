"""Tables of the SQLite store: those of `store_schema.py`, in the order SQLite finds them fast.

A key ends with `ver`, so that a row that is written again lies beside the older one until it is
known to be acknowledged. Floats stand in columns without affinity: SQLite has no NaN, so NaN is the
text 'NaN' there, and null stays null. Holds no query.
"""

from __future__ import annotations

from typing import Final

from foreshock.api.store_schema import (
    FACT_TABLES,
    RISK_SCHEMA,
    ROLLUP_TABLES,
    STORED_TENSOR_FIELDS,
)
from foreshock.monitor.record.schema import EVENT_TYPE

__all__ = ["COLUMNS", "KEYS", "ddl", "missing_columns"]

_TENSOR_KEY: Final = (
    "layer",
    "role",
    "call_index",
    "format",
    "what_if",
    "expert",
    "granularity",
)

_TENSOR_KEY_OF_ROLLUPS: Final = tuple(name for name in _TENSOR_KEY if name != "role")

KEYS: Final[dict[str, tuple[str, ...]]] = {
    "steps": ("step", "attempt"),
    "scalars": ("step", "name", "attempt"),
    "events": ("step", "position", "attempt"),
    # By step first: a window is one range, and a series one look-up per step.
    "tensor_stats": ("step", *_TENSOR_KEY, "attempt"),
    "risk": ("step", "horizon", "attempt"),
    # One statistic of one tensor over the whole run lies together.
    "values_64": ("name", "role", *_TENSOR_KEY_OF_ROLLUPS, "picked", "attempt", "block"),
    "steps_64": ("attempt", "block"),
}
"""What a row is known by within its run, in the order it is stored."""

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "steps": ("time",),
    "scalars": ("value",),
    "events": tuple(field.name for field in EVENT_TYPE),
    "tensor_stats": tuple(f.name for f in STORED_TENSOR_FIELDS if f.name not in _TENSOR_KEY),
    "risk": tuple(name for name in RISK_SCHEMA.names if name not in ("step", "horizon")),
    "values_64": (
        "first_step",
        "finite",
        "smallest",
        "average",
        "largest",
        "others",
        "other",
        "received",
    ),
    "steps_64": (
        "facts",
        "versions",
        "newest",
        "held",
        "first_step",
        "last_step",
        "received",
    ),
}
"""What else stands in a row."""


def ddl() -> list[str]:
    """Statements that make the tables; safe to run again."""
    return [_create(table) for table in (*FACT_TABLES, "risk", *ROLLUP_TABLES)] + [
        # What was appended, so that what was not acknowledged is found without a scan.
        "CREATE TABLE IF NOT EXISTS appended (ver INTEGER NOT NULL, run_id TEXT NOT NULL,"
        " first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, received INTEGER NOT NULL,"
        " PRIMARY KEY (ver, run_id)) WITHOUT ROWID",
        "CREATE INDEX IF NOT EXISTS appended_received ON appended (received)",
        # Names that stand in a run, each with the batch that first had it.
        "CREATE TABLE IF NOT EXISTS vocabulary (run_id TEXT NOT NULL, what TEXT NOT NULL,"
        " word TEXT NOT NULL, ver INTEGER NOT NULL, PRIMARY KEY (run_id, what, word))"
        " WITHOUT ROWID",
    ]


def missing_columns(table: str, present: set[str]) -> list[str]:
    """Statements that give a table of an older build the columns that came since."""
    absent = [name for name in COLUMNS[table] if name not in present]
    return [f"ALTER TABLE {table} ADD COLUMN {name}" for name in absent]


def _create(table: str) -> str:
    key = ("run_id", *KEYS[table], "ver")
    columns = [f"{name} NOT NULL" for name in key] + list(COLUMNS[table])
    return (
        f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)},"
        f" PRIMARY KEY ({', '.join(key)})) WITHOUT ROWID"
    )
