"""Logs that are tables with a column of steps: CSV, JSON lines, Parquet, exports of W&B.

One row is what was logged at one step; a column may tell several runs apart.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.api.cli.importers.names import Names
from foreshock.api.cli.importers.points import Imported, ImportProblem, Point, Report, scalar_runs
from foreshock.api.cli.importers.separated import (
    decimal_commas,
    encoding_of,
    rows_of,
    with_points,
)
from foreshock.api.cli.importers.values import as_number, as_step

__all__ = ["read_csv", "read_json_lines", "read_parquet"]

_CHART: Final = re.compile(r"^(?P<run>.+) - (?P<metric>.+?)(?P<band>__MIN|__MAX)?$")
_TIMES: Final = ("_timestamp", "timestamp")
_CLOCKS: Final = (*_TIMES, "_runtime")


@dataclass(frozen=True, slots=True)
class _Table:
    """A log as rows; a cell is a number, text or None."""

    path: Path
    format: str
    header: list[str]
    rows: Iterable[Mapping[str, Any]]
    report: Report


def read_csv(path: Path, names: Names) -> Imported:
    """A CSV file with a column of steps: plain, a W&B history, or a W&B chart of several runs.

    Cells are parted by commas, semicolons or tabs.

    Raises:
        ImportProblem: Not CSV, or no column of steps.
    """
    try:
        content = path.read_bytes()
        separator, rows = rows_of(content.decode(encoding_of(content)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImportProblem(f"{path} is not CSV in UTF-8 or UTF-16: {error}") from None
    if len(rows) < 2:
        raise ImportProblem(f"{path} has no rows")
    header = [cell.strip() for cell in rows[0]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ImportProblem(f"{path}: column {twice!r} stands twice")
    report = Report("wandb" if "_step" in header or _is_chart(header) else "csv")
    if decimal_commas(separator, rows[1:]):
        report.notes.append("numbers are written with a decimal comma")
        rows = [rows[0], *map(with_points, rows[1:])]
    whole = [dict(zip(header, cells, strict=True)) for cells in _whole(path, rows, report)]
    return _read(_Table(path, report.format, header, whole, report), names)


def _whole(path: Path, rows: list[list[str]], report: Report) -> Iterator[list[str]]:
    width = len(rows[0])
    for line, cells in enumerate(rows[1:], 2):
        if len(cells) == width:
            yield cells
        elif line == len(rows):  # the writer was stopped in the middle of it
            report.skipped["the last row, which is cut off"] += 1
        else:
            raise ImportProblem(f"{path}: row {line} has {len(cells)} cells, not {width}")


def read_json_lines(path: Path, names: Names) -> Imported:
    """One JSON object a line, or one array of objects; nested members are joined by a slash.

    Raises:
        ImportProblem: Not that, or no member is the step.
    """
    report = Report("jsonl")
    rows = [dict(_flat("", row)) for row in _objects(path, report)]
    header = list(dict.fromkeys(name for row in rows for name in row))
    return _read(_Table(path, "jsonl", header, rows, report), names)


def _objects(path: Path, report: Report) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
        text = content.decode(encoding_of(content))
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = list(_lines(path, text.splitlines(), report))
    except ValueError as error:
        raise ImportProblem(f"{path} is no JSON in UTF-8 or UTF-16: {str(error)[:200]}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ImportProblem(f"{path}: a row is no object")
    return list(rows)


def _lines(path: Path, lines: list[str], report: Report) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise ImportProblem(f"{path}: line {number} is no JSON: {error}") from None
            report.skipped["the last line, which is cut off"] += 1


def _flat(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}/", value)
        else:
            yield prefix + name, value


def read_parquet(path: Path, names: Names) -> Imported:
    """A Parquet file with a column of steps.

    Raises:
        ImportProblem: Not whole, or no column is the step.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise ImportProblem(f"{path} is not a whole Parquet file: {first}") from None
    rows = (row for batch in table.to_batches() for row in batch.to_pylist())
    header = list(table.column_names)
    return _read(_Table(path, "parquet", header, rows, Report("parquet")), names)


def _read(table: _Table, names: Names) -> Imported:
    header, report = table.header, table.report
    names.check(header)
    step = names.step(header)
    if step is None:
        shown = ", ".join(header[:8])
        raise ImportProblem(
            f"{table.path}: no column of steps among {shown}; name it with --map step=NAME"
        )
    run = None if _is_chart(header) else names.run(header)
    columns = _columns(header, step, run)
    report.names = names.of_all(dict.fromkeys(metric for _, metric in columns.values()))
    left_out = (h for h in header if h not in columns and h not in (step, run, *_TIMES))
    report.skipped.update(name or "a column without a name" for name in left_out)
    if run is not None:
        report.notes.append(f"one run for each {run}")
    per_run: dict[str | None, list[Point]] = {}
    for row in table.rows:
        at = as_step(row.get(step))
        if at is None:
            report.skipped[f"rows without a whole {step}"] += 1
            continue
        own = None if run is None else str(row.get(run))
        for chart, point in _row_points(row, at, columns, report):
            per_run.setdefault(chart or own, []).append(point)
    return Imported(scalar_runs(per_run, report), report)


def _row_points(
    row: Mapping[str, Any], step: int, columns: Mapping[str, tuple[str | None, str]], report: Report
) -> Iterator[tuple[str | None, Point]]:
    time = _time(row)
    for column, (run, metric) in columns.items():
        cell = row.get(column)
        value = as_number(cell)
        if value is not None:
            yield run, Point(report.names[metric], step, value, time)
        elif cell is not None and str(cell).strip():
            report.skipped[f"{column} (no number)"] += 1


def _is_chart(header: list[str]) -> bool:
    """Whether every column but the first is `run - metric`."""
    return len(header) > 1 and all(_CHART.match(name) for name in header[1:])


def _columns(header: list[str], step: str, run: str | None) -> dict[str, tuple[str | None, str]]:
    """Column to (run, metric): all that are measured."""
    if _is_chart(header):
        found = {h: m for h in header[1:] if (m := _CHART.match(h))}
        # W&B repeats each run's step as "run - _step", and smooths into bands.
        kept = {h: m for h, m in found.items() if not m["band"] and m["metric"] != "_step"}
        return {h: (m["run"], m["metric"]) for h, m in kept.items()}
    unnamed = ("", "Unnamed: 0")  # the index of a data frame
    return {h: (None, h) for h in header if h not in (step, run, *_CLOCKS, *unnamed)}


def _time(row: Mapping[str, Any]) -> datetime | None:
    for name in _TIMES:
        seconds = as_number(row.get(name))
        if seconds is not None and 0 < seconds < 1e11:
            return datetime.fromtimestamp(seconds, UTC)
    return None
