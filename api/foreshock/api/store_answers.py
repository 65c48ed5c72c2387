"""What every store does alike with the rows it has read: names, buckets, grids. Runs no query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from foreshock.api.store import Series, View
from foreshock.api.store_schema import NO_EXPERT, RISK_SCHEMA

__all__ = ["bucket_width", "grid", "risk_rows", "series", "with_layer_names", "within"]


def within(view: View, bounds: tuple[int, int]) -> View:
    """A view narrowed to steps it has: later records may come in while a request is worked on."""
    return replace(view, first_step=bounds[0], last_step=bounds[1])


def bucket_width(bounds: tuple[int, int], points: int) -> int:
    """Steps in each of at most `points` buckets of equal width."""
    return max(1, -(-(bounds[1] - bounds[0] + 1) // points))


def series(rows: pa.Table | None) -> Series:
    """A series from buckets.

    Args:
        rows: step, low, mean, high (null where nothing is finite), nonfinite and odd, one of the
            values that are not finite; by step. None for no bucket.
    """
    if rows is None:
        return Series(step=(), low=(), mean=(), high=(), nonfinite=())
    odd = rows["odd"].to_pylist()

    def column(name: str) -> tuple[float, ...]:
        found = rows[name].to_pylist()
        return tuple(o if v is None else v for v, o in zip(found, odd, strict=True))

    return Series(
        step=tuple(rows["step"].to_pylist()),
        low=column("low"),
        mean=column("mean"),
        high=column("high"),
        nonfinite=tuple(rows["nonfinite"].to_pylist()),
    )


def grid(rows: pa.Table, names: Sequence[str], buckets: int) -> dict[str, tuple[float | None, ...]]:
    """Lines of a heatmap, layers in stored order.

    Args:
        rows: layer, bucket, value (null where nothing is finite) and odd.
        names: Layer names, the position being the id.
        buckets: Length of each line.
    """
    lines: dict[int, list[float | None]] = {}
    columns = (rows[name].to_pylist() for name in ("layer", "bucket", "value", "odd"))
    for layer, bucket, value, odd in zip(*columns, strict=True):
        line = lines.setdefault(layer, [None] * buckets)
        line[bucket] = odd if value is None else value
    return {names[layer]: tuple(line) for layer, line in sorted(lines.items())}


def with_layer_names(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Stored tensors with names for layer ids, and null for no expert."""
    known = pa.array(list(names), pa.string())
    position = rows.schema.get_field_index("layer")
    layer = known.take(rows["layer"].combine_chunks()) if rows.num_rows else known.slice(0, 0)
    rows = rows.set_column(position, "layer", layer)
    expert = np.ma.masked_equal(rows["expert"].to_numpy(), NO_EXPERT)
    position = rows.schema.get_field_index("expert")
    filled = pa.array(expert.data, pa.int32(), mask=np.ma.getmaskarray(expert))
    return rows.set_column(position, "expert", filled)


def risk_rows(run_id: str, attempt: int, version: int, table: pa.Table) -> pa.Table:
    """Rows of `RISK_SCHEMA` with their run, attempt and version."""
    count = table.num_rows
    rows = pa.table({field.name: table[field.name].cast(field.type) for field in RISK_SCHEMA})
    rows = rows.append_column("run_id", pa.array([run_id] * count, pa.string()))
    rows = rows.append_column("attempt", pa.array([attempt] * count, pa.uint32()))
    return rows.append_column("ver", pa.array([version] * count, pa.uint64()))
