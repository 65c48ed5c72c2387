"""The Arrow schema of a record, and bringing foreign tables into it.

One schema for spool, HTTP, exports and tests. Strings are plain in memory; dictionary encoding is
for transit only and is undone here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.monitor.formats import FORMATS, GRANULARITIES
from foreshock.monitor.record.model import (
    INTEGER_STATISTICS,
    ROLES,
    SCHEMA_VERSION,
    SOURCES,
    STATISTICS,
    RecordError,
)
from foreshock.monitor.record.sums import EXPONENTS

__all__ = [
    "EVENT_TYPE",
    "IDENTITY_FIELDS",
    "SCHEMA",
    "TENSOR_TYPE",
    "conform",
    "statistic_type",
    "validate",
]


def statistic_type(name: str) -> pa.DataType:
    """Arrow type of a statistic's column."""
    if name == "nonfinite_count":
        return pa.int64()
    return pa.int32() if name in INTEGER_STATISTICS else pa.float32()


IDENTITY_FIELDS: Final = (
    pa.field("layer", pa.string()),
    pa.field("call_index", pa.int32()),
    pa.field("role", pa.string()),
    pa.field("expert", pa.int32()),
    pa.field("format", pa.string()),
    pa.field("granularity", pa.string()),
    pa.field("what_if", pa.bool_()),
)

TENSOR_TYPE: Final = pa.struct(
    [
        *IDENTITY_FIELDS,
        pa.field("numel", pa.int64()),
        pa.field("observations", pa.int32()),
        *(pa.field(name, statistic_type(name)) for name in STATISTICS),
        pa.field("source", pa.string()),
        pa.field("exponents", pa.list_(pa.int64())),
    ]
)

EVENT_TYPE: Final = pa.struct(
    [
        pa.field("kind", pa.string()),
        pa.field("micro_batch", pa.int32()),
        pa.field("layer", pa.string()),
        pa.field("role", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("detail", pa.string()),
    ]
)

SCHEMA: Final = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("time", pa.timestamp("us", tz="UTC")),
        pa.field("scalars", pa.map_(pa.string(), pa.float64())),
        pa.field("events", pa.list_(EVENT_TYPE)),
        pa.field("tensors", pa.list_(TENSOR_TYPE)),
    ],
    metadata={"foreshock.schema": str(SCHEMA_VERSION)},
)

# What a null in an identity column means; the writer left the column out.
_IDENTITY_DEFAULTS: Final = {"call_index": 0, "granularity": "tensor", "what_if": False}

# Made once: a call into Arrow costs more than it does for the few thousand rows of a batch.
_PAIRS: Final = pa.list_(pa.struct([("key", pa.string()), ("value", pa.float64())]))
_TENSOR_NAMES: Final = tuple(field.name for field in TENSOR_TYPE)
_VOCABULARIES: Final = tuple(
    (name, known, pa.array(list(known), pa.string()))
    for name, known in (("role", ROLES), ("format", FORMATS), ("granularity", GRANULARITIES))
)
_SOURCES_OR_NULL: Final = pa.array([*SOURCES, None], pa.string())


def conform(table: pa.Table) -> pa.Table:
    """Bring a table into `SCHEMA`: known columns cast, unknown ones dropped, missing ones null.

    Raises:
        RecordError: Another schema version, or a column whose type cannot be cast.
    """
    version = (table.schema.metadata or {}).get(b"foreshock.schema")
    if version is not None and version != str(SCHEMA_VERSION).encode():
        raise RecordError(
            f"schema version {version.decode(errors='replace')}; this build reads {SCHEMA_VERSION}"
        )
    table = table.combine_chunks()
    columns = []
    for field in SCHEMA:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        chunks = table.column(field.name)
        array = chunks.chunk(0) if chunks.num_chunks else pa.nulls(0, field.type)
        try:
            columns.append(_conform_array(array, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise RecordError(f"column {field.name!r} is not {field.type}: {error}") from None
    return pa.table(columns, schema=SCHEMA)


def _conform_array(array: pa.Array, to: pa.DataType) -> pa.Array:
    if array.type.equals(to):
        return array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), to)
    if pa.types.is_map(to):
        return _conform_map(array, to)
    if pa.types.is_list(to):
        return _conform_list(array, to)
    if pa.types.is_struct(to):
        return _conform_struct(array, to)
    if pa.types.is_floating(to) and pa.types.is_floating(array.type):
        return array.cast(to, safe=False)
    return array.cast(to)


def _offsets(array: pa.Array) -> pa.Array:
    """Offsets into `array.flatten()`; nulls and slices have length 0."""
    lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64())
    totals = pc.cumulative_sum(lengths)
    return pa.concat_arrays([pa.array([0], pa.int64()), totals]).cast(pa.int32())


def _conform_list(array: pa.Array, to: pa.DataType) -> pa.Array:
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise pa.ArrowTypeError(f"got {array.type}")
    values = _conform_array(array.flatten(), to.value_type)
    return pa.ListArray.from_arrays(_offsets(array), values, type=to, mask=array.is_null())


