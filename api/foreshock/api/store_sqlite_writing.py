"""What the SQLite store writes, within a transaction that somebody else holds."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.store_schema import FACT_TABLES
from foreshock.api.store_sqlite_schema import COLUMNS, KEYS
from foreshock.api.store_sqlite_values import columns_of

__all__ = ["doubt_rollups", "drop_replaced", "insert", "note", "remove"]


def insert(writer: sqlite3.Connection, table: str, rows: pa.Table) -> None:
    """Insert rows; of equal keys and batches the last is kept."""
    names = ("run_id", *KEYS[table], "ver", *COLUMNS[table])
    columns = columns_of(rows, names)
    marks = ", ".join("?" * len(names))
    writer.executemany(
        f"INSERT OR REPLACE INTO {table} ({', '.join(names)}) VALUES ({marks})",
        zip(*columns, strict=True),
    )


# What `vocabulary` remembers: table, column, and what its words are.
_WORDS: Final = (
    ("scalars", "name", "scalar"),
    ("tensor_stats", "role", "role"),
    ("tensor_stats", "format", "format"),
)


def note(writer: sqlite3.Connection, group: Mapping[str, pa.Table], now: int) -> None:
    """Remember where a batch lies and which names it has."""
    for rows in group.values():
        span = pc.min_max(rows["step"])
        writer.execute(
            "INSERT INTO appended VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " first_step = min(first_step, excluded.first_step),"
            " last_step = max(last_step, excluded.last_step)",
            (*_owner(rows), span["min"].as_py(), span["max"].as_py(), now),
        )
    for table, column, what in _WORDS:
        if table in group:
            ver, run_id = _owner(group[table])
            writer.executemany(
                "INSERT OR IGNORE INTO vocabulary VALUES (?, ?, ?, ?)",
                [(run_id, what, word, ver) for word in pc.unique(group[table][column]).to_pylist()],
            )


def _owner(rows: pa.Table) -> tuple[int, str]:
    return rows["ver"][0].as_py(), rows["run_id"][0].as_py()


def doubt_rollups(writer: sqlite3.Connection, first: int) -> None:
    """Remove rollups that may have counted batches from this number on; they are made again."""
    writer.execute(
        "DELETE FROM steps_64 WHERE (run_id, attempt, block) IN"
        " (SELECT run_id, attempt, block FROM steps_64 WHERE newest >= ?)",
        (first,),
    )


def remove(writer: sqlite3.Connection, which: str, *values: int) -> int:
    """Remove the facts of batches.

    Args:
        writer: In a transaction.
        which: A condition on `appended`, with a placeholder for each of the values.
        values: Those.

    Returns:
        How many rows were removed.
    """
    batches = writer.execute(
        f"SELECT ver, run_id, first_step, last_step FROM appended WHERE {which}", values
    ).fetchall()
    removed = 0
    for ver, run_id, first, last in batches:
        for table in FACT_TABLES:
            removed += writer.execute(
                f"DELETE FROM {table} WHERE run_id = ? AND step BETWEEN ? AND ? AND ver = ?",
                (run_id, first, last, ver),
            ).rowcount
    writer.execute(f"DELETE FROM appended WHERE {which}", values)
    return removed


def drop_replaced(writer: sqlite3.Connection, rows: pa.Table) -> None:
    """Remove what newer rollups of the same blocks replace; seldom any."""
    ver, run_id = _owner(rows)
    span = pc.min_max(rows["block"])
    given = (run_id, rows["attempt"][0].as_py(), span["min"].as_py(), span["max"].as_py(), ver)
    which = "run_id = ? AND attempt = ? AND block BETWEEN ? AND ? AND ver < ?"
    if writer.execute(f"DELETE FROM steps_64 WHERE {which}", given).rowcount:
        writer.execute(f"DELETE FROM values_64 WHERE {which}", given)
