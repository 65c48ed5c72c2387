"""What Grafana makes of an answer before it draws: tables with named, typed columns.

Follows Infinity's backend parser and the few transformations that the dashboards use, as their
published sources describe them, so that tests and pictures see the columns that a panel would.
Draws nothing, asks nothing.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

__all__ = ["Field", "Frame", "from_infinity", "from_prometheus", "transformed"]


@dataclass(frozen=True, slots=True)
class Field:
    """A column.

    Attributes:
        name: As panels show it.
        kind: number, string or time.
        values: None where there is none.
    """

    name: str
    kind: str
    values: tuple[Any, ...]


Frame = tuple[Field, ...]
"""Columns of equal length."""


def from_infinity(content: str | Any, query: Mapping[str, Any]) -> Frame:
    """The frame of an answer of the service.

    Args:
        content: Text for CSV, decoded JSON otherwise.
        query: The query in the dashboard.

    Returns:
        Its columns by name; none for an answer without rows.
    """
    if query["type"] == "csv":
        rows: list[Any] = list(csv.DictReader(io.StringIO(content)))
    else:
        rows = list(_at(content, query["root_selector"]))
    if not rows:
        return ()
    if not query["columns"]:
        return (Field(query["refId"], "string", tuple(rows)),)
    made = [
        Field(column["text"], _KINDS[column["type"]], tuple(_read(row, column) for row in rows))
        for column in query["columns"]
    ]
    return tuple(sorted(made, key=lambda column: column.name))


def _read(row: Any, column: Mapping[str, str]) -> Any:
    found = _at(row, column["selector"])
    return None if found is None else _READERS[column["type"]](found)


def _at(value: Any, path: str) -> Any:
    """A plain path of GJSON: names, places, and `#` for every member of a list."""
    for place, part in enumerate(path.split(".")):
        if part == "#":
            rest = ".".join(path.split(".")[place + 1 :])
            return [_at(each, rest) for each in value]
        if isinstance(value, list):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = None if value is None else value.get(part)
    return value


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


_READERS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "number": _number,
    "string": str,
    "timestamp": lambda value: datetime.fromisoformat(value),
}
_KINDS: Final = {"number": "number", "string": "string", "timestamp": "time"}


def from_prometheus(samples: Sequence[tuple[Mapping[str, str], float]], value: str) -> Frame:
    """The table of an instant query: one column per label, then the value.

    Args:
        samples: Labels and value of each series.
        value: Name of the last column.
    """
    labels = sorted({name for known, _ in samples for name in known})
    columns = [Field(n, "string", tuple(known.get(n) for known, _ in samples)) for n in labels]
    return (*columns, Field(value, "number", tuple(number for _, number in samples)))


def transformed(frames: Sequence[Frame], steps: Iterable[Mapping[str, Any]]) -> list[Frame]:
    """Frames after the transformations of a panel, in order."""
    for step in steps:
        frames = _STEPS[step["id"]](frames, step["options"])
    return list(frames)


def _join(frames: Sequence[Frame], options: Mapping[str, Any]) -> list[Frame]:
    """One frame of all, by the values of one column."""
    by = options["byField"]
    held = [frame for frame in frames if any(column.name == by for column in frame)]
    keys = sorted({key for frame in held for key in _column(frame, by).values})
    made = [Field(by, "number", tuple(keys))]
    for frame in held:
        places = {key: place for place, key in enumerate(_column(frame, by).values)}
        for column in frame:
            if column.name != by:
                values = (column.values[places[k]] if k in places else None for k in keys)
                made.append(replace(column, values=tuple(values)))
    return [tuple(made)] if held else []


def _matrix(frames: Sequence[Frame], options: Mapping[str, Any]) -> list[Frame]:
    if len(frames) != 1 or not frames[0]:
        return list(frames)
    (frame,) = frames
    names = (options["rowField"], options["columnField"], options["valueField"])
    rows, columns, values = (_column(frame, name).values for name in names)
    cells = dict(zip(zip(rows, columns, strict=True), values, strict=True))
    first = tuple(dict.fromkeys(rows))
    made = [Field(f"{names[0]}\\{names[1]}", "string", first)]
    for column in dict.fromkeys(columns):
        cell = tuple(cells.get((row, column)) for row in first)
        made.append(Field(str(column), _column(frame, names[2]).kind, cell))
    return [tuple(made)]


def _convert(frames: Sequence[Frame], options: Mapping[str, Any]) -> list[Frame]:
    wanted = {each["targetField"]: each["destinationType"] for each in options["conversions"]}
    return [
        tuple(
            replace(
                column,
                kind=wanted[column.name],
                values=tuple(_READERS[wanted[column.name]](value) for value in column.values),
            )
            if column.name in wanted
            else column
            for column in frame
        )
        for frame in frames
    ]


def _sort(frames: Sequence[Frame], options: Mapping[str, Any]) -> list[Frame]:
    (key,) = options["sort"]
    made = []
    for frame in frames:
        if not any(column.name == key["field"] for column in frame):
            made.append(frame)
            continue
        values = _column(frame, key["field"]).values
        order = sorted(range(len(values)), key=values.__getitem__, reverse=key.get("desc", False))
        made.append(tuple(replace(c, values=tuple(c.values[i] for i in order)) for c in frame))
    return made


def _rename(frames: Sequence[Frame], options: Mapping[str, Any]) -> list[Frame]:
    pattern = re.sub(r"\$(\d)", r"\\\1", options["renamePattern"])
    return [
        tuple(replace(c, name=re.sub(options["regex"], pattern, c.name)) for c in frame)
        for frame in frames
    ]


def _merge(frames: Sequence[Frame], _: Mapping[str, Any]) -> list[Frame]:
    """One row per set of labels; values of several tables side by side."""
    rows: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    for frame in frames:
        kinds |= {column.name: column.kind for column in frame}
        for place in range(len(frame[0].values) if frame else 0):
            cells = {column.name: column.values[place] for column in frame}
            labels = tuple((k, v) for k, v in cells.items() if kinds[k] == "string")
            rows.setdefault(labels, {}).update(cells)
    if not rows:
        return []
    return [
        tuple(
            Field(name, kind, tuple(row.get(name) for row in rows.values()))
            for name, kind in kinds.items()
        )
    ]


def _organize(frames: Sequence[Frame], options: Mapping[str, Any]) -> list[Frame]:
    order, names = options["indexByName"], options["renameByName"]
    kept = options["includeByName"]
    return [
        tuple(
            replace(column, name=names.get(column.name, column.name))
            for column in sorted(
                (c for c in frame if kept.get(c.name)), key=lambda c: order[c.name]
            )
        )
        for frame in frames
    ]


def _column(frame: Frame, name: str) -> Field:
    return next(column for column in frame if column.name == name)


_STEPS: Final[Mapping[str, Callable[[Sequence[Frame], Mapping[str, Any]], list[Frame]]]] = {
    "joinByField": _join,
    "groupingToMatrix": _matrix,
    "convertFieldType": _convert,
    "sortBy": _sort,
    "renameByRegex": _rename,
    "merge": _merge,
    "organize": _organize,
}
