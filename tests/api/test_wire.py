"""Bodies as they come from strangers: every encoding, cut, bomb and lie."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from foreshock.api.arrowguard import BodyTooLarge, read_guarded
from foreshock.api.wire import (
    ARROW,
    JSON,
    BodyLimits,
    UnknownEncoding,
    decode_body,
    digest,
    read_batch,
)
from foreshock.monitor.record import (
    SCHEMA,
    RecordError,
    records_to_json,
    records_to_table,
    write_stream,
)
from tests.api.service import make_records

LIMIT = 1024 * 1024
LIMITS = BodyLimits(arrow=8 * LIMIT, json=LIMIT)
TABLE = records_to_table(make_records(0, 4))


def encoded(body: bytes, encoding: str) -> bytes:
    if encoding == "zstd":
        return zstandard.compress(body)
    return gzip.compress(body) if encoding == "gzip" else body


@pytest.mark.parametrize("encoding", ["identity", "gzip", "zstd", "GZIP"])
def test_encodings_give_one_body_and_one_digest(encoding: str) -> None:
    body = write_stream(TABLE)
    decoded = decode_body(encoded(body, encoding.lower()), encoding, LIMIT)
    assert decoded == body
    assert digest(decoded) == digest(body)


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(UnknownEncoding, match="zstd"):
        decode_body(b"", "br", LIMIT)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_bombs_stop_at_the_limit(encoding: str) -> None:
    bomb = encoded(bytes(64 * LIMIT), encoding)
    assert len(bomb) < LIMIT
    with pytest.raises(BodyTooLarge):
        decode_body(bomb, encoding, LIMIT)


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_damaged_data_is_refused(encoding: str) -> None:
    body = encoded(write_stream(TABLE, compression=None), encoding)
    for bad in (body[:-5], body[: len(body) // 2], b"nonsense", b"", body + b"more"):
        with pytest.raises(RecordError):
            decode_body(bad, encoding, LIMIT)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_a_stream_cut_anywhere_is_refused(compression: str | None) -> None:
    body = write_stream(TABLE, compression=compression)
    assert read_batch(body, ARROW, LIMITS).equals(TABLE)
    for end in [*range(0, len(body), 97), len(body) - 1, len(body) - 8]:
        with pytest.raises(RecordError):
            read_batch(body[:end], ARROW, LIMITS)
    with pytest.raises(RecordError, match="end-of-stream"):
        read_batch(body + body, ARROW, LIMITS)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_buffers_count_as_what_they_become(compression: str) -> None:
    table = pa.table({"step": pa.array(np.zeros(4 * LIMIT, np.int64))})
    body = write_stream(table, compression=compression)
    assert len(body) < LIMIT
    with pytest.raises(BodyTooLarge):
        read_guarded(body, LIMIT)
    assert read_guarded(body, 64 * LIMIT).num_rows == 4 * LIMIT


def test_lengths_without_buffers_are_refused() -> None:
    body = write_stream(pa.table({"step": pa.nulls(10**9, pa.null())}))
    assert len(body) < 1000
    with pytest.raises(BodyTooLarge):
        read_guarded(body, LIMIT)


def test_a_dictionary_that_expands_is_refused() -> None:
    codes = pa.array(np.zeros(100_000, np.int8))
    column = pa.DictionaryArray.from_arrays(codes, pa.array(["x" * 100_000]))
    body = write_stream(pa.table({"layer": column}))
    with pytest.raises(BodyTooLarge, match="dictionary"):
        read_guarded(body, 8 * LIMIT)


def test_rows_that_would_be_given_every_column_are_refused() -> None:
    """A few hundred bytes of nulls that would become gigabytes of a record's columns."""
    count = 30_000_000
    struct = pa.StructArray.from_arrays([pa.nulls(count)], ["layer"])
    tensors = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), struct)
    wide = pa.table({"step": [1], "tensors": tensors})
    for table in (wide, pa.table({"step": pa.nulls(count)})):
        body = write_stream(table)
        assert len(body) < 1000
        with pytest.raises(BodyTooLarge, match="send fewer"):
            read_batch(body, ARROW, BodyLimits(arrow=2**28, json=LIMIT))


def test_lists_behind_a_dictionary_are_refused() -> None:
    few = pa.array([[{"layer": "a"}] * 1000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), few)
    body = write_stream(pa.table({"step": range(1000), "tensors": column}))
    with pytest.raises(RecordError, match="not taken"):
        read_batch(body, ARROW, LIMITS)


def test_offsets_that_lie_are_refused() -> None:
    honest = pa.array([[0] * 12_345])
    body = write_stream(pa.table({"tensors": honest}), compression=None)
    told = struct.pack("<ii", 0, 12_345)
    # The first one is in the header, the last one is the offsets themselves.
    before, _, after = body.rpartition(told)
    with pytest.raises(RecordError):
        read_guarded(before + struct.pack("<ii", 0, 2**30) + after, LIMIT)


def test_types_that_expand_when_read_are_refused() -> None:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([10**6], pa.int32()), pa.array([1]))
    with pytest.raises((RecordError, BodyTooLarge)):
        read_guarded(write_stream(pa.table({"step": runs}), compression=None), 64 * LIMIT)


@pytest.mark.parametrize(
    "column",
    [pa.array([1]), pa.array([{"inner": 1}]), pa.array([[{"inner": 1}]])],
    ids=["name", "field", "field_of_a_list"],
)
def test_names_that_are_not_utf8_are_refused(column: pa.Array) -> None:
    name = b"outer" if pa.types.is_integer(column.type) else b"inner"
    body = write_stream(pa.table({"outer": column})).replace(name, b"\x80" + name[1:])
    with pytest.raises(RecordError, match="not UTF-8"):
        read_guarded(body, 10_000)


def test_dictionary_columns_are_read() -> None:
    names = pa.array(["a", "b", "a"]).dictionary_encode()
    table = read_guarded(write_stream(pa.table({"layer": names})), LIMIT)
    assert table["layer"].to_pylist() == ["a", "b", "a"]


def test_json_has_its_own_limit() -> None:
    body = records_to_json(make_records(0, 4))
    assert read_batch(body, JSON, LIMITS).equals(TABLE)
    with pytest.raises(BodyTooLarge, match="Arrow"):
        read_batch(body, JSON, BodyLimits(arrow=LIMIT, json=100))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(RecordError, match="no record"):
        read_batch(write_stream(SCHEMA.empty_table()), ARROW, LIMITS)


@pytest.mark.parametrize("year", ["1969", "2200"])
def test_times_the_store_cannot_hold_are_refused(year: str) -> None:
    rows = [{"step": 0, "time": f"{year}-12-31T00:00:00Z"}]
    with pytest.raises(RecordError, match="1970"):
        read_batch(json.dumps({"records": rows}).encode(), JSON, LIMITS)
