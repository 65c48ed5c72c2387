"""The store through its own engine: what goes in comes out, whatever the view."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from foreshock.api.store import Limits, SeriesKey, StoreError, StoreUnreachable, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_engine import Writer, open_chdb
from foreshock.api.store_query import heatmap_sql
from foreshock.api.store_schema import RISK_SCHEMA
from foreshock.monitor.record import (
    Event,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    table_to_records,
)
from tests.api.service import LAYERS, fact_rows, make_record, make_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The engine takes one folder per process.
    return tmp_path_factory.mktemp("store") / "store"


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[ClickHouseStore]:
    made = ClickHouseStore(open_chdb(folder, Limits(seconds=20)), lambda _: LAYERS)
    yield made
    made.close()


def new_run() -> str:
    return uuid.uuid4().hex


def test_null_nan_and_infinity_come_back_as_they_went_in(store: ClickHouseStore) -> None:
    run = new_run()
    values = (None, math.nan, math.inf, -math.inf, 0.0, 1.5)
    tensors = tuple(
        TensorStatistics(
            identity=TensorIdentity(LAYERS[0], "input", "e4m3", expert=index, call_index=index),
            numel=index,
            amax=value,
            sqnr_db=value,
            nonfinite_count=None if value is None else index,
            top_channel=index if value is None else None,
        )
        for index, value in enumerate(values)
    )
    time = datetime(2026, 1, 1, 12, 30, 0, 123_456, tzinfo=UTC)
    scalars = {"loss": math.nan, "up": math.inf, "down": -math.inf, "zero": 0.0}
    events = (Event("nonfinite", 3, LAYERS[1], "weight", 7, "it's {odd}\n"), Event("checkpoint"))
    record = StepRecord(step=2**40, time=time, scalars=scalars, tensors=tensors, events=events)
    store.append([fact_rows(run, 1, 1, [record])])
    (found,) = table_to_records(store.record_window(run, 1, 0, 2**62))
    assert (found.step, found.time, found.events) == (record.step, record.time, record.events)
    assert repr(dict(sorted(found.scalars.items()))) == repr(dict(sorted(scalars.items())))
    # repr, because NaN is not equal to itself.
    assert sorted(map(repr, found.tensors)) == sorted(map(repr, tensors))


def test_a_store_of_an_older_build_gets_the_new_columns(
    store: ClickHouseStore, folder: Path
) -> None:
    names = ("scale_log2_p01", "scale_log2_p50", "scale_log2_p99", "source")
    run = new_run()
    store.append([fact_rows(run, 1, 1, [make_record(0)])])
    engine = open_chdb(folder, Limits())
    drops = ", ".join(f"DROP COLUMN {name}" for name in names)
    engine.writer().command(f"ALTER TABLE tensor_stats {drops}")
    engine.close()

    again = ClickHouseStore(open_chdb(folder, Limits()), lambda _: LAYERS)
    new = make_record(1)
    tensors = tuple(replace(t, scale_log2_p50=-7.0, source="codes") for t in new.tensors)
    again.append([fact_rows(run, 1, 2, [replace(new, tensors=tensors)])])
    old, found = table_to_records(again.record_window(run, 1, 0, 1))
    assert {(t.scale_log2_p50, t.source) for t in old.tensors} == {(None, None)}
    assert {t.amax for t in old.tensors} == {t.amax for t in make_record(0).tensors}
    assert {(t.scale_log2_p50, t.source) for t in found.tensors} == {(-7.0, "codes")}
    heat = again.heatmap(View(run), "input", "scale_log2_p50", 10)
    assert {v for values in heat.values.values() for v in values if v is not None} == {-7.0}
    series = again.tensor_series(
        View(run), SeriesKey(layer=0, role="input", statistic="scale_log2_p50"), 10
    )
    assert (series.step, series.mean) == ((1,), (-7.0,))
    again.close()


def test_the_default_view_shows_the_highest_attempt_that_holds_a_step(
    store: ClickHouseStore,
) -> None:
    run = new_run()
    store.append([fact_rows(run, 1, 1, make_records(0, 10))])
    again = [make_record(step, value=100.0 + step) for step in (4, 5)]
    store.append([fact_rows(run, 2, 2, [*again, make_record(6, tensors=False, value=106.0)])])
    view = View(run)
    assert store.scalar_series(view, "loss", 100).mean == (
        *(0.0, 1.0, 2.0, 3.0),
        *(104.0, 105.0, 106.0),
        *(7.0, 8.0, 9.0),
    )
    assert store.scalar_series(replace(view, attempt=1), "loss", 100).mean == tuple(
        float(step) for step in range(10)
    )
    # Attempt 2 holds step 6 without tensors: attempt 1's are not shown in its place.
    key = SeriesKey(layer=1, role="input", statistic="amax")
    assert store.tensor_series(view, key, 100).step == (0, 1, 2, 3, 4, 5, 7, 8, 9)
    records = table_to_records(store.record_window(run, None, 3, 7))
    assert [r.scalars["loss"] for r in records] == [3.0, 104.0, 105.0, 106.0, 7.0]
    assert [len(r.tensors) for r in records] == [6, 6, 6, 0, 6]


def test_downsampling_keeps_extremes_and_counts_what_is_not_finite(store: ClickHouseStore) -> None:
    run = new_run()
    values = [1.0, 9.0, math.nan, 3.0, math.inf, math.nan, 2.0]
    store.append([fact_rows(run, 1, 1, [make_record(i, value=v) for i, v in enumerate(values)])])
    series = store.scalar_series(View(run), "loss", 4)
    assert series.step == (0, 2, 4, 6)
    assert (series.low[:2], series.mean[:2], series.high[:2]) == ((1, 3), (5, 3), (9, 3))
    assert not math.isfinite(series.low[2])
    assert series.nonfinite == (0, 1, 2, 0)
    whole = store.scalar_series(View(run), "loss", 100)
    assert repr(whole.mean) == repr(tuple(values))
    assert store.scalar_series(View(run), "absent", 10).step == ()
    assert store.scalar_series(View(new_run()), "loss", 10).step == ()


def test_the_heatmap_shows_the_worst_and_leaves_holes(store: ClickHouseStore) -> None:
    run = new_run()
    records = [make_record(step, tensors=step % 4 == 0) for step in range(16)]
    store.append([fact_rows(run, 1, 1, records)])
    heatmap = store.heatmap(View(run), "input", "amax", 8)
    assert heatmap.steps == tuple(range(0, 16, 2))
    assert list(heatmap.values) == list(LAYERS)
    assert heatmap.values[LAYERS[2]] == (0.0, None, 4.0, None, 8.0, None, 12.0, None)
    assert store.heatmap(View(run), "input", "amax", 1).values[LAYERS[0]] == (12.0,)
    assert store.heatmap(View(run), "input", "mu", 8).values == {}
    assert store.heatmap(View(run), "output", "amax", 8).values == {}


def test_what_if_rows_stay_out_unless_their_format_is_asked_for(store: ClickHouseStore) -> None:
    run = new_run()

    def tensor(name: str, amax: float, *, what_if: bool) -> TensorStatistics:
        identity = TensorIdentity(LAYERS[0], "input", name, what_if=what_if)
        return TensorStatistics(identity=identity, numel=1, amax=amax)

    record = replace(
        make_record(0),
        tensors=(tensor("bf16", 1.0, what_if=False), tensor("e4m3", 9.0, what_if=True)),
    )
    store.append([fact_rows(run, 1, 1, [record])])
    key = SeriesKey(layer=0, role="input", statistic="amax")
    assert store.tensor_series(View(run), key, 10).mean == (1.0,)
    assert store.tensor_series(View(run), replace(key, format="e4m3"), 10).mean == (9.0,)
    assert store.heatmap(View(run), "input", "amax", 1).values[LAYERS[0]] == (1.0,)
    assert store.heatmap(View(run), "input", "amax", 1, "e4m3").values[LAYERS[0]] == (9.0,)


def test_the_newest_row_of_a_key_wins_before_and_after_merging(store: ClickHouseStore) -> None:
    run, top = new_run(), 2**41
    store.append([fact_rows(run, 1, 1, make_records(0, 3))])
    store.append([fact_rows(run, 1, top + 1, [make_record(1, value=50.0)])])
    assert store.counts(run)["steps"] == 3
    for _ in range(2):
        assert store.scalar_series(View(run), "loss", 9).mean == (0.0, 50.0, 2.0)
        key = SeriesKey(layer=0, role="input", statistic="amax")
        assert store.tensor_series(View(run), key, 9).mean == (0.0, 50.0, 2.0)
        records = table_to_records(store.record_window(run, 1, 0, 9))
        assert [len(r.tensors) for r in records] == [6, 6, 6]
        for table in ("scalars", "tensor_stats", "steps"):
            store._derived.command(f"OPTIMIZE TABLE {table} FINAL")
    # The newer one was not acknowledged after all, and a merge has not eaten the older one.
    store.discard_after(top)
    assert store.scalar_series(View(run), "loss", 9).mean == (0.0, 1.0, 2.0)
    assert store.counts(run, exact=False) == store.counts(run)


def test_facts_above_the_ledger_are_removed_and_the_others_stay(store: ClickHouseStore) -> None:
    run, top = new_run(), 2**40
    store.append([fact_rows(run, 1, 1, make_records(0, 4))])
    store.append(
        [
            fact_rows(run, 1, top + 1, make_records(4, 4)),
            fact_rows(run, 2, top + 2, make_records(0, 2)),
        ]
    )
    assert store.counts(run, exact=False)["steps"] == 10
    assert store.discard_after(top) == 6 * (1 + 2 + 6)
    assert store.discard_after(top) == 0
    assert store.counts(run, exact=False) == {
        "steps": 4,
        "scalars": 8,
        "events": 0,
        "tensor_stats": 24,
    }


def test_rows_whose_step_is_not_written_yet_stay_out(store: ClickHouseStore) -> None:
    run = new_run()
    store.append([fact_rows(run, 1, 1, make_records(0, 2))])
    ahead = dict(fact_rows(run, 1, 2, make_records(2, 3)))
    del ahead["steps"]
    store.append([ahead])
    records = table_to_records(store.record_window(run, 1, 0, 99))
    assert [len(r.tensors) for r in records] == [6, 6]
    assert store.scalar_window(run, 1, 0, 99)["loss"].to_pylist() == [0.0, 1.0]
    assert store.scalar_series(View(run), "loss", 99).step == (0, 1)
    assert store.heatmap(View(run), "input", "amax", 99).steps == (0, 1)


@pytest.mark.parametrize(
    ("away", "nothing_is_in"),
    [
        ({"scalars"}, False),
        ({"tensor_stats", "scalars"}, True),
        ({"steps"}, False),
    ],
)
def test_only_a_group_of_which_nothing_is_in_counts_as_not_sent(
    store: ClickHouseStore, monkeypatch: pytest.MonkeyPatch, away: set[str], nothing_is_in: bool
) -> None:
    run, insert = new_run(), Writer.insert

    def partly(self: Writer, table: str, rows: pa.Table, settings: dict[str, Any]) -> None:
        if table in away:
            raise StoreUnreachable("away")
        insert(self, table, rows, settings)

    monkeypatch.setattr(Writer, "insert", partly)
    with pytest.raises(StoreError) as failure:
        store.append([fact_rows(run, 1, 1, make_records(0, 3))])
    assert isinstance(failure.value, StoreUnreachable) == nothing_is_in
    held = store.counts(run, exact=False)
    assert (sum(held.values()) == 0) == nothing_is_in
    # Nobody sees a step before its other rows are in.
    assert held["steps"] == 0


def test_risk_rows_newest_wins(store: ClickHouseStore) -> None:
    run = new_run()

    def risk(step: int, probability: float | None) -> pa.Table:
        row = {"step": step, "time": datetime(2026, 1, 1, tzinfo=UTC), "horizon": 10}
        row |= {"probability": probability, "state": "ok", "model_version": "m"}
        return pa.Table.from_pylist([row], schema=RISK_SCHEMA)

    store.append([fact_rows(run, 1, 1, make_records(0, 3))])
    assert store.last_risk_step(run, 1) is None
    for step, probability in ((0, 0.5), (1, None), (1, 0.25)):
        store.append_risk(run, 1, risk(step, probability))
    assert store.last_risk_step(run, 1) == 1
    for attempt in (1, None):
        history = store.risk_history(run, attempt, 0, 10)
        assert history.schema == RISK_SCHEMA
        assert history["probability"].to_pylist() == [0.5, 0.25]


def test_windows_of_nothing_have_their_columns(store: ClickHouseStore) -> None:
    run = new_run()
    assert store.record_window(run, None, 0, 10).num_rows == 0
    assert store.tensor_window(run, 1, 0, 10).column_names[:2] == ["step", "layer"]
    assert store.scalar_window(run, 1, 0, 10).column_names == ["step", "time"]
    assert list(store.record_chunks(View(run))) == []


def test_records_come_in_chunks_however_far_apart_the_steps_lie(store: ClickHouseStore) -> None:
    run = new_run()
    steps = [0, 1023, 1024, 5000, 2**50]
    store.append([fact_rows(run, 1, 1, [make_record(step) for step in steps])])
    found = [chunk["step"].to_pylist() for chunk in store.record_chunks(View(run))]
    assert found == [[0, 1023], [1024], [5000], [2**50]]
    view = View(run, None, 1, 1024)
    assert [chunk["step"].to_pylist() for chunk in store.record_chunks(view)] == [[1023], [1024]]


def test_names_outside_the_vocabulary_never_reach_a_query() -> None:
    with pytest.raises(ValueError, match="unknown statistic"):
        heatmap_sql(View("r"), "amax) FROM system.users --", smallest=False, format_given=False)


def test_a_second_process_or_path_is_told_why(store: ClickHouseStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another foreshock"):
        open_chdb(tmp_path / "other", Limits())
    assert store.bounds(View("r")) is None


def test_a_query_past_its_time_ends_and_one_that_does_not_is_seen(
    store: ClickHouseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = store._engine
    slow = "SELECT sleepEachRow(0.5) FROM numbers(60) SETTINGS max_block_size = 1"
    with pytest.raises(StoreError):
        engine.read(slow + ", max_execution_time = 1", {})
    assert store.hung_seconds() == 0
    now = time.monotonic()
    with engine.watched():
        assert store.hung_seconds() == 0
        monkeypatch.setattr(time, "monotonic", lambda: now + 100)
        assert store.hung_seconds() > 60
    assert store.hung_seconds() == 0


def test_an_engine_that_never_opened_closes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        open_chdb(tmp_path / "file", Limits())
