"""SQL of the ClickHouse store: small texts with bound parameters, and which rows a view means.

Names of tables and statistics are checked against the vocabulary before they enter a text; values
never enter one. Runs nothing.
"""

from __future__ import annotations

from typing import Final

from foreshock.api.store import SeriesKey, View
from foreshock.api.store_schema import TENSOR_KEY
from foreshock.monitor.record import STATISTICS

__all__ = [
    "SINCE",
    "bounds_sql",
    "event_page_sql",
    "heatmap_sql",
    "scalar_series_sql",
    "tensor_series_sql",
    "view_sql",
]

SINCE: Final = " AND received >= toDateTime({since:UInt32})"
"""Of tables whose rows go after a while: parts go when it suits the engine, and not in all tables
at once, so that older rows count as gone."""

_STEPS: Final = "run_id = {run:String} AND step BETWEEN {first:Int64} AND {last:Int64}"


def bounds_sql(view: View, *, aged: bool = False) -> str:
    """First and last step of a view, and whether it holds any.

    Args:
        view: The records.
        aged: Leave out what was received before the placeholder since.
    """
    # The highest attempts at each step cover the same steps as all attempts together.
    only = "" if view.attempt is None else " AND attempt = {attempt:UInt32}"
    only += SINCE if aged else ""
    return (
        f"SELECT min(step) AS low, max(step) AS high, count() AS n FROM steps WHERE {_STEPS}{only}"
    )


def view_sql(view: View, table: str) -> str:
    """FROM and WHERE for the rows of a view."""
    where = _STEPS
    if table == "tensor_stats":
        # The engine does not derive the chunk from the step, and reads 5 times as much without.
        where += (
            " AND intDiv(step, 1024) BETWEEN intDiv({first:Int64}, 1024)"
            " AND intDiv({last:Int64}, 1024)"
        )
    if view.attempt is not None:
        where += " AND attempt = {attempt:UInt32}"
    else:
        where += (
            f" AND (step, attempt) IN (SELECT step, max(attempt) FROM steps"
            f" WHERE {_STEPS} GROUP BY step)"
        )
    return f"FROM {table} WHERE {where}"


def event_page_sql(view: View, *, kind_given: bool) -> str:
    """Events behind a place; placeholders of the view, after_step, after_position, limit, kind."""
    which = " WHERE kind = {kind:String}" if kind_given else ""
    return (
        "SELECT * FROM (SELECT step, position, kind, micro_batch, layer, role, rank, detail"
        f" {view_sql(view, 'events')}"
        " AND (step, position) > ({after_step:Int64}, {after_position:Int64})"
        f" ORDER BY step, position, ver DESC LIMIT 1 BY step, position){which}"
        " ORDER BY step, position LIMIT {limit:UInt32}"
    )


def _checked(statistic: str) -> str:
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; known: {', '.join(STATISTICS)}")
    return statistic


# What stands for a bucket without a finite value: NaN before Infinity before -Infinity.
_ODD: Final = "if(countIf(isNaN(v)) > 0, toNullable(nan), maxOrNullIf(toFloat64(v), isInfinite(v)))"


def _buckets(inner: str) -> str:
    return (
        "SELECT min(s) AS step, minOrNullIf(v, isFinite(v)) AS low,"
        " avgOrNullIf(v, isFinite(v)) AS mean, maxOrNullIf(v, isFinite(v)) AS high,"
        f" countIf(NOT isFinite(v)) AS nonfinite, {_ODD} AS odd, countIf(isFinite(v)) AS finite,"
        " intDiv(s - {origin:Int64}, {width:Int64}) AS bucket"
        f" FROM ({inner}) WHERE v IS NOT NULL GROUP BY bucket ORDER BY bucket"
    )


def scalar_series_sql(view: View) -> str:
    """Buckets of one scalar; placeholders of the view, name, origin, width."""
    rows = view_sql(view, "scalars")
    return _buckets(
        "SELECT step AS s, argMax(tuple(toNullable(value)), (attempt, ver)).1 AS v "
        f"{rows} AND name = {{name:String}} GROUP BY step"
    )


def tensor_series_sql(view: View, key: SeriesKey) -> str:
    """Buckets of one statistic of one tensor; placeholders of view and key, origin, width."""
    rows = view_sql(view, "tensor_stats")
    which = "what_if = 0" if key.format is None else "format = {format:String}"
    return _buckets(
        f"SELECT step AS s, argMax(tuple({_checked(key.statistic)}),"
        f" (attempt, ver, NOT what_if, granularity, format)).1 AS v {rows}"
        " AND layer = {layer:UInt16} AND role = {role:String} AND call_index = {call:Int32}"
        f" AND expert = {{expert:Int32}} AND {which} GROUP BY step"
    )


def heatmap_sql(view: View, statistic: str, *, smallest: bool, format_given: bool) -> str:
    """The worst value per layer and bucket; placeholders of the view, role, origin, width."""
    rows = view_sql(view, "tensor_stats")
    worst = "minOrNullIf" if smallest else "maxOrNullIf"
    which = "format = {format:String}" if format_given else "what_if = 0"
    key = ", ".join(name for name in TENSOR_KEY if name not in ("attempt", "what_if"))
    return (
        f"SELECT layer, intDiv(step - {{origin:Int64}}, {{width:Int64}}) AS bucket,"
        f" {worst}(v, isFinite(v)) AS value, {_ODD} AS odd FROM"
        f" (SELECT {key}, argMax(tuple({_checked(statistic)}), (attempt, ver, NOT what_if)).1 AS v"
        f" {rows}"
        f" AND role = {{role:String}} AND {which} GROUP BY {key})"
        " WHERE v IS NOT NULL GROUP BY layer, bucket ORDER BY layer, bucket"
    )
