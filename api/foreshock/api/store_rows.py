"""A batch of records as rows of the store's tables, and rows back as records.

Pure Arrow; knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.store_schema import NO_EXPERT
from foreshock.monitor.record import SCHEMA, TENSOR_TYPE, RecordError, flatten_tensors
from foreshock.monitor.record.schema import EVENT_TYPE

__all__ = ["BatchFacts", "Placed", "assemble_records", "place", "split", "widen"]

_LABELS: Final = ("role", "format", "granularity")
_IDENTITY: Final = ("layer", "call_index", "role", "expert", "format", "granularity", "what_if")
_PAIRS: Final = pa.list_(pa.struct([("key", pa.string()), ("value", pa.float64())]))
_NO_EVENTS: Final = pa.schema(
    [
        pa.field("record", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("position", pa.uint32()),
        *EVENT_TYPE,
    ]
).empty_table()
_NO_EXPERT: Final = pa.scalar(NO_EXPERT, pa.int32())
# Below it the product with one more 32-bit column fits 64 bits.
_DENSE_BELOW: Final = 2**30


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """A batch taken apart, before it is known where it belongs.

    Attributes:
        steps: record (row of the batch), step, time.
        scalars: record, step, name, value; scalars that were null are left out.
        events: record, step, position and the columns of an event.
        tensors: record, step and the columns of `TENSOR_TYPE`, layers dictionary-encoded.
    """

    steps: pa.Table
    scalars: pa.Table
    events: pa.Table
    tensors: pa.Table

    @property
    def layer_names(self) -> list[str]:
        """Layers that stand in the batch."""
        return list(_layer_dictionary(self.tensors))


def split(table: pa.Table) -> BatchFacts:
    """Take a validated table of `SCHEMA` apart.

    Raises:
        RecordError: A tensor stands twice in one record; one of the two would be lost.
    """
    record = pa.array(np.arange(table.num_rows, dtype=np.int64))
    steps = pa.table({"record": record, "step": table["step"], "time": table["time"]})
    tensors = flatten_tensors(table)
    for name in ("layer", *_LABELS):
        index = tensors.schema.get_field_index(name)
        encoded = _only_chunk(tensors[name], pa.string()).dictionary_encode()
        tensors = tensors.set_column(index, name, encoded)
    if tensors.num_rows:
        _refuse_twins(tensors)
    return BatchFacts(
        steps=steps.combine_chunks(),
        scalars=_scalars(table),
        events=_events(table),
        tensors=tensors,
    )


def _refuse_twins(tensors: pa.Table) -> None:
    code = tensors["record"].to_numpy()
    most = int(code[-1])
    for name in _IDENTITY:
        values, low, high = _codes(tensors[name].chunk(0))
        if low == high:
            continue
        if most >= _DENSE_BELOW:
            code = np.unique(code, return_inverse=True)[1]
            most = int(code.max())
        code = code * (high - low + 1) + (values - low)
        most = most * (high - low + 1) + high - low
    ordered = np.sort(code)
    twins = ordered[1:] == ordered[:-1]
    if twins.any():
        row = int(np.flatnonzero(code == ordered[1:][twins][0])[0])
        identity = {name: tensors[name][row].as_py() for name in _IDENTITY}
        raise RecordError(f"a tensor stands twice: {identity}", tensors["record"][row].as_py())


def _codes(column: pa.Array) -> tuple[np.ndarray[Any, Any], int, int]:
    """A number per entry, their smallest and their largest; -1 for null."""
    if isinstance(column, pa.DictionaryArray):
        return column.indices.to_numpy().astype(np.int64), 0, len(column.dictionary) - 1
    if column.null_count == len(column):
        return np.empty(0, np.int64), -1, -1
    if column.null_count or pa.types.is_boolean(column.type):
        column = pc.fill_null(column.cast(pa.int64()), -1)
    values = column.to_numpy().astype(np.int64)
    return values, int(values.min()), int(values.max())


def _only_chunk(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    if column.num_chunks == 1:
        # Combining one chunk would copy it.
        return column.chunk(0)
    combined = column.combine_chunks()
    if isinstance(combined, pa.ChunkedArray):
        return combined.chunk(0) if combined.num_chunks else pa.nulls(0, kind)
    return combined


def _scalars(table: pa.Table) -> pa.Table:
    lists = _only_chunk(table["scalars"], SCHEMA.field("scalars").type).cast(_PAIRS)
    name, value = lists.flatten().flatten()
    record = pc.list_parent_indices(lists).cast(pa.int64())
    columns = {
        "record": record,
        "step": table["step"].take(record),
        "name": name.dictionary_encode(),
        "value": value,
    }
    rows = pa.table(columns)
    if value.null_count:
        rows = rows.filter(pc.is_valid(value))
    return rows.combine_chunks()


def _events(table: pa.Table) -> pa.Table:
    lists = _only_chunk(table["events"], SCHEMA.field("events").type)
    events = lists.flatten()
    if len(events) == 0:
        return _NO_EVENTS
    record = pc.list_parent_indices(lists).cast(pa.int64())
    columns = {"record": record, "step": table["step"].take(record)}
    columns["position"] = pa.array(_ranks(record.to_numpy()), pa.uint32())
    columns |= zip(EVENT_TYPE.names, events.flatten(), strict=True)
    columns["kind"] = pc.fill_null(columns["kind"], "")
    return pa.table(columns).combine_chunks()


def _ranks(groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Position of each entry within its run of equal values."""
    index = np.arange(len(groups))
    starts = np.ones(len(groups), bool)
    starts[1:] = groups[1:] != groups[:-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0))


