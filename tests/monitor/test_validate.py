"""The checks over columns say what one reading the records one by one would say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.monitor.formats import FORMATS, GRANULARITIES
from foreshock.monitor.record import (
    EXPONENTS,
    ROLES,
    SCHEMA,
    SOURCES,
    RecordError,
    records_to_table,
    validate,
)
from tests.monitor.record_strategies import RECORDS

Row = dict[str, Any]
Finding = tuple[int, str]

_DEFAULTS = {"call_index": 0, "granularity": "tensor", "what_if": False}


def _tensors(rows: list[Row]) -> Iterator[tuple[int, Row]]:
    for index, row in enumerate(rows):
        for tensor in row["tensors"] or ():
            filled = {k: tensor[k] if tensor[k] is not None else v for k, v in _DEFAULTS.items()}
            yield index, tensor | filled


def _steps(rows: list[Row]) -> Iterator[Finding]:
    yield from ((i, "step is missing") for i, row in enumerate(rows) if row["step"] is None)
    yield from ((i, "step is negative") for i, row in enumerate(rows) if row["step"] < 0)
    yield from ((i, "time is missing") for i, row in enumerate(rows) if row["time"] is None)


def _scalars(rows: list[Row]) -> Iterator[Finding]:
    for index, row in enumerate(rows):
        names = [name for name, _ in row["scalars"] or ()]
        if len(set(names)) < len(names):
            yield index, "stands twice"


def _identities(rows: list[Row]) -> Iterator[Finding]:
    checks: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        ("a tensor has no layer", lambda t: t["layer"] is not None),
        ("a tensor has no numel", lambda t: t["numel"] is not None),
        ("a tensor's role is unknown", lambda t: t["role"] in ROLES),
        ("a tensor's format is unknown", lambda t: t["format"] in FORMATS),
        ("a tensor's granularity is unknown", lambda t: t["granularity"] in GRANULARITIES),
        ("a tensor's source is unknown", lambda t: t["source"] in (*SOURCES, None)),
        (
            "a tensor's exponents",
            lambda t: t["exponents"] is None or len(t["exponents"]) == EXPONENTS,
        ),
    )
    for reason, fine in checks:
        yield from ((i, reason) for i, tensor in _tensors(rows) if not fine(tensor))


def _first_fault(rows: list[Row]) -> Finding | None:
    for check in (_steps, _scalars, _identities):
        found = next(check(rows), None)
        if found is not None:
            return found
    return None


def _broken_cells(rows: list[Row]) -> list[tuple[Row, str, Any]]:
    """Cells that may be spoilt: the row that holds one, its name and what then stands there."""
    cells: list[tuple[Row, str, Any]] = []
    for row in rows:
        doubled = [*row["scalars"], *row["scalars"], ("x", 1.0), ("x", None)]
        cells += [(row, "step", None), (row, "step", -1), (row, "time", None)]
        cells += [(row, "scalars", doubled), (row, "scalars", None), (row, "tensors", None)]
        for tensor in row["tensors"]:
            names = ("layer", "role", "format", "granularity", "numel", "call_index", "what_if")
            cells += [(tensor, name, None) for name in names]
            cells += [(tensor, name, "odd") for name in ("role", "format", "granularity", "source")]
            cells += [(tensor, "exponents", [1, 2])]
    return cells


@given(st.lists(RECORDS, min_size=1, max_size=4), st.data())
def test_columns_and_records_find_the_same_first_fault(
    records: list[Any], data: st.DataObject
) -> None:
    rows = records_to_table(records).to_pylist()
    spoilt = data.draw(st.lists(st.sampled_from(_broken_cells(rows)), max_size=3))
    for holder, name, value in spoilt:
        holder[name] = value
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    cut = data.draw(st.integers(0, len(rows) - 1))
    # As it comes: in several chunks, or as a part of a larger table.
    table = data.draw(
        st.sampled_from([table, pa.concat_tables([table.slice(0, cut), table.slice(cut)])])
    )
    found = _first_fault(rows)
    if found is not None:
        with pytest.raises(RecordError, match=found[1]) as caught:
            validate(table)
        assert caught.value.index == found[0]
        return
    taken = [tensor for row in validate(table).to_pylist() for tensor in row["tensors"] or ()]
    assert repr(taken) == repr([tensor for _, tensor in _tensors(rows)])
