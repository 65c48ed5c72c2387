"""The record keeps what was measured: through Arrow, through JSON, through foreign columns."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.monitor.record import (
    SCHEMA,
    STATISTICS,
    Event,
    IdentityColumns,
    RecordError,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    conform,
    flatten_tensors,
    json_to_table,
    read_stream,
    record_batch,
    records_from_json,
    records_to_json,
    records_to_table,
    table_to_records,
    write_stream,
)
from tests.monitor.record_strategies import RECORDS

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def comparable(value: Any) -> Any:
    """Equal for equal measurements: NaN equals NaN, and None never equals NaN."""
    if isinstance(value, float) and math.isnan(value):
        return "a measured NaN"
    if isinstance(value, StepRecord):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return comparable(fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return comparable(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(v) for v in value]
    return value


def assert_same(a: Sequence[StepRecord], b: Sequence[StepRecord]) -> None:
    assert comparable(list(a)) == comparable(list(b))


@given(st.lists(RECORDS, max_size=4))
def test_arrow_stream_keeps_every_measurement(records: list[StepRecord]) -> None:
    stream = write_stream(records_to_table(records))
    assert_same(table_to_records(read_stream(stream)), records)


@given(st.lists(RECORDS, max_size=4))
def test_json_keeps_every_measurement(records: list[StepRecord]) -> None:
    body = records_to_json(records)
    json.loads(body, parse_constant=pytest.fail)  # no bare NaN or Infinity
    assert_same(records_from_json(body), records)


@given(st.lists(RECORDS, min_size=1, max_size=4))
def test_dictionary_and_wide_types_in_transit_change_nothing(records: list[StepRecord]) -> None:
    table = records_to_table(records)
    flat = flatten_tensors(table)
    layer = flat["layer"].combine_chunks().dictionary_encode()
    tensors = table["tensors"].combine_chunks()
    struct = tensors.flatten()
    children = [struct.field(i) for i in range(struct.type.num_fields)]
    children[0] = layer if isinstance(layer, pa.Array) else layer.combine_chunks()
    names = [f.name for f in struct.type]
    encoded = pa.LargeListArray.from_arrays(
        tensors.offsets.cast(pa.int64()), pa.StructArray.from_arrays(children, names=names)
    )
    foreign = table.set_column(4, "tensors", encoded).append_column(
        "colour", pa.array(["red"] * table.num_rows)
    )
    assert_same(table_to_records(foreign), records)


def test_missing_columns_are_null_not_zero() -> None:
    table = pa.table({"step": [1], "time": pa.array([NOW], pa.timestamp("s", tz="UTC"))})
    (record,) = table_to_records(table)
    assert record == StepRecord(1, NOW)


def test_missing_statistics_are_null_and_identities_get_their_defaults() -> None:
    tensors = pa.array([[{"layer": "a", "role": "input", "format": "e4m3", "numel": 3}]])
    table = pa.table({"step": [1], "time": [NOW], "tensors": tensors})
    (record,) = table_to_records(table)
    assert record.tensors == (
        TensorStatistics(identity=TensorIdentity("a", "input", "e4m3"), numel=3),
    )


def test_columns_and_dataclasses_make_the_same_record() -> None:
    identities = [TensorIdentity("a", "input", "e4m3"), TensorIdentity("b", "weight", "bf16")]
    columns = {
        "numel": np.ma.MaskedArray([4.0, 5.0]),
        "observations": np.ma.MaskedArray([1.0, 2.0]),
        "amax": np.ma.MaskedArray([math.inf, 1.5]),
        "top_channel": np.ma.MaskedArray([7.0, 0.0], mask=[False, True]),
        "kurtosis": np.ma.MaskedArray([math.nan, 3.0]),
    }
    event = Event("nonfinite", layer="a", rank=3)
    batch = record_batch(
        step=2,
        time=NOW,
        scalars={"loss": math.nan},
        events=[event],
        identities=IdentityColumns.of(identities),
        statistics=columns,
    )
    written = StepRecord(
        2,
        NOW,
        {"loss": math.nan},
        (
            TensorStatistics(
                identity=identities[0],
                numel=4,
                observations=1,
                amax=math.inf,
                kurtosis=math.nan,
                top_channel=7,
            ),
            TensorStatistics(
                identity=identities[1], numel=5, observations=2, amax=1.5, kurtosis=3.0
            ),
        ),
        (event,),
    )
    assert_same(table_to_records(pa.Table.from_batches([batch])), [written])


def test_sources_and_exponents_as_columns() -> None:
    identities = [TensorIdentity("a", "input", "e4m3"), TensorIdentity("b", "weight", "nvfp4")]
    counts = tuple(range(256))
    columns = {
        name: np.ma.MaskedArray([4.0, 5.0])
        for name in ("numel", "observations", "scale_log2_p01", "scale_log2_p50", "scale_log2_p99")
    }
    batch = record_batch(
        step=2,
        time=NOW,
        scalars={},
        identities=IdentityColumns.of(identities),
        statistics=columns,
        sources=[None, "codes"],
        exponents=[counts, None],
    )
    (record,) = table_to_records(pa.Table.from_batches([batch]))
    assert [(t.source, t.exponents) for t in record.tensors] == [(None, counts), ("codes", None)]
    assert [t.scale_log2_p50 for t in record.tensors] == [4.0, 5.0]


def test_a_file_from_before_the_new_columns_still_reads(tmp_path: Path) -> None:
    row = TensorStatistics(identity=TensorIdentity("a", "input", "e4m3"), numel=1, amax=2.0)
    table = records_to_table([StepRecord(5, NOW, tensors=(row,))])
    new = {"scale_log2_p01", "scale_log2_p50", "scale_log2_p99", "source", "exponents"}
    struct = table["tensors"].combine_chunks().flatten()
    kept = [f for f in struct.type if f.name not in new]
    old = pa.StructArray.from_arrays([struct.field(f.name) for f in kept], fields=kept)
    assert len(kept) == struct.type.num_fields - len(new)
    lists = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), old)
    pq.write_table(table.set_column(4, "tensors", lists), tmp_path / "old.parquet")
    (record,) = table_to_records(pq.read_table(tmp_path / "old.parquet"))
    assert record.tensors == (row,)


def test_parquet_keeps_the_new_columns(tmp_path: Path) -> None:
    row = TensorStatistics(
        identity=TensorIdentity("a", "input", "nvfp4", granularity="block"),
        numel=1,
        scale_log2_p01=-3.0,
        source="exact",
        exponents=(7,) * 256,
    )
    record = StepRecord(5, NOW, tensors=(row,))
    pq.write_table(records_to_table([record]), tmp_path / "new.parquet")
    assert table_to_records(pq.read_table(tmp_path / "new.parquet")) == [record]


def test_flat_view_keeps_the_parent_step() -> None:
    row = TensorStatistics(identity=TensorIdentity("a", "input", "e4m3"), numel=1)
    table = records_to_table(
        [StepRecord(5, NOW), StepRecord(6, NOW, tensors=(row, row)), StepRecord(9, NOW)]
    )
    flat = flatten_tensors(table.slice(1))
    assert flat["step"].to_pylist() == [6, 6]
    assert flat["record"].to_pylist() == [0, 0]
    assert set(STATISTICS) <= set(flat.column_names)


@pytest.mark.parametrize(
    ("table", "reason", "index"),
    [
        ({"step": [0, -1], "time": [NOW, NOW]}, "negative", 1),
        ({"step": [0, None], "time": [NOW, NOW]}, "step is missing", 1),
        ({"step": [0, 1], "time": [NOW, None]}, "time is missing", 1),
    ],
)
def test_a_broken_record_is_named(table: dict[str, Any], reason: str, index: int) -> None:
    arrays = {
        "step": pa.array(table["step"], pa.int64()),
        "time": pa.array(table["time"], pa.timestamp("us", tz="UTC")),
    }
    with pytest.raises(RecordError, match=reason) as caught:
        table_to_records(pa.table(arrays))
    assert caught.value.index == index


def test_a_scalar_may_not_stand_twice() -> None:
    scalars = pa.array([[], [("loss", 1.0), ("loss", 2.0)]], SCHEMA.field("scalars").type)
    table = pa.table({"step": [0, 1], "time": [NOW, NOW], "scalars": scalars})
    with pytest.raises(RecordError, match="'loss' stands twice") as caught:
        table_to_records(table)
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"role": "gradient"}, "role is unknown; known: input"),
        ({"format": "fp8"}, "format is unknown; known: e4m3"),
        ({"granularity": "column"}, "granularity is unknown"),
        ({"layer": None}, "no layer"),
        ({"source": "rumour"}, "source is unknown; known: values, codes, history, exact, null"),
        ({"exponents": [1, 2]}, "exponents are not 256 counts"),
        ({"exponents": 7}, "allowed: a list of integers"),
        ({"exponents": ["1"] * 256}, "allowed: a 64-bit integer"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(change: dict[str, Any], reason: str) -> None:
    row = {"layer": "a", "role": "input", "format": "e4m3", "numel": 3} | change
    body = {"records": [{"step": 1, "time": NOW.isoformat(), "tensors": [row]}]}
    with pytest.raises(RecordError, match=reason) as caught:
        records_from_json(json.dumps(body))
    assert caught.value.index == 0


@given(st.lists(RECORDS, min_size=1, max_size=2), st.data())
def test_a_truncated_stream_is_refused(records: list[StepRecord], data: st.DataObject) -> None:
    stream = write_stream(records_to_table(records))
    end_marker = 8
    cut = data.draw(st.integers(0, len(stream) - end_marker - 1))
    try:
        table = read_stream(stream[:cut])
    except RecordError:
        return
    # Arrow takes a stream that ends between two messages; then no record may be half there.
    assert table.num_rows == 0


def test_another_schema_version_is_refused() -> None:
    table = records_to_table([]).replace_schema_metadata({"foreshock.schema": "2"})
    with pytest.raises(RecordError, match="schema version 2; this build reads 1"):
        conform(table)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"records": 3}',
        '{"records": [3]}',
        '{"records": [{"step": 1}]}',
        '{"records": [{"step": "1", "time": "2026-01-01T00:00:00Z"}]}',
        '{"records": [{"step": true, "time": "2026-01-01T00:00:00Z"}]}',
        '{"records": [{"step": 1, "time": "2026-01-01T00:00:00"}]}',
        '{"records": [{"step": 1, "time": "soon"}]}',
        '{"records": [{"step": 1, "time": "2026-01-01T00:00:00Z", "scalars": {"loss": "nan"}}]}',
        '{"records": [{"step": 1, "time": "2026-01-01T00:00:00Z", "scalars": [1]}]}',
        '{"records": [{"step": 1, "time": "2026-01-01T00:00:00Z", "events": {}}]}',
        '{"records": [{"step": 99999999999999999999, "time": "2026-01-01T00:00:00Z"}]}',
        '{"records": [{"step": 1, "time": "0001-01-01T00:00:00+23:00"}]}',
        "[" * 100_000,
    ],
)
def test_bad_json_is_refused_with_a_record_error(body: str) -> None:
    with pytest.raises(RecordError):
        json_to_table(body)


def test_negative_step_and_naive_time_are_refused() -> None:
    with pytest.raises(RecordError, match="steps count from 0"):
        StepRecord(-1, NOW)
    with pytest.raises(RecordError, match="timezone"):
        StepRecord(0, datetime(2026, 1, 1))  # noqa: DTZ001
