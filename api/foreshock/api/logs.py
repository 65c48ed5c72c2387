"""Read logs that people bring: CSV with step and loss, or Parquet of records, for scoring.

Everything is checked before the first row is scored, and every refusal is one line that names the
place. It computes nothing.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.monitor.record import RecordError, StepRecord, conform, table_to_records

__all__ = ["LogError", "LogRow", "read_log"]

_NAMES: Final = {
    "step": "step",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "attempt": "attempt",
}
_MAX_STEP: Final = 2**63 - 1


class LogError(ValueError):
    """The file cannot be scored; the message is one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """One row of a log.

    Attributes:
        step: Optimizer step.
        attempt: Number of the attempt, 0 when the log has no such column.
        scalars: What was measured; NaN and infinities are measurements, an empty cell is not there.
        record: The whole record, for files of records.
    """

    step: int
    attempt: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)
    record: StepRecord | None = None


def read_log(path: Path) -> list[LogRow]:
    """Read and check a whole log.

    Args:
        path: A CSV file with columns step and loss, optionally grad_norm, lr and attempt, or a
            Parquet file (`.parquet`) of records or of the same columns.

    Raises:
        LogError: No such file, columns missing or doubled, text where a number should stand, steps
            that do not rise within an attempt, no rows.
    """
    if path.is_dir():
        raise LogError(f"{path} is a folder; give a .csv or .parquet file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise LogError(f"{path} is empty")
    parquet = head == b"PAR1" or path.suffix.lower() in (".parquet", ".pq")
    rows = _read_parquet(path) if parquet else list(_read_csv(path))
    if not rows:
        raise LogError(f"{path} has no rows")
    _check_steps(path, rows)
    return rows


def _check_steps(path: Path, rows: list[LogRow]) -> None:
    last: dict[int, int] = {}
    for number, row in enumerate(rows, 1):
        before = last.get(row.attempt)
        if before is not None and row.step <= before:
            raise LogError(
                f"{path}: data row {number}: step {row.step} follows step {before}; steps must rise"
                " within an attempt (mark restarts in a column named attempt)"
            )
        last[row.attempt] = row.step


def _read_csv(path: Path) -> Iterator[LogRow]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next((row for row in reader if _has_text(row)), None)
            if header is None:
                raise LogError(f"{path} is empty")
            columns = _columns(path, [cell.strip() for cell in header])
            for cells in reader:
                if _has_text(cells) or (len(header) > 1 and len(cells) == len(header)):
                    yield _csv_row(path, reader.line_num, cells, columns, len(header))
    except UnicodeDecodeError:
        raise LogError(f"{path} is not UTF-8 text") from None
    except csv.Error as error:
        raise LogError(f"{path} is not CSV: {error}") from None


def _has_text(cells: list[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _columns(path: Path, header: list[str]) -> dict[str, int]:
    columns: dict[str, int] = {}
    for index, cell in enumerate(header):
        name = _NAMES.get(cell.lower())
        if name is None:
            continue
        if name in columns:
            raise LogError(f"{path}: column {cell!r} stands twice")
        columns[name] = index
    missing = [name for name in ("step", "loss") if name not in columns]
    if missing:
        found = ", ".join(repr(c) for c in header[:8]) or "none"
        raise LogError(f"{path}: column {' and '.join(missing)} is missing; found {found[:200]}")
    return columns


def _csv_row(
    path: Path, line: int, cells: list[str], columns: Mapping[str, int], width: int
) -> LogRow:
    where = f"{path}: line {line}"
    if len(cells) != width:
        raise LogError(f"{where} has {len(cells)} cells, the header has {width}")
    text = {name: cells[index].strip() for name, index in columns.items()}
    step = _integer(_number(text.pop("step"), "step", where), "step", where)
    attempt = 0
    if "attempt" in text:
        value = _number(text.pop("attempt"), "attempt", where)
        attempt = _integer(value, "attempt", where)
    scalars = {}
    for name, cell in text.items():
        value = _number(cell, name, where)
        if value is not None:
            scalars[name] = value
    return LogRow(step=step, attempt=attempt, scalars=scalars)


def _number(cell: str, name: str, where: str) -> float | None:
    """A number, or None for an empty cell."""
    if not cell:
        return None
    if "_" not in cell:  # float("1_0") is Python's idea, not a log's
        try:
            return float(cell)
        except ValueError:
            pass
    shown = cell if len(cell) <= 40 else cell[:37] + "..."
    raise LogError(
        f"{where}: {name} is {shown!r}; allowed: a number, NaN, Inf, -Infinity or nothing"
    )


def _integer(value: float | None, name: str, where: str) -> int:
    if value is None:
        raise LogError(f"{where}: {name} is empty")
    if not math.isfinite(value) or value != int(value) or not 0 <= value <= _MAX_STEP:
        raise LogError(f"{where}: {name} is {value:g}; allowed: a whole number from 0")
    return int(value)


def _read_parquet(path: Path) -> list[LogRow]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise LogError(
            f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}"
        ) from None
    if "scalars" not in table.column_names and "tensors" not in table.column_names:
        return _flat_rows(path, table)
    attempts = np.zeros(table.num_rows, dtype=np.int64)
    try:
        if "attempt" in table.column_names:
            attempts = table["attempt"].cast(pa.int64()).fill_null(0).to_numpy()
        records = table_to_records(conform(table))
    except (RecordError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise LogError(f"{path}: {str(error).splitlines()[0]}") from None
    return [
        LogRow(step=record.step, attempt=int(attempt), scalars=record.scalars, record=record)
        for record, attempt in zip(records, attempts, strict=True)
    ]


def _flat_rows(path: Path, table: pa.Table) -> list[LogRow]:
    columns = _columns(path, [name.strip() for name in table.column_names])
    values: dict[str, list[float | None]] = {}
    for name, index in columns.items():
        try:
            values[name] = table.column(index).cast(pa.float64(), safe=False).to_pylist()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise LogError(f"{path}: column {name} holds no numbers") from None
    steps = values.pop("step")
    attempts = values.pop("attempt", [0.0] * len(steps))
    rows = []
    for number, (step, attempt) in enumerate(zip(steps, attempts, strict=True)):
        where = f"{path}: data row {number + 1}"
        scalars = {n: v[number] for n, v in values.items()}
        rows.append(
            LogRow(
                step=_integer(step, "step", where),
                attempt=_integer(attempt, "attempt", where),
                scalars={n: v for n, v in scalars.items() if v is not None},
            )
        )
    return rows
