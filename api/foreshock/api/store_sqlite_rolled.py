"""SQL over the rollups in SQLite: small texts with bound parameters. Runs nothing."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from foreshock.api.rollups import BLOCK_STEPS, OF_FORMAT, OF_FORMAT_WORST, OF_RUN
from foreshock.api.store import View
from foreshock.api.store_sqlite_schema import KEYS
from foreshock.api.store_sqlite_values import NAN
from foreshock.monitor.record import STATISTICS, TENSOR_TYPE

__all__ = [
    "BLOCKS",
    "ROLLED_BLOCKS",
    "ROLLUPS_THERE",
    "blocks_sql",
    "rolled_blocks_sql",
    "rolled_bounds_sql",
    "rolled_heatmap_sql",
    "rolled_series_sql",
    "rollups_there_sql",
    "rows_to_roll_sql",
]

_COUNTED: Final = [(name, pa.int64()) for name in ("attempt", "block", "facts", "versions")]
ROLLED_BLOCKS: Final = pa.schema([*_COUNTED, ("held", pa.int64())])
BLOCKS: Final = pa.schema([*_COUNTED, ("newest", pa.int64())])
ROLLUPS_THERE: Final = pa.schema([("block", pa.int64()), ("ver", pa.int64())])


def rolled_bounds_sql(view: View) -> str:
    """First and last step of the rollups that lie wholly in a view, or two nulls."""
    return (
        f"SELECT min(first_step), max(last_step) FROM steps_64 WHERE run_id = :run{_only(view)}"
        " AND first_step >= :first AND last_step <= :last"
    )


def blocks_sql(view: View) -> str:
    """`BLOCKS`: what the rows of each attempt and block say; placeholders of the view."""
    return (
        f"SELECT attempt, step / {BLOCK_STEPS} AS block, count(*), sum(ver), max(ver) FROM steps"
        f" WHERE run_id = :run{_only(view)} AND step BETWEEN :first AND :last"
        " GROUP BY attempt, block"
    )


def rolled_blocks_sql(view: View) -> str:
    """`ROLLED_BLOCKS`: the newest rollup of each attempt and block; placeholders of the view."""
    return (
        "SELECT attempt, block, facts, versions, held FROM (SELECT attempt, block, facts, versions,"
        f" held, max(ver) FROM steps_64 WHERE run_id = :run{_only(view)}"
        f" AND block BETWEEN :first / {BLOCK_STEPS} AND :last / {BLOCK_STEPS}"
        " GROUP BY attempt, block)"
    )


def _only(view: View) -> str:
    return "" if view.attempt is None else " AND attempt = :attempt"


# Stretches are triples of attempt, first and last block. Of each block the rollup that `steps_64`
# names last.
_ROLLED: Final = (
    "FROM (SELECT s.attempt, s.block, max(s.ver) AS ver FROM json_each(:stretches) AS j"
    " CROSS JOIN steps_64 AS s ON s.run_id = :run AND s.attempt = j.value ->> 0"
    " AND s.block BETWEEN j.value ->> 1 AND j.value ->> 2 GROUP BY s.attempt, s.block) AS c"
    " JOIN values_64 AS t ON t.run_id = :run AND t.name = :name AND t.role = :role"
    " AND t.attempt = c.attempt AND t.block = c.block AND t.ver = c.ver"
)
_ODD: Final = (
    f"CASE WHEN total(t.other = '{NAN}') > 0 THEN '{NAN}'"
    f" ELSE max(CASE WHEN t.other <> '{NAN}' THEN t.other END) END"
)
_BUCKET: Final = f"(t.block * {BLOCK_STEPS} - :origin) / :width"


def rolled_series_sql(*, format_given: bool) -> str:
    """Buckets of one series from rollups, as `store_sqlite_query` makes them from rows.

    Placeholders run, stretches, origin and width, name, role, layer, call, expert and, if it is
    given, format.
    """
    which = f"t.picked & {OF_RUN}"
    if format_given:
        which = f"t.format = :format AND t.picked & {OF_FORMAT}"
    return (
        "SELECT min(t.first_step), min(t.smallest),"
        " total(t.average * t.finite) / nullif(sum(t.finite), 0), max(t.largest), sum(t.others),"
        f" {_ODD}, sum(t.finite), {_BUCKET} AS place {_ROLLED} AND t.layer = :layer"
        f" AND t.call_index = :call AND t.expert = :expert WHERE {which}"
        " GROUP BY place ORDER BY place"
    )


def rolled_heatmap_sql(*, smallest: bool, format_given: bool) -> str:
    """Cells of a heatmap from rollups; placeholders run, stretches, origin, width, name, role."""
    worst = "min(t.smallest)" if smallest else "max(t.largest)"
    which = "t.what_if = 0"
    if format_given:
        which = f"t.format = :format AND t.picked & {OF_FORMAT_WORST}"
    return (
        f"SELECT t.layer, {_BUCKET} AS place, {worst}, {_ODD} {_ROLLED} WHERE {which}"
        " GROUP BY t.layer, place"
    )


def rollups_there_sql() -> str:
    """`ROLLUPS_THERE`: the rollups of a range; placeholders run, attempt, first, last."""
    return (
        "SELECT block, max(ver) FROM steps_64 WHERE run_id = :run AND attempt = :attempt"
        f" AND block BETWEEN :first / {BLOCK_STEPS} AND :last / {BLOCK_STEPS} GROUP BY block"
    )


_TO_ROLL: Final = (
    "run_id = :run AND attempt = :attempt AND step BETWEEN :first AND :last AND ver <= :settled"
)
_STEPS: Final = pa.schema([("step", pa.int64()), ("ver", pa.int64())])
_SCALARS: Final = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
_LAYERS: Final = pa.schema([("layer", pa.int64()), ("n", pa.int64())])


def _tensors() -> pa.Schema:
    fields = {name: pa.int64() for name in ("step", "layer", "attempt", "ver")}
    names = (*KEYS["tensor_stats"], *STATISTICS, "ver")
    return pa.schema([(n, fields.get(n) or TENSOR_TYPE.field(n).type) for n in names])


def rows_to_roll_sql() -> dict[str, tuple[str, pa.Schema]]:
    """Rows of a range of one attempt for `rollups.py`, by table; `layers` counts rows per layer.

    Placeholders run, attempt, first, last, settled; for tensor_stats low and high, layers.
    """
    key = ", ".join(KEYS["tensor_stats"])
    names = ", ".join(STATISTICS)
    return {
        "steps": (f"SELECT step, ver FROM steps WHERE {_TO_ROLL}", _STEPS),
        "scalars": (
            "SELECT step, name, value FROM (SELECT step, name, value, max(ver) FROM scalars"
            f" WHERE {_TO_ROLL} GROUP BY step, name)",
            _SCALARS,
        ),
        "layers": (
            f"SELECT layer, count(*) FROM tensor_stats WHERE {_TO_ROLL} GROUP BY layer"
            " ORDER BY layer",
            _LAYERS,
        ),
        "tensor_stats": (
            f"SELECT {key}, {names}, max(ver) FROM tensor_stats WHERE {_TO_ROLL}"
            f" AND layer BETWEEN :low AND :high GROUP BY {key}",
            _tensors(),
        ),
    }
