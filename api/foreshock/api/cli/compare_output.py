"""How a comparison is told: a sentence and a table, JSON, or a file. Judges nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from foreshock.api.cli.transfer import TransferError
from foreshock.api.compare import Comparison, Parting
from foreshock.monitor.record import encode_number

__all__ = ["as_json", "check_target", "partings_table", "sentence", "show", "write_table"]

_COLUMNS: Final = pa.schema(
    [
        ("rank", pa.int64()),
        ("step", pa.int64()),
        ("layer", pa.string()),
        ("role", pa.string()),
        ("call_index", pa.int64()),
        ("expert", pa.int64()),
        ("format", pa.string()),
        ("statistic", pa.string()),
        ("kind", pa.string()),
        ("a", pa.float64()),
        ("b", pa.float64()),
        ("noise_units", pa.float64()),
        ("largest_noise_units", pa.float64()),
        ("asked_noise_units", pa.float64()),
    ]
)
_SUFFIXES: Final = (".csv", ".parquet")


def _row(rank: int, parting: Parting) -> dict[str, Any]:
    key = parting.key
    return {
        "rank": rank,
        "step": parting.step,
        "layer": key.layer or None,
        "role": key.role or None,
        "call_index": key.call_index if key.layer else None,
        "expert": key.expert if key.expert >= 0 else None,
        "format": key.format or None,
        "statistic": key.statistic,
        "kind": parting.kind,
        "a": parting.a,
        "b": parting.b,
        "noise_units": parting.units,
        "largest_noise_units": parting.largest_units,
        "asked_noise_units": parting.asked,
    }


def partings_table(found: Comparison) -> pa.Table:
    """All partings, ranked; NaN and infinities stay what they are."""
    rows = [_row(rank, parting) for rank, parting in enumerate(found.partings, 1)]
    return pa.Table.from_pylist(rows, schema=_COLUMNS)


def check_target(target: Path) -> None:
    """Refuse a file that could not be written, before anything is loaded.

    Raises:
        TransferError: Its suffix is unknown, or its folder is not there.
    """
    if target.suffix not in _SUFFIXES:
        raise TransferError(f"{target} is none of: {', '.join(_SUFFIXES)}")
    if not target.absolute().parent.is_dir():
        raise TransferError(f"{target.parent} is no folder")


def write_table(table: pa.Table, target: Path) -> None:
    """Write a file, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    try:
        if target.suffix == ".csv":
            pa_csv.write_csv(table, partial)
        else:
            pq.write_table(table, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def as_json(a: str, b: str, found: Comparison) -> dict[str, Any]:
    """For scripts; non-finite numbers as words."""
    rows = [_row(rank, parting) for rank, parting in enumerate(found.partings, 1)]
    return {
        "a": a,
        "b": b,
        "parted": bool(found.partings),
        "first_step": found.first_step,
        "last_step": found.last_step,
        "series": found.series,
        "too_short": found.too_short,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "partings": [
            {k: encode_number(v) if isinstance(v, float) else v for k, v in row.items()}
            for row in rows
        ],
    }


def sentence(a: str, b: str, found: Comparison) -> str:
    """What parted first, or that nothing did."""
    span = f"steps {found.first_step} to {found.last_step}"
    if not found.partings:
        return f"{b} does not part from {a} in any of {found.series} series, {span}."
    first = found.partings[0]
    away = (
        "where one side is not finite"
        if first.kind == "nonfinite"
        else f"{first.units:.1f} times the noise of seeds ({first.asked:.1f} is asked for)"
    )
    return (
        f"{b} parts from {a} at step {first.step}, in {_name(first)} first: {_number(first.b)}"
        f" against {_number(first.a)}, {away}; {len(found.partings)} of {found.series} series part."
    )


def _name(parting: Parting) -> str:
    key = parting.key
    if not key.layer:
        return key.statistic
    call = f" (call {key.call_index})" if key.call_index else ""
    expert = f" (expert {key.expert})" if key.expert >= 0 else ""
    format_ = f" in {key.format}" if key.format else ""
    return f"{key.statistic} of {key.role} of {key.layer}{call}{expert}{format_}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def show(a: str, b: str, found: Comparison, *, seeds: int, top: int) -> None:
    """Print the sentence, the table, and what was not compared."""
    console = Console(soft_wrap=True)
    console.print(sentence(a, b, found), markup=False, highlight=False)
    if found.partings:
        console.print(_table(a, b, found.partings[:top]))
    for line in _remarks(found, seeds, top):
        console.print(line, markup=False, highlight=False)


def _table(a: str, b: str, partings: Sequence[Parting]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "step", "series", a, b, "noise", "most"):
        table.add_column(heading, justify="left" if heading == "series" else "right")
    for rank, parting in enumerate(partings, 1):
        units = "" if parting.kind == "nonfinite" else f"{parting.units:.1f}"
        most = "" if parting.kind == "nonfinite" else f"{parting.largest_units:.1f}"
        numbers = _number(parting.a), _number(parting.b), units, most
        table.add_row(str(rank), str(parting.step), _name(parting), *numbers)
    return table


def _remarks(found: Comparison, seeds: int, top: int) -> list[str]:
    remarks = []
    if len(found.partings) > top:
        remarks.append(f"{len(found.partings) - top} more; --export or --json has all")
    if found.too_short:
        remarks.append(f"{found.too_short} series have too few common steps to be judged")
    if found.only_a or found.only_b:
        remarks.append(
            f"{found.only_a} series are in the first alone, {found.only_b} in the second"
        )
    if not seeds and found.partings:
        remarks.append("noise is taken from the two runs themselves; --seeds RUN says more")
    return remarks
