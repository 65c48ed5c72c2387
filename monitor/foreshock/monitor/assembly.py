"""From what came off the device to a record: the worker thread's half of a step.

Pure numpy and Arrow; never sees a model. Merging over micro-batches is `TensorSums.merge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from foreshock.monitor.forensics import NonfiniteWatch
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import (
    FIELD_REDUCTIONS,
    Event,
    IdentityColumns,
    StatisticColumns,
    TensorIdentity,
    TensorSums,
    record_batch,
)
from foreshock.monitor.record.model import ROLES
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.transfer import HostArray

__all__ = ["Assembler"]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the rows of a record come from, worked out once per set of observations.

    Attributes:
        rounds: Per round of merging, positions of observations and the rows they go to.
        widths: Rows that share a number of features, and positions of their channel sums.
        quantized: Per row, whether its format has a scale.
    """

    columns: IdentityColumns
    rounds: tuple[tuple[Any, Any], ...]
    widths: tuple[tuple[Any, Any], ...]
    quantized: np.ndarray[Any, np.dtype[np.bool_]]


class Assembler:
    """Makes the records of one run.

    Args:
        layers: Layer names in the order in which their rows shall stand.
        rank: This process's global rank.
    """

    def __init__(self, layers: Sequence[str], *, rank: int) -> None:
        self._order = {name: position for position, name in enumerate(layers)}
        self._rank = rank
        self._nonfinite = NonfiniteWatch(rank)
        # The latest layout: the set of tensors of a run rarely changes.
        self._layout: tuple[object, _Layout] | None = None

    def record(self, snapshot: Snapshot, events: Sequence[Event] = ()) -> pa.RecordBatch:
        """The record of a step, with more events than the snapshot holds.

        Waits for the device.
        """
        arrays = snapshot.packed.arrays()
        scalars = _scalars(snapshot, arrays)
        identities = statistics = None
        if snapshot.measured and snapshot.observations:
            layout = self._layout_of(snapshot)
            identities = layout.columns
            observed = arrays["observations"].reshape(len(snapshot.observations), -1)
            statistics = self._statistics(layout, observed, arrays["channels"])
        found = self._nonfinite.events(snapshot, arrays, scalars)
        return record_batch(
            step=snapshot.step,
            time=snapshot.time,
            scalars=scalars,
            events=(*snapshot.events, *events, *found),
            identities=identities,
            statistics=statistics,
        )

    def _layout_of(self, snapshot: Snapshot) -> _Layout:
        key = (tuple(identity for identity, _ in snapshot.observations), snapshot.channels)
        if self._layout is None or self._layout[0] != key:
            self._layout = (key, self._make_layout(key[0], snapshot.channels))
        return self._layout[1]

    def _make_layout(
        self,
        observed: tuple[TensorIdentity, ...],
        channels: tuple[tuple[TensorIdentity, int], ...],
    ) -> _Layout:
        identities = sorted(set(observed), key=self._position)
        row_of = {identity: row for row, identity in enumerate(identities)}
        seen = dict.fromkeys(identities, 0)
        rounds: list[tuple[list[int], list[int]]] = []
        for position, identity in enumerate(observed):
            if seen[identity] == len(rounds):
                rounds.append(([], []))
            positions, rows = rounds[seen[identity]]
            positions.append(position)
            rows.append(row_of[identity])
            seen[identity] += 1
        return _Layout(
            columns=IdentityColumns.of(identities),
            rounds=tuple((np.array(positions), np.array(rows)) for positions, rows in rounds),
            widths=_rows_by_width(row_of, channels),
            quantized=np.array([FORMATS[identity.format].scaled for identity in identities]),
        )

    def _position(self, identity: TensorIdentity) -> tuple[object, ...]:
        layer = self._order.get(identity.layer, len(self._order))
        role = ROLES.index(identity.role)
        return (layer, identity.layer, identity.call_index, role, identity.format)

    def _statistics(
        self, layout: _Layout, observed: HostArray, channels: HostArray
    ) -> StatisticColumns:
        rows = len(layout.quantized)
        merged = TensorSums.empty((rows,))
        for positions, targets in layout.rounds:
            merged = merged.merge(self._sums(observed[positions], targets, layout))
        columns: dict[str, np.ma.MaskedArray[Any, Any]] = {}
        for group, positions in layout.widths:
            part = _take(merged, group, channels[positions]).statistics()
            for name, values in part.items():
                whole = columns.setdefault(name, np.ma.MaskedArray(np.zeros(rows), mask=True))
                whole[group] = values
        return columns

    def _sums(self, observed: HostArray, rows: Any, layout: _Layout) -> TensorSums:
        empty = TensorSums.empty((len(layout.quantized),))
        values: dict[str, Any] = {}
        for column, name in enumerate(FIELD_REDUCTIONS):
            values[name] = getattr(empty, name)
            values[name][rows] = observed[:, column]
        ranks = np.full(len(layout.quantized), float(self._rank))
        return TensorSums(**values, amax_rank=ranks, quantized=layout.quantized)


def _take(sums: TensorSums, rows: Any, channels: HostArray) -> TensorSums:
    values = {name: getattr(sums, name)[rows] for name in FIELD_REDUCTIONS}
    return TensorSums(
        **values,
        amax_rank=sums.amax_rank[rows],
        quantized=sums.quantized[rows],
        channel_sum2=channels,
    )


def _rows_by_width(
    row_of: Mapping[TensorIdentity, int], channels: tuple[tuple[TensorIdentity, int], ...]
) -> tuple[tuple[Any, Any], ...]:
    groups: dict[int, tuple[list[int], list[int]]] = {}
    offset = 0
    for identity, width in channels:
        rows, offsets = groups.setdefault(width, ([], []))
        rows.append(row_of[identity])
        offsets.append(offset)
        offset += width
    return tuple(
        (np.array(rows), np.array(offsets)[:, None] + np.arange(width))
        for width, (rows, offsets) in groups.items()
    )


def _scalars(snapshot: Snapshot, arrays: Mapping[str, HostArray]) -> dict[str, float]:
    found: dict[str, float] = {}
    if arrays["losses"].size:
        found["loss"] = float(arrays["losses"].mean())
    with np.errstate(over="ignore", invalid="ignore"):
        for group, name in (("gradients", "grad_norm"), ("parameters", "param_norm")):
            if arrays[group].size:
                found[name] = float(np.sqrt(np.square(arrays[group]).sum()))
    logged = zip(snapshot.names["scalars"], arrays["scalars"].tolist(), strict=True)
    # What the user logged stands against what was found.
    return found | dict(snapshot.scalars) | dict(logged)
