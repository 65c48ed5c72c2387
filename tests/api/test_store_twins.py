"""Two implementations of the store give one answer, whatever went in."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from foreshock.api.store import Limits, SeriesKey, Store, StoreError, View
from foreshock.api.store_open import open_store
from foreshock.api.store_rows import Placed, place, split
from foreshock.api.store_schema import RISK_SCHEMA
from foreshock.api.store_sqlite import SqliteStore
from foreshock.api.store_url import ChdbPlace
from foreshock.monitor.record import (
    Event,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_table,
)
from tests.api.service import LAYERS, fact_rows, make_records

ROLES = ("input", "weight")
STEPS = (0, 1, 2, 5, 1023, 1024, 1025, 4000, 2**40)
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.5, math.nan, math.inf, -math.inf]),
    st.floats(-1e6, 1e6, width=32),
)
STATISTICS = ("amax", "sqnr_db", "nonfinite_count")


@dataclass
class Twins:
    clickhouse: Store
    sqlite: Store
    commits: Iterator[int]

    def both(self) -> tuple[Store, Store]:
        return self.clickhouse, self.sqlite


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    folder = tmp_path_factory.mktemp("twins")
    clickhouse = open_store(ChdbPlace(folder / "chdb"), lambda _: LAYERS)
    sqlite = SqliteStore(folder / "facts.sqlite", lambda _: LAYERS, fsync=False)
    yield Twins(clickhouse, sqlite, itertools.count(1))
    clickhouse.close()
    sqlite.close()


@st.composite
def identities(draw: st.DrawFn) -> TensorIdentity:
    what_if = draw(st.booleans())
    return TensorIdentity(
        draw(st.sampled_from(LAYERS)),
        draw(st.sampled_from(ROLES)),
        "mxfp8_e4m3" if what_if else "e4m3",
        granularity=draw(st.sampled_from(["tensor", "row"])),
        call_index=draw(st.integers(0, 1)),
        expert=draw(st.sampled_from([None, 0, 3])),
        what_if=what_if,
    )


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorStatistics, ...]:
    chosen = draw(st.lists(identities(), unique=True, max_size=5))
    return tuple(
        TensorStatistics(
            identity=identity,
            numel=draw(st.integers(0, 2**40)),
            amax=draw(st.none() | NUMBERS),
            sqnr_db=draw(st.none() | NUMBERS),
            nonfinite_count=draw(st.none() | st.integers(0, 2**40)),
            source=draw(st.sampled_from([None, "codes"])),
        )
        for identity in chosen
    )


@st.composite
def records(draw: st.DrawFn, step: int) -> StepRecord:
    names = draw(st.lists(st.sampled_from(["loss", "grad_norm", "é"]), unique=True))
    events = st.builds(
        Event,
        st.sampled_from(["checkpoint", "nonfinite"]),
        st.none() | st.integers(0, 3),
        st.none() | st.sampled_from(LAYERS),
        st.none() | st.sampled_from(ROLES),
        st.none() | st.integers(0, 7),
        st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    )
    return StepRecord(
        step=step,
        time=datetime(2026, 1, 1, tzinfo=UTC)
        + timedelta(microseconds=draw(st.integers(0, 10**12))),
        scalars={name: draw(NUMBERS) for name in names},
        tensors=draw(tensors()),
        events=tuple(draw(st.lists(events, max_size=2))),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[StepRecord]]:
    steps = sorted(draw(st.sets(st.sampled_from(STEPS), min_size=1, max_size=4)))
    return draw(st.integers(1, 3)), [draw(records(step)) for step in steps]


Batch = tuple[int, list[StepRecord]]
Write = tuple[Batch, bool, bool]
"""A batch, whether it is sent twice, and whether it is acknowledged in the end."""

WRITES = st.lists(st.tuples(batches(), st.booleans(), st.booleans()), min_size=1, max_size=6)


def rows_of(run: str, commit: int, batch: Batch) -> dict[str, pa.Table]:
    attempt, held = batch
    placed = Placed(
        run_id=run,
        attempts=np.full(len(held), attempt),
        commit=commit,
        layer_ids={name: index for index, name in enumerate(LAYERS)},
    )
    return place(split(records_to_table(held)), placed)


def write(twins: Twins, run: str, writes: list[Write]) -> None:
    for batch, twice, acknowledged in writes:
        before = next(twins.commits)
        for _ in range(1 + twice):
            group = [rows_of(run, next(twins.commits), batch)]
            for store in twins.both():
                store.append(group)
        if not acknowledged:
            removed = [store.discard_after(before) for store in twins.both()]
            # A merge may have dropped the older of two equal keys before.
            assert removed[0] <= removed[1]


def plain(table: pa.Table) -> list[Any]:
    """Rows with NaN as a word, because NaN equals nothing, and -0.0 as 0.0."""
    return [{name: word(value) for name, value in row.items()} for row in table.to_pylist()]


def word(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, list):
        return [word(each) for each in value]
    if isinstance(value, tuple):
        return tuple(word(each) for each in value)
    if isinstance(value, dict):
        return {key: word(each) for key, each in value.items()}
    return value


VIEWS = [(None, 0, 2**62), (1, 0, 2**62), (2, 0, 2**62), (None, 1, 1024), (3, 1024, 5000)]


Ask = tuple[int, str, str, str | None]
ASKS = st.tuples(
    st.sampled_from([1, 3, 5000]),
    st.sampled_from(["loss", "é", "absent"]),
    st.sampled_from(STATISTICS),
    st.sampled_from([None, "e4m3", "mxfp8_e4m3"]),
)
"""Points, a scalar, a statistic and a format of series and heatmaps."""


def assert_alike(twins: Twins, run: str, ask: Ask) -> None:
    one, two = twins.both()
    assert one.counts(run) == two.counts(run)
    assert one.scalar_names(run) == two.scalar_names(run)
    assert one.tensor_kinds(run) == two.tensor_kinds(run)
    for attempt, first, last in VIEWS:
        view = View(run, attempt, first, last)
        assert one.bounds(view) == two.bounds(view)
        assert one.chunks(view) == two.chunks(view)
        for read in ("step_window", "scalar_rows", "event_rows", "tensor_rows"):
            assert plain(getattr(one, read)(view)) == plain(getattr(two, read)(view)), read
        for kind in (None, "checkpoint"):
            pages = [list(paged(store, view, kind)) for store in (one, two)]
            assert pages[0] == pages[1]
            events = [e for e in plain(one.event_rows(view)) if kind in (None, e["kind"])]
            assert [{k: v for k, v in e.items() if k != "position"} for e in pages[0]] == events
        window = (run, attempt, first, last)
        assert plain(one.record_window(*window)) == plain(two.record_window(*window))
        assert_summaries_alike(twins, view, ask)


def paged(store: Store, view: View, kind: str | None) -> Iterator[dict[str, Any]]:
    """Events, two at a time."""
    after = (-1, 0)
    while page := store.event_page(view, kind, after, 2).to_pylist():
        yield from page
        after = page[-1]["step"], page[-1]["position"]


def assert_summaries_alike(twins: Twins, view: View, ask: Ask) -> None:
    points, name, statistic, form = ask
    one, two = twins.both()
    alike(one.scalar_series(view, name, points), two.scalar_series(view, name, points))
    for layer in range(len(LAYERS)):
        key = SeriesKey(layer=layer, role="input", statistic=statistic, format=form)
        alike(one.tensor_series(view, key, points), two.tensor_series(view, key, points))
    maps = [store.heatmap(view, "input", statistic, 1 + points // 9, form) for store in (one, two)]
    assert maps[0].steps == maps[1].steps
    assert word(dict(maps[0].values)) == word(dict(maps[1].values))


def alike(one: Any, two: Any) -> None:
    for name in ("step", "low", "high", "nonfinite"):
        assert word(getattr(one, name)) == word(getattr(two, name)), name
    # The order of a sum is the engine's own.
    assert one.mean == pytest.approx(two.mean, rel=1e-12, abs=1e-9, nan_ok=True)


# Shrinking takes thousands of examples, and one costs hundreds of queries.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@given(WRITES, ASKS)
@settings(max_examples=8, phases=PHASES)
def test_both_stores_answer_every_read_alike(twins: Twins, writes: list[Write], ask: Ask) -> None:
    run = uuid.uuid4().hex
    write(twins, run, writes)
    assert_alike(twins, run, ask)


@pytest.mark.long
@pytest.mark.timeout(900)
@given(WRITES, ASKS)
@settings(max_examples=60, phases=PHASES)
def test_both_stores_answer_every_read_alike_often(
    twins: Twins, writes: list[Write], ask: Ask
) -> None:
    run = uuid.uuid4().hex
    write(twins, run, writes)
    assert_alike(twins, run, ask)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2), st.integers(0, 5), st.sampled_from([10, 100]), st.none() | NUMBERS
        ),
        max_size=8,
    )
)
@settings(max_examples=8)
def test_risk_is_the_newest_row_in_both(
    twins: Twins, rows: list[tuple[int, int, int, float | None]]
) -> None:
    run = uuid.uuid4().hex
    for store in twins.both():
        store.append([fact_rows(run, 1, next(twins.commits), make_records(0, 5))])
        store.append([fact_rows(run, 2, next(twins.commits), make_records(2, 2))])
    for attempt, step, horizon, probability in rows:
        row = {"step": step, "time": datetime(2026, 1, 1, tzinfo=UTC), "horizon": horizon}
        row |= {"probability": probability, "state": "ok", "model_version": "m"}
        for store in twins.both():
            store.append_risk(run, attempt, pa.Table.from_pylist([row], schema=RISK_SCHEMA))
    for shown in (None, 1, 2):
        one, two = (store.risk_history(run, shown, 0, 9) for store in twins.both())
        assert one.schema == two.schema == RISK_SCHEMA
        assert plain(one) == plain(two)
    for number in (1, 2):
        last = [store.last_risk_step(run, number) for store in twins.both()]
        assert last[0] == last[1]


def test_a_sqlite_store_of_an_older_build_gets_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "facts.sqlite"
    store = SqliteStore(path, lambda _: LAYERS)
    store._writer.execute("ALTER TABLE tensor_stats DROP COLUMN source")
    store.close()
    again = SqliteStore(path, lambda _: LAYERS)
    again.append([fact_rows("r", 1, 1, make_records(0, 2))])
    assert again.tensor_rows(View("r"))["source"].null_count == 12
    again.close()


def test_what_was_received_long_ago_is_dropped(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "facts.sqlite", lambda _: LAYERS, retention_days=1)
    store.append([fact_rows("old", 1, 1, make_records(0, 2))])
    store._writer.execute("UPDATE appended SET received = received - 2 * 86400")
    store._swept_at = -1e9
    store.append([fact_rows("new", 1, 2, make_records(0, 2))])
    assert store.counts("old")["tensor_stats"] == 0
    assert store.counts("new")["tensor_stats"] == 12
    store.close()


def test_a_query_past_its_time_ends(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "facts.sqlite", lambda _: LAYERS, limits=Limits(seconds=1))
    endless = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )
    with pytest.raises(StoreError, match="interrupted"):
        store._read(endless, {})
    assert store.hung_seconds() == 0
    assert store.bounds(View("r")) is None
    store.close()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "facts.sqlite").write_text("something else, and long enough to be looked at" * 9)
    with pytest.raises(StoreError, match="does not open"):
        SqliteStore(tmp_path / "facts.sqlite", lambda _: LAYERS)