def _conform_map(array: pa.Array, to: pa.DataType) -> pa.Array:
    if not pa.types.is_map(array.type):
        raise pa.ArrowTypeError(f"got {array.type}")
    entries = array.cast(
        pa.list_(pa.struct([("key", array.type.key_type), ("value", array.type.item_type)]))
    ).flatten()
    keys = _conform_array(pc.struct_field(entries, "key"), to.key_type)
    items = _conform_array(pc.struct_field(entries, "value"), to.item_type)
    return pa.MapArray.from_arrays(
        _offsets(array.cast(pa.list_(entries.type))), keys, items, type=to
    )


def _conform_struct(array: pa.Array, to: pa.DataType) -> pa.Array:
    if not pa.types.is_struct(array.type):
        raise pa.ArrowTypeError(f"got {array.type}")
    children = []
    for field in to:
        if array.type.get_field_index(field.name) < 0:
            children.append(pa.nulls(len(array), field.type))
        else:
            children.append(_conform_array(pc.struct_field(array, field.name), field.type))
    return pa.StructArray.from_arrays(children, fields=list(to), mask=array.is_null())


def validate(table: pa.Table) -> pa.Table:
    """Check a conformed table against the contract and fill in the defaults of identities.

    Returns:
        The table, with nulls in call_index, granularity and what_if replaced.

    Raises:
        RecordError: Names the first record at fault and what would be right.
    """
    _refuse_missing(table, "step")
    _refuse(table, pc.less(table["step"], 0), "step is negative; steps count from 0")
    _refuse_missing(table, "time")
    if table.num_rows == 0:
        return table
    table = table.combine_chunks()
    _check_scalars(table["scalars"].chunk(0))
    return _check_tensors(table)


def _refuse_missing(table: pa.Table, name: str) -> None:
    if table[name].null_count:
        _refuse(table, pc.is_null(table[name]), f"{name} is missing")


def _refuse(table: pa.Table, bad: pa.ChunkedArray, reason: str) -> None:
    index = pc.index(bad, True).as_py()
    if index >= 0:
        raise RecordError(reason, index)


def _check_scalars(scalars: pa.Array) -> None:
    lists = scalars.cast(_PAIRS)
    keys = lists.flatten().flatten()[0].dictionary_encode()
    names = keys.dictionary
    if len(keys) < 2:
        return
    codes = pc.fill_null(keys.indices, len(names)).to_numpy()
    records = pc.list_parent_indices(lists).to_numpy()
    pairs = records.astype(np.int64) * (len(names) + 1) + codes
    ordered = np.sort(pairs)
    twins = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twins):
        first = int(np.flatnonzero(pairs == twins[0])[0])
        key = names[int(codes[first])].as_py() if codes[first] < len(names) else None
        raise RecordError(f"scalar {key!r} stands twice", int(records[first]))


def _check_tensors(table: pa.Table) -> pa.Table:
    lists = table["tensors"].chunk(0)
    tensors = lists.flatten()
    if len(tensors) == 0:
        return table
    columns = dict(zip(_TENSOR_NAMES, tensors.flatten(), strict=True))
    holes = [name for name in _IDENTITY_DEFAULTS if columns[name].null_count]
    for name in holes:
        columns[name] = pc.fill_null(columns[name], _IDENTITY_DEFAULTS[name])
    for name in ("layer", "numel"):
        if columns[name].null_count:
            _refuse_tensor(lists, pc.is_valid(columns[name]), f"a tensor has no {name}")
    for name, known, allowed in _VOCABULARIES:
        fine = pc.is_in(columns[name], value_set=allowed)
        _refuse_tensor(lists, fine, f"a tensor's {name} is unknown; known: {', '.join(known)}")
    _check_optional(lists, columns["source"], columns["exponents"])
    if not holes:
        return table
    struct = pa.StructArray.from_arrays(list(columns.values()), fields=list(TENSOR_TYPE))
    fixed = pa.ListArray.from_arrays(_offsets(lists), struct, type=lists.type, mask=lists.is_null())
    position = table.schema.get_field_index("tensors")
    return table.set_column(position, SCHEMA.field("tensors"), fixed)


def _check_optional(lists: pa.Array, source: pa.Array, exponents: pa.Array) -> None:
    if source.null_count < len(source):
        fine = pc.is_in(source, value_set=_SOURCES_OR_NULL)
        reason = f"a tensor's source is unknown; known: {', '.join(SOURCES)}, null"
        _refuse_tensor(lists, fine, reason)
    if exponents.null_count < len(exponents):
        lengths = pc.fill_null(pc.list_value_length(exponents), EXPONENTS)
        reason = f"a tensor's exponents are not {EXPONENTS} counts"
        _refuse_tensor(lists, pc.equal(lengths, EXPONENTS), reason)


def _refuse_tensor(lists: pa.Array, fine: pa.Array, reason: str) -> None:
    index = pc.index(fine, False).as_py()
    if index >= 0:
        raise RecordError(reason, pc.list_parent_indices(lists)[index].as_py())
