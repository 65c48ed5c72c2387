"""What every store does alike with the rows it has read: names, buckets, grids. Runs no query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.store import Series, View
from foreshock.api.store_schema import NO_EXPERT, RISK_SCHEMA

__all__ = [
    "BUCKETS",
    "CELLS",
    "combine_buckets",
    "combine_cells",
    "grid",
    "risk_rows",
    "series",
    "with_layer_names",
    "within",
]


BUCKETS: Final = pa.schema(
    [
        ("step", pa.int64()),
        ("low", pa.float64()),
        ("mean", pa.float64()),
        ("high", pa.float64()),
        ("nonfinite", pa.int64()),
        ("odd", pa.float64()),
        ("finite", pa.int64()),
        ("bucket", pa.int64()),
    ]
)
"""One row per bucket of a series."""

CELLS: Final = pa.schema(
    [("layer", pa.int64()), ("bucket", pa.int64()), ("value", pa.float64()), ("odd", pa.float64())]
)
"""One row per layer and bucket of a heatmap."""


def within(view: View, bounds: tuple[int, int]) -> View:
    """A view narrowed to steps it has: later records may come in while a request is worked on."""
    return replace(view, first_step=bounds[0], last_step=bounds[1])


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


def combine_buckets(parts: Sequence[pa.Table]) -> pa.Table | None:
    """Buckets from several places as one table by bucket; None for none.

    Args:
        parts: What `series` takes, bucket, and finite: how many finite values the bucket holds.
            A bucket may stand in several.
    """
    if len(parts) < 2:
        return parts[0] if parts else None
    rows = pa.concat_tables([part.cast(BUCKETS) for part in parts])
    weighted = pc.multiply(rows["mean"], rows["finite"].cast(pa.float64()))
    rows = rows.append_column("weighted", weighted)
    rows = rows.append_column("nan", pc.fill_null(pc.is_nan(rows["odd"]), False))
    summed = rows.group_by("bucket").aggregate(
        [
            ("step", "min"),
            ("low", "min"),
            ("weighted", "sum"),
            ("high", "max"),
            ("nonfinite", "sum"),
            ("odd", "max"),
            ("finite", "sum"),
            ("nan", "any"),
        ]
    )
    summed = summed.sort_by("bucket")
    # The larger of NaN and a number is the number, to Arrow.
    odd = pc.if_else(summed["nan_any"], pa.scalar(math.nan), summed["odd_max"])
    mean = pc.divide(summed["weighted_sum"], summed["finite_sum"].cast(pa.float64()))
    columns = {
        "step": summed["step_min"],
        "low": summed["low_min"],
        "mean": mean,
        "high": summed["high_max"],
        "nonfinite": summed["nonfinite_sum"],
        "odd": odd,
        "finite": summed["finite_sum"],
        "bucket": summed["bucket"],
    }
    return pa.table(columns).cast(BUCKETS)


def combine_cells(parts: Sequence[pa.Table], *, smallest: bool) -> pa.Table:
    """Cells of a heatmap from several places, each once; what `grid` takes."""
    if len(parts) == 1:
        return parts[0]
    rows = pa.concat_tables([part.cast(CELLS) for part in parts])
    rows = rows.append_column("nan", pc.fill_null(pc.is_nan(rows["odd"]), False))
    worst = "min" if smallest else "max"
    summed = rows.group_by(["layer", "bucket"]).aggregate(
        [("value", worst), ("odd", "max"), ("nan", "any")]
    )
    odd = pc.if_else(summed["nan_any"], pa.scalar(math.nan), summed["odd_max"])
    return pa.table(
        {
            "layer": summed["layer"],
            "bucket": summed["bucket"],
            "value": summed[f"value_{worst}"],
            "odd": odd,
        }
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
