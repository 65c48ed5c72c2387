"""Arrow columns as values that SQLite keeps, and back. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["NAN", "columns_of", "table_of"]

NAN: Final = "NaN"
"""Stands for NaN, which SQLite would turn into null."""


def columns_of(table: pa.Table, names: Sequence[str]) -> list[list[Any]]:
    """Columns of a table as Python values: times in microseconds, NaN as `NAN`."""
    return [_values(table[name]) for name in names]


def _values(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    elif pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    values: list[Any] = column.to_pylist()
    if pa.types.is_floating(kind) and pc.any(pc.is_nan(column)).as_py():
        values = [NAN if v is not None and math.isnan(v) else v for v in values]
    return values


def table_of(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    """Rows of a query as a table.

    Args:
        rows: One sequence per row, in the order of the schema.
        schema: Names and types.
    """
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [_array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):
        if NAN in values:
            values = [math.nan if v == NAN else v for v in values]
        return pa.array(values, pa.float64()).cast(kind, safe=False)
    if pa.types.is_timestamp(kind):
        return pa.array(values, pa.int64()).cast(kind)
    if pa.types.is_boolean(kind):
        return pa.array(values, pa.int8()).cast(kind)
    return pa.array(values, kind)
