"""Records to Arrow and back, and the flat view of their tensors.

Two ways in: dataclasses (people, tests, JSON) and columns (the monitor, where a dataclass a row
would cost more than the statistics).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.monitor.record.model import (
    STATISTICS,
    Event,
    RecordError,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
)
from foreshock.monitor.record.schema import (
    EVENT_TYPE,
    IDENTITY_FIELDS,
    SCHEMA,
    TENSOR_TYPE,
    conform,
    statistic_type,
    validate,
)

__all__ = [
    "IdentityColumns",
    "PlainColumns",
    "StatisticColumns",
    "flatten_tensors",
    "read_stream",
    "record_batch",
    "records_to_table",
    "table_to_records",
    "write_stream",
]

StatisticColumns = Mapping[str, "np.ma.MaskedArray[Any, Any]"]
"""Statistic name to one value per tensor on the last axis; masked = not measured."""

_Pair = tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]
PlainColumns = Mapping[str, _Pair]
"""Statistic name to its values and where they are measured, each of shape (tensors,).

Masked arrays say the same, and cost more to make than a record may.
"""

_IDENTITY_NAMES = tuple(f.name for f in IDENTITY_FIELDS)


_TYPES: Final = {"numel": pa.int64(), "observations": pa.int32()} | {
    name: statistic_type(name) for name in STATISTICS
}
_BY_TYPE: Final = {
    kind: [name for name, to in _TYPES.items() if to == kind]
    for kind in dict.fromkeys(_TYPES.values())
}
_NO_TENSORS: Final = pa.array([[]], pa.list_(TENSOR_TYPE))


def records_to_table(records: Iterable[StepRecord]) -> pa.Table:
    """Records as a table of `SCHEMA`, in the given order."""
    rows = [_record_row(record) for record in records]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _record_row(record: StepRecord) -> dict[str, Any]:
    return {
        "step": record.step,
        "time": record.time,
        "scalars": list(record.scalars.items()),
        "events": [_event_row(event) for event in record.events],
        "tensors": [_tensor_row(tensor) for tensor in record.tensors],
    }


def _event_row(event: Event) -> dict[str, Any]:
    return {f.name: getattr(event, f.name) for f in EVENT_TYPE}


def _tensor_row(tensor: TensorStatistics) -> dict[str, Any]:
    row = {name: getattr(tensor.identity, name) for name in _IDENTITY_NAMES}
    row |= {"numel": tensor.numel, "observations": tensor.observations}
    row |= {name: getattr(tensor, name) for name in (*STATISTICS, "source")}
    return row | {"exponents": None if tensor.exponents is None else list(tensor.exponents)}


def table_to_records(table: pa.Table) -> list[StepRecord]:
    """Read records out of a table; it is conformed and validated first.

    Raises:
        RecordError: The table breaks the contract.
    """
    rows = validate(conform(table)).to_pylist()
    return [
        StepRecord(
            step=row["step"],
            time=row["time"],
            scalars={k: v for k, v in row["scalars"] or () if v is not None},
            events=tuple(Event(**event) for event in row["events"] or ()),
            tensors=tuple(_tensor_from(tensor) for tensor in row["tensors"] or ()),
        )
        for row in rows
    ]


def _tensor_from(row: dict[str, Any]) -> TensorStatistics:
    identity = TensorIdentity(**{name: row.pop(name) for name in _IDENTITY_NAMES})
    observations = row.pop("observations")
    exponents = row.pop("exponents")
    return TensorStatistics(
        identity=identity,
        observations=1 if observations is None else observations,
        exponents=None if exponents is None else tuple(exponents),
        **row,
    )


@dataclass(frozen=True, slots=True)
class IdentityColumns:
    """The identities of a fixed set of tensors, as Arrow columns made once and used every step."""

    identities: tuple[TensorIdentity, ...]
    arrays: tuple[pa.Array, ...]

    @classmethod
    def of(cls, identities: Sequence[TensorIdentity]) -> IdentityColumns:
        """Make the columns."""
        arrays = tuple(
            pa.array([getattr(identity, f.name) for identity in identities], f.type)
            for f in IDENTITY_FIELDS
        )
        return cls(tuple(identities), arrays)

    def take(self, rows: np.ndarray[Any, np.dtype[np.intp]]) -> IdentityColumns:
        """The columns of some of the tensors."""
        index = pa.array(rows)
        return IdentityColumns(
            tuple(self.identities[int(row)] for row in rows),
            tuple(array.take(index) for array in self.arrays),
        )


def record_batch(
    *,
    step: int,
    time: datetime,
    scalars: Mapping[str, float],
    events: Sequence[Event] = (),
    identities: IdentityColumns | None = None,
    statistics: StatisticColumns | PlainColumns | None = None,
    sources: Sequence[str | None] | None = None,
    exponents: Sequence[Sequence[int] | None] | None = None,
) -> pa.RecordBatch:
    """One record as a batch of `SCHEMA`, from columns.

    Args:
        step: 0-based optimizer step.
        time: Timezone-aware end of the step.
        scalars: Name to value; leave out what was not measured.
        events: What happened at the step.
        identities: One identity per tensor; None when no tensors were measured.
        statistics: `numel`, `observations` and any of `STATISTICS`, each of shape (tensors,).
        sources: One of `SOURCES` or None per tensor; None where all are plain values.
        exponents: 256 counts or None per tensor; None where nobody asked for them.
    """
    if identities is None or statistics is None:
        tensors = _NO_TENSORS
    else:
        tensors = _tensor_list(identities, statistics, sources, exponents)
    return pa.record_batch(
        [
            pa.array([step], pa.int64()),
            pa.array([time], pa.timestamp("us", tz="UTC")),
            pa.array([list(scalars.items())], SCHEMA.field("scalars").type),
            pa.array([[_event_row(event) for event in events]], pa.list_(EVENT_TYPE)),
            tensors,
        ],
        schema=SCHEMA,
    )


def _tensor_list(
    identities: IdentityColumns,
    statistics: StatisticColumns | PlainColumns,
    sources: Sequence[str | None] | None,
    exponents: Sequence[Sequence[int] | None] | None,
) -> pa.Array:
    count = len(identities.identities)
    made: dict[str, pa.Array] = {}
    for to, names in _BY_TYPE.items():
        there = [name for name in names if name in statistics]
        made |= zip(there, _arrays([_pair(statistics[name]) for name in there], to), strict=True)
    columns: list[pa.Array] = list(identities.arrays)
    for name, to in _TYPES.items():
        columns.append(made[name] if name in made else pa.nulls(count, to))
    for optional, kind in ((sources, pa.string()), (exponents, pa.list_(pa.int64()))):
        columns.append(pa.nulls(count, kind) if optional is None else pa.array(optional, kind))
    struct = pa.StructArray.from_arrays(columns, fields=list(TENSOR_TYPE))
    offsets = pa.array([0, count], pa.int32())
    return pa.ListArray.from_arrays(offsets, struct, type=pa.list_(TENSOR_TYPE))


def _pair(column: np.ma.MaskedArray[Any, Any] | _Pair) -> _Pair:
    if isinstance(column, tuple):
        return column
    return np.asarray(column.data), ~np.ma.getmaskarray(column)


def _arrays(columns: Sequence[_Pair], to: pa.DataType) -> list[pa.Array]:
    """Columns of one type; all of them at once, since each step of it costs the same for one."""
    if not columns:
        return []
    valid = np.stack([valid for _, valid in columns])
    values = np.where(valid, np.stack([values for values, _ in columns]), 0)
    with np.errstate(over="ignore"):
        data = values.astype(to.to_pandas_dtype())
    bits = np.packbits(valid, axis=1, bitorder="little")
    return [
        pa.Array.from_buffers(to, len(row), [pa.py_buffer(there), pa.py_buffer(row)])
        for row, there in zip(data, bits, strict=True)
    ]


def flatten_tensors(table: pa.Table) -> pa.Table:
    """One row per tensor: `record` (row of the table), `step`, then the columns of `TENSOR_TYPE`.

    Args:
        table: A conformed table.
    """
    column = table["tensors"]
    # Combining one chunk would copy it.
    lists = column.chunk(0) if column.num_chunks == 1 else _combined(column)
    tensors = lists.flatten()
    record = pc.list_parent_indices(lists).cast(pa.int64())
    columns = {"record": record, "step": table["step"].take(record)}
    columns |= zip(TENSOR_TYPE.names, tensors.flatten(), strict=True)
    return pa.table(columns)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    chunks = column.combine_chunks()
    return chunks.chunk(0) if isinstance(chunks, pa.ChunkedArray) else chunks


def write_stream(table: pa.Table, *, compression: str | None = "zstd") -> bytes:
    """An Arrow IPC stream of a table in one piece, buffers compressed."""
    # A message per record would cost a reader several times as much as one for all.
    table = table.combine_chunks()
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read_stream(body: bytes) -> pa.Table:
    """Read an Arrow IPC stream, conform and validate it.

    Raises:
        RecordError: The bytes are no Arrow stream, are cut short, or break the contract.
    """
    try:
        table = pa.ipc.open_stream(body).read_all()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, EOFError) as error:
        raise RecordError(f"not a whole Arrow IPC stream: {error}") from None
    return validate(conform(table))
