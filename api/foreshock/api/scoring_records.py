"""Tables of records as what a scorer takes in: scalars, events and a signal vector per record.

Works on all records of a table at once, whatever runs and layouts they are of: one sort per role
instead of Python per tensor. Knows no scorer and keeps nothing but the newest layout of each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.columns import IDENTITY_COLUMNS, TensorLayout
from foreshock.api.signals import (
    EXTREMES,
    FOLD_STATISTICS,
    SIGNAL_ROLES,
    SIGNALS,
    TENSOR_SIGNALS,
    fold_statistics,
    nonfinite_share,
    scalar_signals,
    worst_rows,
)
from foreshock.monitor.record import Event, TensorIdentity

__all__ = ["KnownLayout", "ScoringRecord", "scoring_records"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_SCALARS: Final = len(SIGNALS) - len(TENSOR_SIGNALS)
_PER_ROLE: Final = (len(TENSOR_SIGNALS) - 1) // len(SIGNAL_ROLES)
_STATISTICS: Final = (*FOLD_STATISTICS, "nonfinite_count")
_NO_LAYERS: Final = (None,) * len(EXTREMES)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoringRecord:
    """One record as a scorer takes it in.

    Attributes:
        step: 0-based optimizer step.
        time: When it ended.
        scalars: Name to value; absent = not measured.
        events: What happened at the step.
        signals: (len(SIGNALS),) as `summarise` gives them.
        measured: Whether it holds tensors.
        worst: Layer of each of `EXTREMES`, None where nothing finite was measured.
    """

    step: int
    time: datetime
    scalars: Mapping[str, float]
    events: tuple[Event, ...] = ()
    signals: FloatArray
    measured: bool = False
    worst: tuple[str | None, ...] = _NO_LAYERS


class KnownLayout:
    """The layout that one run's tensors had last: kept, because making one costs a whole record."""

    def __init__(self) -> None:
        self._layout: TensorLayout | None = None
        self._identity: tuple[pa.Array, ...] = ()

    def of(self, identity: Sequence[pa.Array]) -> TensorLayout:
        """The layout of a record.

        Args:
            identity: Its `IDENTITY_COLUMNS`, one entry per tensor.
        """
        known = self._layout
        if known is not None and all(
            mine.equals(given) for mine, given in zip(self._identity, identity, strict=True)
        ):
            return known
        # Copies, so that the batch the first record came in can be freed.
        self._identity = tuple(pa.concat_arrays([column]) for column in identity)
        values = [column.to_pylist() for column in identity]
        self._layout = TensorLayout.of(
            tuple(
                TensorIdentity(**dict(zip(IDENTITY_COLUMNS, row, strict=True)))
                for row in zip(*values, strict=True)
            )
        )
        return self._layout


def scoring_records(table: pa.Table, layouts: Sequence[KnownLayout]) -> list[ScoringRecord]:
    """Records as a scorer takes them in.

    Args:
        table: E records of `SCHEMA`, conformed and validated, of any runs.
        layouts: E; records of one run share one.
    """
    count = table.num_rows
    if count == 0:
        return []
    table = table.combine_chunks()
    scalars = _scalars(table["scalars"].chunk(0), count)
    events = _events(table["events"].chunk(0), count)
    signals = np.full((count, len(SIGNALS)), np.nan)
    for row, values in zip(signals, scalars, strict=True):
        row[:_SCALARS] = scalar_signals(values)
    measured, worst = _tensors(table["tensors"].chunk(0), layouts, signals)
    return [
        ScoringRecord(
            step=step,
            time=time,
            scalars=scalars[index],
            events=events.get(index, ()),
            signals=signals[index],
            measured=bool(measured[index]),
            worst=worst.get(index, _NO_LAYERS),
        )
        for index, (step, time) in enumerate(
            zip(table["step"].to_pylist(), table["time"].to_pylist(), strict=True)
        )
    ]


def _starts(lists: pa.Array, count: int) -> IntArray:
    """(count + 1,) where each list begins in the flattened values; null lists hold none."""
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), out=starts[1:])
    return starts


