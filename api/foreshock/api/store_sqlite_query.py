"""SQL of the SQLite store: small texts with bound parameters. Runs nothing.

Names of tables and statistics are checked against the vocabulary before they enter a text; values
never enter one. A query with one max() gives its other columns from the row that has it: so the
newest row of a key is found here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from foreshock.api.store import SeriesKey, View
from foreshock.api.store_sqlite_schema import COLUMNS, KEYS
from foreshock.api.store_sqlite_values import NAN
from foreshock.monitor.record import STATISTICS

__all__ = [
    "bounds_sql",
    "event_page_sql",
    "heatmap_sql",
    "newest_sql",
    "scalar_series_sql",
    "tensor_series_sql",
]

_STEPS: Final = "run_id = :run AND step BETWEEN :first AND :last"


def bounds_sql(view: View) -> str:
    """First and last step of a view, or two nulls."""
    only = "" if view.attempt is None else " AND attempt = :attempt"
    one = f"SELECT step FROM steps WHERE {_STEPS}{only} ORDER BY step"
    return f"SELECT ({one} LIMIT 1), ({one} DESC LIMIT 1)"


def _picked(view: View) -> str:
    """The attempt that a view shows at each step."""
    if view.attempt is not None:
        return f"SELECT DISTINCT step, attempt FROM steps WHERE {_STEPS} AND attempt = :attempt"
    return f"SELECT step, max(attempt) AS attempt FROM steps WHERE {_STEPS} GROUP BY step"


def event_page_sql(view: View, columns: Sequence[str], *, kind_given: bool) -> str:
    """Events behind a place; placeholders of the view, after_step, after_position, limit, kind."""
    which = " AND kind = :kind" if kind_given else ""
    return (
        f"SELECT {', '.join(columns)} FROM ({newest_sql(view, 'events', columns)})"
        f" WHERE (step, position) > (:after_step, :after_position){which}"
        " ORDER BY step, position LIMIT :limit"
    )


def newest_sql(view: View, table: str, columns: Sequence[str]) -> str:
    """The newest row of each key of a view, by key.

    Args:
        view: Which records.
        table: One of `KEYS`.
        columns: Columns of the answer, in order.
    """
    allowed = {*KEYS[table], *COLUMNS[table]}
    if not allowed >= set(columns):
        raise ValueError(f"{table} has no {sorted(set(columns) - allowed)}")
    key = ", ".join(KEYS[table])
    names = ", ".join(columns)
    if view.attempt is None:
        rows = (
            f"FROM ({_picked(view)}) AS p CROSS JOIN {table} AS t"
            " ON t.run_id = :run AND t.step = p.step AND t.attempt = p.attempt"
        )
        names, key = (_of("t", each) for each in (names, key))
    else:
        rows = f"FROM {table} WHERE {_STEPS} AND attempt = :attempt"
    ver = "t.ver" if view.attempt is None else "ver"
    inner = f"SELECT {names}, max({ver}) {rows} GROUP BY {key} ORDER BY {key}"
    return f"SELECT {', '.join(columns)} FROM ({inner})"


def _of(table: str, names: str) -> str:
    return ", ".join(f"{table}.{name}" for name in names.split(", "))


def _checked(statistic: str) -> str:
    if statistic not in STATISTICS:
        raise ValueError(f"unknown statistic {statistic!r}; known: {', '.join(STATISTICS)}")
    return statistic


# NaN is a text, and infinities are the only numbers of this size.
_FINITE: Final = f"(v <> '{NAN}' AND abs(v) < 9e999)"
# What stands for a bucket without a finite value: NaN before Infinity before -Infinity.
_ODD: Final = (
    f"CASE WHEN total(v = '{NAN}') > 0 THEN '{NAN}'"
    f" ELSE max(CASE WHEN v <> '{NAN}' AND NOT {_FINITE} THEN v END) END"
)


def _buckets(inner: str) -> str:
    finite = f"CASE WHEN {_FINITE} THEN v END"
    return (
        f"SELECT min(s), min({finite}), avg({finite}), max({finite}),"
        f" count(*) - count({finite}), {_ODD}, count({finite}), (s - :origin) / :width"
        f" FROM ({inner}) WHERE v IS NOT NULL GROUP BY (s - :origin) / :width ORDER BY 1"
    )


def scalar_series_sql(view: View) -> str:
    """Buckets of one scalar; placeholders of the view, name, origin, width."""
    return _buckets(
        f"SELECT p.step AS s, t.value AS v, max(t.ver) FROM ({_picked(view)}) AS p"
        " CROSS JOIN scalars AS t ON t.run_id = :run AND t.step = p.step"
        " AND t.name = :name AND t.attempt = p.attempt GROUP BY p.step"
    )


def tensor_series_sql(view: View, key: SeriesKey) -> str:
    """Buckets of one statistic of one tensor; placeholders of view and key, origin, width."""
    which = "t.what_if = 0" if key.format is None else "t.format = :format"
    # The newest batch, then what the run used before what-if, then the last granularity by name,
    # then the last format.
    rank = "printf('%020d %d %s %s', t.ver, 1 - t.what_if, t.granularity, t.format)"
    return _buckets(
        f"SELECT p.step AS s, t.{_checked(key.statistic)} AS v, max({rank})"
        f" FROM ({_picked(view)}) AS p CROSS JOIN tensor_stats AS t"
        " ON t.run_id = :run AND t.step = p.step AND t.layer = :layer AND t.role = :role"
        f" AND t.call_index = :call AND t.expert = :expert AND t.attempt = p.attempt AND {which}"
        " GROUP BY p.step"
    )


def heatmap_sql(view: View, statistic: str, *, smallest: bool, format_given: bool) -> str:
    """The worst value per layer and bucket; placeholders of the view, role, origin, width."""
    which = "t.format = :format" if format_given else "t.what_if = 0"
    finite = f"CASE WHEN {_FINITE} THEN v END"
    worst = "min" if smallest else "max"
    key = "t.layer, t.call_index, t.format, t.expert, t.granularity, t.step"
    inner = (
        f"SELECT t.layer AS layer, t.step AS s, t.{_checked(statistic)} AS v,"
        " max(printf('%020d %d', t.ver, 1 - t.what_if))"
        f" FROM ({_picked(view)}) AS p CROSS JOIN tensor_stats AS t"
        " ON t.run_id = :run AND t.step = p.step AND t.attempt = p.attempt"
        f" AND t.role = :role AND {which} GROUP BY {key}"
    )
    return (
        f"SELECT layer, (s - :origin) / :width AS bucket, {worst}({finite}), {_ODD}"
        f" FROM ({inner}) WHERE v IS NOT NULL GROUP BY layer, bucket ORDER BY layer, bucket"
    )