def _layer_dictionary(tensors: pa.Table) -> list[str]:
    column = tensors["layer"]
    if column.num_chunks == 0:
        return []
    return [str(name) for name in column.chunk(0).dictionary.to_pylist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where a batch belongs.

    Attributes:
        run_id: Its run.
        attempts: (records,) attempt of each record.
        commit: Its number in the ledger.
        layer_ids: Layer name to id.
    """

    run_id: str
    attempts: np.ndarray[Any, np.dtype[np.int64]]
    commit: int
    layer_ids: Mapping[str, int]


def place(facts: BatchFacts, placed: Placed) -> dict[str, pa.Table]:
    """Rows per table of the store, for the tables that get any."""
    tables = {
        "steps": facts.steps,
        "scalars": facts.scalars,
        "events": facts.events,
        "tensor_stats": _stored_tensors(facts.tensors, placed.layer_ids),
    }
    return {name: _stamp(rows, placed) for name, rows in tables.items() if rows.num_rows}


def _stored_tensors(tensors: pa.Table, layer_ids: Mapping[str, int]) -> pa.Table:
    tensors = tensors.drop_columns(["exponents"])
    if tensors.num_rows == 0:
        return tensors
    ids = np.array([layer_ids[name] for name in _layer_dictionary(tensors)], np.uint16)
    codes = tensors["layer"].chunk(0).indices.to_numpy()
    layer = tensors.schema.get_field_index("layer")
    tensors = tensors.set_column(layer, "layer", pa.array(ids[codes]))
    if tensors["expert"].null_count == 0:
        return tensors
    expert = tensors.schema.get_field_index("expert")
    return tensors.set_column(expert, "expert", pc.fill_null(tensors["expert"], _NO_EXPERT))


def _stamp(rows: pa.Table, placed: Placed) -> pa.Table:
    record = rows["record"].to_numpy()
    count = len(record)
    run = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [placed.run_id])
    attempt = pa.array(placed.attempts[record].astype(np.uint32))
    ver = pa.array(np.full(count, placed.commit, np.uint64))
    stamped = rows.drop_columns(["record"]).add_column(0, "run_id", run)
    return stamped.append_column("attempt", attempt).append_column("ver", ver)


def assemble_records(
    steps: pa.Table, scalars: pa.Table, events: pa.Table, tensors: pa.Table
) -> pa.Table:
    """A table of `SCHEMA` from the rows of the store, all sorted by step.

    Args:
        steps: step, time; one row per record.
        scalars: step, name, value.
        events: step and the columns of an event.
        tensors: step and `STORED_TENSOR_FIELDS`; what else a tensor has is null.
    """
    order = steps["step"].to_numpy()
    scalars, events, tensors = (_held(order, rows) for rows in (scalars, events, tensors))
    event_type = SCHEMA.field("events").type
    tensor_type = SCHEMA.field("tensors").type
    offsets = _offsets(order, scalars)
    keys, values = _plain(scalars["name"], pa.string()), _plain(scalars["value"], pa.float64())
    columns = [
        _plain(steps["step"], pa.int64()),
        _plain(steps["time"], pa.timestamp("us", tz="UTC")),
        pa.MapArray.from_arrays(offsets, keys, values),
        pa.ListArray.from_arrays(
            _offsets(order, events), _structs(events, EVENT_TYPE), type=event_type
        ),
        pa.ListArray.from_arrays(
            _offsets(order, tensors), _structs(tensors, TENSOR_TYPE), type=tensor_type
        ),
    ]
    return pa.table(columns, schema=SCHEMA)


def _held(order: np.ndarray[Any, Any], rows: pa.Table) -> pa.Table:
    """Leave out rows whose step is not there (yet): it is written last."""
    held = np.isin(rows["step"].to_numpy(), order)
    return rows if held.all() else rows.filter(pa.array(held))


def _plain(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    return _only_chunk(column.cast(kind), kind)


def _structs(rows: pa.Table, kind: pa.StructType) -> pa.Array:
    arrays = [
        _plain(rows[field.name], field.type)
        if field.name in rows.column_names
        else pa.nulls(rows.num_rows, field.type)
        for field in kind
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def _offsets(order: np.ndarray[Any, Any], rows: pa.Table) -> pa.Array:
    starts = np.searchsorted(rows["step"].to_numpy(), order, side="left")
    return pa.array(np.append(starts, rows.num_rows).astype(np.int32))


def widen(steps: pa.Table, scalars: pa.Table, names: Sequence[str]) -> pa.Table:
    """One row per step with a column per scalar, null where it was not measured.

    Args:
        steps: step, time, sorted by step.
        scalars: step, name, value.
        names: Columns to make, in order.
    """
    order = steps["step"].to_numpy()
    scalars = _held(order, scalars)
    position = np.searchsorted(order, scalars["step"].to_numpy())
    label = np.asarray(scalars["name"].to_pylist(), dtype=object)
    value = scalars["value"].to_numpy()
    columns = {"step": steps["step"], "time": steps["time"]}
    for name in names:
        mine = label == name
        column = np.zeros(len(order))
        absent = np.ones(len(order), bool)
        column[position[mine]] = value[mine]
        absent[position[mine]] = False
        columns[name] = pa.array(column, mask=absent)
    return pa.table(columns)
