"""Tables of records as the columns that scorer, diagnosis and metrics work on.

No dataclass per tensor: one numpy column per statistic and step. Computes no statistic itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa

from foreshock.monitor.record import (
    STATISTICS,
    Event,
    StatisticColumns,
    TensorIdentity,
    flatten_tensors,
)

__all__ = ["IDENTITY_COLUMNS", "RecordColumns", "RecordReader", "TensorLayout", "tensor_rows"]

IDENTITY_COLUMNS: Final = (
    "layer",
    "role",
    "format",
    "call_index",
    "expert",
    "granularity",
    "what_if",
)
_VALUES: Final = ("numel", "observations", *STATISTICS)

IntArray = np.ndarray[Any, np.dtype[np.intp]]


@dataclass(frozen=True, slots=True, eq=False)
class TensorLayout:
    """The tensors of a record, in row order.

    Attributes:
        identities: One per row.
        layers: One layer name per row.
        rows_of_role: Role to the rows the run really used (no what-if).
    """

    identities: tuple[TensorIdentity, ...]
    layers: tuple[str, ...]
    rows_of_role: Mapping[str, IntArray]

    @classmethod
    def of(cls, identities: tuple[TensorIdentity, ...]) -> TensorLayout:
        """Group the rows."""
        rows: dict[str, list[int]] = {}
        for row, identity in enumerate(identities):
            if not identity.what_if:
                rows.setdefault(identity.role, []).append(row)
        return cls(
            identities,
            tuple(identity.layer for identity in identities),
            {role: np.array(found, dtype=np.intp) for role, found in rows.items()},
        )


@dataclass(frozen=True, slots=True, eq=False)
class RecordColumns:
    """One record.

    Attributes:
        step: 0-based optimizer step.
        time: When the step ended.
        scalars: Name to value; absent = not measured.
        events: What happened at the step.
        layout: Which tensors were measured; None off the cadence.
        statistics: Name to a masked array with one value per row of the layout.
    """

    step: int
    time: datetime
    scalars: Mapping[str, float]
    events: tuple[Event, ...] = ()
    layout: TensorLayout | None = None
    statistics: StatisticColumns | None = None


class RecordReader:
    """Reads the records of one run; a layout that stays the same is made once."""

    def __init__(self) -> None:
        self._layout: TensorLayout | None = None
        self._identity: pa.Table | None = None

    def read(self, table: pa.Table) -> Iterator[RecordColumns]:
        """Records of a table, in the table's order.

        Args:
            table: Conformed and validated table of `SCHEMA`.
        """
        if table.num_rows == 0:
            return
        flat = flatten_tensors(table)
        columns = {name: _masked(flat[name]) for name in _VALUES}
        first = np.searchsorted(flat["record"].to_numpy(), np.arange(table.num_rows + 1))
        identity = flat.select(IDENTITY_COLUMNS)
        rows = table.select(["step", "time", "scalars", "events"]).to_pylist()
        for index, row in enumerate(rows):
            start, stop = int(first[index]), int(first[index + 1])
            measured = stop > start
            yield RecordColumns(
                step=row["step"],
                time=row["time"],
                scalars={k: v for k, v in row["scalars"] or () if v is not None},
                events=tuple(Event(**event) for event in row["events"] or ()),
                layout=self._known_layout(identity.slice(start, stop - start))
                if measured
                else None,
                statistics={k: v[start:stop] for k, v in columns.items()} if measured else None,
            )

    def _known_layout(self, identity: pa.Table) -> TensorLayout:
        if self._layout is None or self._identity is None or not identity.equals(self._identity):
            rows = identity.to_pylist()
            self._layout = TensorLayout.of(tuple(TensorIdentity(**row) for row in rows))
            # A copy, so that the batch the first record came in can be freed.
            self._identity = pa.Table.from_pylist(rows, schema=identity.schema)
        return self._layout


def _masked(column: pa.ChunkedArray) -> np.ma.MaskedArray[Any, Any]:
    missing = column.is_null().to_numpy()
    values = column.to_numpy() if not missing.any() else column.fill_null(0).to_numpy()
    return np.ma.MaskedArray(values, mask=missing)


def tensor_rows(table: pa.Table) -> int:
    """How many tensors stand in records of `SCHEMA`."""
    return sum(
        chunk.offsets[len(chunk)].as_py() - chunk.offsets[0].as_py()
        for chunk in table["tensors"].chunks
    )
