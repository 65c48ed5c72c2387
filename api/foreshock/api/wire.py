"""The body of a batch, from bytes to a validated table: encoding, size limits, digest, contract.

Knows no HTTP and no store.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from foreshock.api.arrowguard import BodyTooLarge, read_guarded
from foreshock.monitor.record import SCHEMA, RecordError, conform, json_to_table, validate

__all__ = [
    "ARROW",
    "ENCODINGS",
    "JSON",
    "BodyLimits",
    "BodyTooLarge",
    "UnknownEncoding",
    "decode_body",
    "digest",
    "read_batch",
]

ARROW: Final = "application/vnd.apache.arrow.stream"
JSON: Final = "application/json"
ENCODINGS: Final = ("identity", "gzip", "zstd")

_PIECE: Final = 1024 * 1024
# One block of zstd turns 4 bytes into 128 KiB at most, so that a piece makes at most 64 MiB.
_ZSTD_PIECE: Final = 2048
_MICROSECONDS: Final = pa.timestamp("us", tz="UTC")
# What the store's column holds, with room on either side.
_EARLIEST: Final = pa.scalar(datetime(1970, 1, 1, tzinfo=UTC), _MICROSECONDS)
_LATEST: Final = pa.scalar(datetime(2200, 1, 1, tzinfo=UTC), _MICROSECONDS)


class UnknownEncoding(ValueError):
    """The Content-Encoding is none that the service reads."""


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Largest bodies once decompressed, in bytes."""

    arrow: int
    json: int


def digest(body: bytes) -> str:
    """SHA-256 of a decoded body, as hex."""
    return hashlib.sha256(body).hexdigest()


def decode_body(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo the Content-Encoding.

    Raises:
        UnknownEncoding: It is none of `ENCODINGS`.
        BodyTooLarge: The result would pass the limit.
        RecordError: The compressed data is damaged or cut short.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name == "zstd":
        return _decode_zstd(body, limit)
    if name in ("gzip", "x-gzip"):
        return _decode_gzip(body, limit)
    raise UnknownEncoding(
        f"Content-Encoding {encoding!r} is not read; allowed: {', '.join(ENCODINGS)}"
    )


def _decode_zstd(body: bytes, limit: int) -> bytes:
    decoder = zstandard.ZstdDecompressor(max_window_size=128 * 1024 * 1024).decompressobj()
    parts = _Parts(limit)
    try:
        for start in range(0, len(body), _ZSTD_PIECE):
            if decoder.eof:
                raise RecordError("data follows the zstd frame; send one frame")
            parts.add(decoder.decompress(body[start : start + _ZSTD_PIECE]))
    except zstandard.ZstdError as error:
        raise RecordError(f"the zstd data is damaged: {error}") from None
    if not decoder.eof:
        raise RecordError("the zstd data is cut short")
    if decoder.unused_data:
        raise RecordError("data follows the zstd frame; send one frame")
    return parts.joined()


def _decode_gzip(body: bytes, limit: int) -> bytes:
    decoder = zlib.decompressobj(wbits=31)
    parts = _Parts(limit)
    rest = body
    try:
        while rest and not decoder.eof:
            parts.add(decoder.decompress(rest, _PIECE))
            rest = decoder.unconsumed_tail
        parts.add(decoder.flush())
    except zlib.error as error:
        raise RecordError(f"the gzip data is damaged: {error}") from None
    if not decoder.eof:
        raise RecordError("the gzip data is cut short")
    if decoder.unused_data:
        raise RecordError("data follows the gzip member; send one member")
    return parts.joined()


class _Parts:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._limit:
            raise BodyTooLarge(f"the body decompresses to more than {self._limit} bytes")
        self._parts.append(part)

    def joined(self) -> bytes:
        return b"".join(self._parts)


def read_batch(body: bytes, media_type: str, limits: BodyLimits) -> pa.Table:
    """Read a decoded body into a validated table of `record.SCHEMA`.

    Args:
        body: Arrow IPC stream, or JSON `{"records": [...]}`.
        media_type: `JSON` or anything else for Arrow.
        limits: Size limits.

    Raises:
        BodyTooLarge: A limit is passed.
        RecordError: It breaks the contract; names the record where one is at fault.
    """
    if media_type == JSON:
        if len(body) > limits.json:
            raise BodyTooLarge(f"JSON of more than {limits.json} bytes; send Arrow instead")
        table = json_to_table(body)
    else:
        foreign = read_guarded(body, limits.arrow)
        _check_width(foreign, limits.arrow)
        table = validate(conform(foreign))
    if table.num_rows == 0:
        raise RecordError("the batch holds no record")
    _check_times(table)
    return table


def _check_width(foreign: pa.Table, limit: int) -> None:
    """Refuse rows that come without columns, or with nulls for them, and would be given all.

    Raises:
        BodyTooLarge: The table would pass the limit once it has every column of `SCHEMA`.
    """
    size = foreign.num_rows * sum(_width(field.type) for field in SCHEMA)
    for name in ("scalars", "events", "tensors"):
        if name not in foreign.column_names:
            continue
        entry = _entry(SCHEMA.field(name).type)
        counts = (len(_values(chunk)) for chunk in foreign[name].chunks)
        size += sum(counts) * _width(entry)
    if size > limit:
        raise BodyTooLarge(f"the records would take more than {limit} bytes; send fewer at a time")


def _entry(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return kind.value_type
    return pa.struct([kind.key_field, kind.item_field])


def _values(chunk: pa.Array) -> pa.Array:
    lists = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
    if pa.types.is_map(chunk.type):
        return chunk.keys
    return chunk.values if lists else chunk.slice(0, 0)


def _width(kind: pa.DataType) -> int:
    """Bytes that an entry takes at least, whatever it holds."""
    if pa.types.is_struct(kind):
        return sum(_width(field.type) for field in kind)
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 4


def _check_times(table: pa.Table) -> None:
    times = table["time"]
    bad = pc.or_(pc.less(times, _EARLIEST), pc.greater_equal(times, _LATEST))
    index = pc.index(bad, True).as_py()
    if index >= 0:
        raise RecordError("time is not between the years 1970 and 2200", index)
