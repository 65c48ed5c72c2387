"""Looks at an Arrow IPC stream from a stranger before and after it is read.

A short body can claim gigabytes: compressed buffers, huge lengths without buffers, dictionaries
that expand. Sizes are summed from the message headers before anything is decompressed, and what
was read is checked in full before it is used. Knows nothing of records.
"""

from __future__ import annotations

import struct
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from foreshock.monitor.record import RecordError

__all__ = ["BodyTooLarge", "read_guarded"]

_RECORD_BATCH: Final = 3
_DICTIONARY_BATCH: Final = 2
_END: Final = b"\xff\xff\xff\xff\0\0\0\0"
_ELEMENTS_PER_BYTE: Final = 8


class BodyTooLarge(Exception):
    """The body is larger, once decoded, than the service takes."""


def read_guarded(body: bytes, limit: int) -> pa.Table:
    """Read an Arrow IPC stream of at most `limit` bytes of decompressed buffers.

    Raises:
        BodyTooLarge: It would be larger.
        RecordError: The bytes are no whole, valid Arrow stream.
    """
    try:
        if _decoded_size(body) > limit:
            raise BodyTooLarge(f"the Arrow buffers decompress to more than {limit} bytes")
        table = _read(body)
        for field in table.schema:
            _read_names(field)
        for name in table.column_names:
            for chunk in table[name].chunks:
                _check(chunk, limit)
        table.validate(full=True)
    except UnicodeDecodeError:
        raise RecordError("not a whole Arrow IPC stream: a name is not UTF-8") from None
    except (pa.ArrowException, OSError, EOFError, struct.error, IndexError, OverflowError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise RecordError(f"not a whole Arrow IPC stream: {first}") from None
    return table


def _read(body: bytes) -> pa.Table:
    # Requests are decoded side by side already.
    options = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.ipc.open_stream(body, options=options) as reader:
        batches = []
        while (batch := _next(reader)) is not None:
            batches.append(batch)
        return pa.Table.from_batches(batches, schema=reader.schema)


def _read_names(field: pa.Field) -> None:
    """Read every name once, those of nested columns too.

    Raises:
        UnicodeDecodeError: One is not UTF-8; Arrow finds out when somebody asks for it.
    """
    _ = field.name
    kind = field.type
    for index in range(kind.num_fields):
        _read_names(kind.field(index))


def _next(reader: pa.RecordBatchStreamReader) -> pa.RecordBatch | None:
    try:
        return reader.read_next_batch()
    except StopIteration:
        return None


def _decoded_size(body: bytes) -> int:
    """Sum of the buffers' sizes once decompressed, from the headers alone.

    Raises:
        pa.ArrowException: A message is cut short, or the end-of-stream mark is missing.
    """
    total = 0
    source = pa.BufferReader(body)
    reader = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            break
        total += _message_size(message)
    if source.tell() < len(body):
        raise pa.ArrowInvalid("data follows the end-of-stream mark; send one stream")
    # A stream cut at a message's end reads well; only the mark tells that nothing is missing.
    if not body.endswith(_END):
        raise pa.ArrowInvalid("the end-of-stream mark is missing: the body is cut short")
    return total


def _message_size(message: pa.Message) -> int:
    header = message.metadata.to_pybytes()
    if message.body is None:
        return 0
    data = memoryview(message.body)
    table = _Table(header, struct.unpack_from("<I", header, 0)[0])
    kind = table.byte(1)
    batch = table.table(2)
    if kind == _DICTIONARY_BATCH and batch is not None:
        batch = batch.table(1)
    elif kind != _RECORD_BATCH:
        return 0
    if batch is None:
        return 0
    compressed = batch.table(3) is not None
    return sum(_buffer_size(data, start, length, compressed) for start, length in batch.pairs(2))


def _buffer_size(data: memoryview, start: int, length: int, compressed: bool) -> int:
    if not compressed or length < 8:
        return max(length, 0)
    # A compressed buffer starts with its decompressed size; -1 means it was left as it is.
    size = int(struct.unpack_from("<q", data, start)[0])
    return length if size < 0 else size


class _Table:
    """The little of FlatBuffers that the header of an Arrow message needs."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        self._vtable = position - struct.unpack_from("<i", data, position)[0]

    def _field(self, index: int) -> int | None:
        if 4 + 2 * index >= struct.unpack_from("<H", self._data, self._vtable)[0]:
            return None
        offset = struct.unpack_from("<H", self._data, self._vtable + 4 + 2 * index)[0]
        return self._position + offset if offset else None

    def byte(self, index: int) -> int:
        at = self._field(index)
        return 0 if at is None else self._data[at]

    def table(self, index: int) -> _Table | None:
        at = self._field(index)
        if at is None:
            return None
        return _Table(self._data, at + struct.unpack_from("<I", self._data, at)[0])

    def pairs(self, index: int) -> list[tuple[int, int]]:
        at = self._field(index)
        if at is None:
            return []
        start = at + struct.unpack_from("<I", self._data, at)[0]
        count = struct.unpack_from("<I", self._data, start)[0]
        return [struct.unpack_from("<qq", self._data, start + 4 + 16 * i) for i in range(count)]


def _check(array: pa.Array, limit: int) -> None:
    """Refuse lengths that no buffer pays for, and types whose reading could expand."""
    if len(array) > limit // _ELEMENTS_PER_BYTE:
        raise BodyTooLarge(f"{len(array)} elements are more than {limit} bytes hold")
    kind = array.type
    if pa.types.is_dictionary(kind):
        _check_dictionary(array, limit)
    elif pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            _check(array.field(index), limit)
    elif pa.types.is_map(kind):
        _check(array.keys, limit)
        _check(array.items, limit)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _check(array.values, limit)
    elif not (pa.types.is_primitive(kind) or pa.types.is_null(kind) or _is_text(kind)):
        raise pa.ArrowInvalid(f"columns of type {kind} are not taken")


def _is_text(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def _check_dictionary(array: pa.DictionaryArray, limit: int) -> None:
    if pa.types.is_nested(array.type.value_type) or pa.types.is_dictionary(array.type.value_type):
        # One list of millions, pointed at a thousand times.
        raise pa.ArrowInvalid(f"columns of type {array.type} are not taken")
    if not _is_text(array.type.value_type):
        _check(array.dictionary, limit)
        return
    # Offsets come from the stranger too.
    array.validate(full=True)
    longest = pc.max(pc.binary_length(array.dictionary)).as_py() or 0
    if longest * len(array) > limit:
        raise BodyTooLarge(f"the dictionary expands to more than {limit} bytes")
