"""SQL over the rollups in ClickHouse: small texts with bound parameters. Runs nothing."""

from __future__ import annotations

from typing import Final

from foreshock.api.rollups import BLOCK_STEPS, OF_FORMAT, OF_FORMAT_WORST, OF_RUN
from foreshock.api.store import CHUNK_STEPS, View
from foreshock.api.store_query import SINCE
from foreshock.api.store_schema import TENSOR_KEY
from foreshock.monitor.record import STATISTICS

__all__ = [
    "blocks_sql",
    "rolled_blocks_sql",
    "rolled_bounds_sql",
    "rolled_heatmap_sql",
    "rolled_series_sql",
    "rollups_there_sql",
    "rows_to_roll_sql",
]


def rolled_bounds_sql(view: View, *, aged: bool) -> str:
    """First and last step of the rollups that lie wholly in a view, and whether there are any.

    `aged`, here and below: leave out what was received before the placeholder since.
    """
    return (
        "SELECT min(first_step) AS low, max(last_step) AS high, count() AS n FROM steps_64"
        f" WHERE run_id = {{run:String}}{_only(view)}"
        f" AND first_step >= {{first:Int64}} AND last_step <= {{last:Int64}} AND facts > 0"
        f"{SINCE if aged else ''}"
    )


def blocks_sql(view: View, *, aged: bool) -> str:
    """What the rows of each attempt and block say; placeholders of the view, in whole blocks."""
    return (
        f"SELECT attempt, intDiv(step, {BLOCK_STEPS}) AS block, toInt64(count()) AS facts,"
        " toInt64(sum(ver)) AS versions, toInt64(max(ver)) AS newest FROM steps"
        f" WHERE run_id = {{run:String}}{_only(view)}"
        f" AND step BETWEEN {{first:Int64}} AND {{last:Int64}}{SINCE if aged else ''}"
        " GROUP BY attempt, block"
    )


def rolled_blocks_sql(view: View, *, aged: bool) -> str:
    """The newest rollup of each attempt and block; placeholders of the view.

    One that is being made anew has no facts.
    """
    return (
        "SELECT attempt, block, facts, versions, held FROM steps_64"
        f" WHERE run_id = {{run:String}}{_only(view)}"
        f" AND block BETWEEN intDiv({{first:Int64}}, {BLOCK_STEPS})"
        f" AND intDiv({{last:Int64}}, {BLOCK_STEPS}){SINCE if aged else ''}"
        " ORDER BY attempt, block, ver DESC LIMIT 1 BY attempt, block"
    )


def _only(view: View) -> str:
    return "" if view.attempt is None else " AND attempt = {attempt:UInt32}"


# Whole blocks of the stretches, of the rollup that `steps_64` names last: another may be under way.
_ROLLED: Final = (
    "run_id = {run:String} AND name = {name:String} AND role = {role:String}"
    " AND block BETWEEN {low:Int64} AND {high:Int64}"
    " AND arrayExists((a, f, l) -> attempt = a AND block BETWEEN f AND l,"
    " {attempts:Array(Int64)}, {firsts:Array(Int64)}, {lasts:Array(Int64)})"
    " AND (attempt, block, ver) IN (SELECT attempt, block, max(ver) FROM steps_64"
    " WHERE run_id = {run:String} AND block BETWEEN {low:Int64} AND {high:Int64} AND facts > 0"
    " GROUP BY attempt, block)"
)
_ODD: Final = "if(countIf(isNaN(other)) > 0, toNullable(nan), max(other))"
_BUCKET: Final = f"intDiv(block * {BLOCK_STEPS} - {{origin:Int64}}, {{width:Int64}})"


def rolled_series_sql(*, format_given: bool) -> str:
    """Buckets of one series from rollups, as `store_query` makes them from rows.

    Placeholders of the stretches, origin and width, name, role, layer, call, expert and, if it is
    given, format.
    """
    which = f"bitAnd(picked, {OF_RUN}) > 0"
    if format_given:
        which = f"format = {{format:String}} AND bitAnd(picked, {OF_FORMAT}) > 0"
    return (
        "SELECT min(first_step) AS step, min(smallest) AS low,"
        " sum(average * finite) / nullIf(sum(finite), 0) AS mean, max(largest) AS high,"
        f" toInt64(sum(others)) AS nonfinite, {_ODD} AS odd, toInt64(sum(finite)) AS held,"
        f" {_BUCKET} AS bucket FROM values_64 WHERE {_ROLLED} AND layer = {{layer:UInt16}}"
        f" AND call_index = {{call:Int32}} AND expert = {{expert:Int32}} AND {which}"
        " GROUP BY bucket ORDER BY bucket"
    )


def rolled_heatmap_sql(*, smallest: bool, format_given: bool) -> str:
    """Cells of a heatmap from rollups; placeholders of the stretches, origin, width, name, role."""
    worst = "min(smallest)" if smallest else "max(largest)"
    which = "what_if = 0"
    if format_given:
        which = f"format = {{format:String}} AND bitAnd(picked, {OF_FORMAT_WORST}) > 0"
    return (
        f"SELECT layer, {_BUCKET} AS bucket, {worst} AS value, {_ODD} AS odd FROM values_64"
        f" WHERE {_ROLLED} AND {which} GROUP BY layer, bucket"
    )


def rollups_there_sql() -> str:
    """Columns block and ver of the rollups of a range; placeholders run, attempt, first, last."""
    return (
        "SELECT block, toInt64(max(ver)) AS ver FROM steps_64"
        " WHERE run_id = {run:String} AND attempt = {attempt:UInt32}"
        f" AND block BETWEEN intDiv({{first:Int64}}, {BLOCK_STEPS})"
        f" AND intDiv({{last:Int64}}, {BLOCK_STEPS}) GROUP BY block"
    )


_TO_ROLL: Final = (
    "run_id = {run:String} AND attempt = {attempt:UInt32}"
    " AND step BETWEEN {first:Int64} AND {last:Int64} AND ver <= {settled:UInt64}"
)
_TENSORS_TO_ROLL: Final = (
    f"{_TO_ROLL} AND intDiv(step, {CHUNK_STEPS}) BETWEEN intDiv({{first:Int64}}, {CHUNK_STEPS})"
    f" AND intDiv({{last:Int64}}, {CHUNK_STEPS})"
)


def rows_to_roll_sql() -> dict[str, str]:
    """Rows of a range of one attempt for `rollups.py`, by table; `layers` counts rows per layer.

    Placeholders run, attempt, first, last, settled; for tensor_stats low and high, layers.
    """
    key = ", ".join(TENSOR_KEY)
    names = ", ".join(STATISTICS)
    return {
        "steps": f"SELECT step, ver FROM steps WHERE {_TO_ROLL}",
        "scalars": (
            f"SELECT step, name, value FROM scalars WHERE {_TO_ROLL}"
            " ORDER BY step, name, ver DESC LIMIT 1 BY step, name"
        ),
        "layers": (
            f"SELECT layer, count() AS n FROM tensor_stats WHERE {_TENSORS_TO_ROLL}"
            " GROUP BY layer ORDER BY layer"
        ),
        "tensor_stats": (
            f"SELECT {key}, {names}, ver FROM tensor_stats WHERE {_TENSORS_TO_ROLL}"
            " AND layer BETWEEN {low:UInt16} AND {high:UInt16}"
            f" ORDER BY {key}, ver DESC LIMIT 1 BY {key}"
        ),
    }