def _scalars(maps: pa.Array, count: int) -> list[dict[str, float]]:
    pairs = maps.cast(pa.list_(pa.struct([("key", pa.string()), ("value", pa.float64())])))
    starts = _starts(pairs, count).tolist()
    flat = pairs.flatten()
    names = pc.struct_field(flat, "key").to_pylist()
    values = pc.struct_field(flat, "value").to_pylist()
    return [
        {
            name: value
            for name, value in zip(names[start:stop], values[start:stop], strict=True)
            if value is not None
        }
        for start, stop in pairwise(starts)
    ]


def _events(lists: pa.Array, count: int) -> dict[int, tuple[Event, ...]]:
    starts = _starts(lists, count)
    if starts[-1] == 0:
        return {}
    rows = lists.flatten().to_pylist()
    return {
        int(index): tuple(Event(**row) for row in rows[starts[index] : starts[index + 1]])
        for index in np.flatnonzero(np.diff(starts))
    }


def _tensors(
    lists: pa.Array, layouts: Sequence[KnownLayout], signals: FloatArray
) -> tuple[npt.NDArray[np.bool_], dict[int, tuple[str | None, ...]]]:
    """Fill the tensor part of the signals; which records hold tensors, and their worst layers."""
    starts = _starts(lists, len(signals))
    measured = np.diff(starts) > 0
    places = np.flatnonzero(measured)
    if not places.size:
        return measured, {}
    tensors = lists.flatten()
    columns = [pc.struct_field(tensors, name) for name in IDENTITY_COLUMNS]
    found = []
    for place in places.tolist():
        start, length = int(starts[place]), int(starts[place + 1] - starts[place])
        found.append(layouts[place].of([column.slice(start, length) for column in columns]))
    values = _values(tensors)
    rows = [_padded(found, starts[places], role) for role in SIGNAL_ROLES]
    part = np.full((places.size, len(TENSOR_SIGNALS)), np.nan)
    part[:, 0] = _nonfinite(values[-1], rows)
    layers: list[list[str | None]] = [[] for _ in places]
    for index, (role, at) in enumerate(zip(SIGNAL_ROLES, rows, strict=True)):
        # The last column is the NaN that padding points at.
        raw = values[:-1, at].transpose(1, 0, 2)
        first = 1 + index * _PER_ROLE
        if at.shape[1]:
            part[:, first : first + _PER_ROLE] = fold_statistics(raw)
        _name(layers, found, role, raw)
    signals[places, _SCALARS:] = part
    named = zip(places.tolist(), layers, strict=True)
    return measured, {place: tuple(names) for place, names in named}


def _values(tensors: pa.Array) -> FloatArray:
    """(_STATISTICS, tensors + 1), NaN = not measured; the last column is all NaN."""
    values = np.full((len(_STATISTICS), len(tensors) + 1), np.nan)
    for row, name in zip(values, _STATISTICS, strict=True):
        row[:-1] = pc.struct_field(tensors, name).to_numpy(zero_copy_only=False)
    return values


def _padded(layouts: Sequence[TensorLayout], starts: IntArray, role: str) -> IntArray:
    """(records, most rows) places of a role's tensors; -1 where a record has fewer."""
    rows: list[Any] = [layout.rows_of_role.get(role, ()) for layout in layouts]
    at = np.full((len(rows), max(map(len, rows))), -1, np.int64)
    for line, mine, start in zip(at, rows, starts, strict=True):
        line[: len(mine)] = np.asarray(mine, np.int64) + start
    return at


def _nonfinite(counts: FloatArray, rows: Sequence[IntArray]) -> FloatArray:
    at = np.concatenate(list(rows), axis=1)
    total = (at >= 0).sum(axis=1)
    share = np.full(len(at), math.nan)
    some = total > 0
    share[some] = nonfinite_share(counts[at[some]], total[some])
    return share


def _name(
    layers: list[list[str | None]],
    layouts: Sequence[TensorLayout],
    role: str,
    values: FloatArray,
) -> None:
    """Append the layers of a role's extremes to each record's list."""
    if values.shape[-1] == 0:
        for names in layers:
            names.extend([None] * len(FOLD_STATISTICS))
        return
    for names, layout, worst in zip(layers, layouts, worst_rows(values).tolist(), strict=True):
        rows = layout.rows_of_role.get(role, ())
        names.extend(layout.layers[int(rows[row])] if row >= 0 else None for row in worst)
