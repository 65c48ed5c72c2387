"""Reads from rollups say what reads of the rows say, for any rows, attempts and order of events."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from foreshock.api.store import CHUNK_STEPS, Limits, Series, SeriesKey, StaleChunk, Store, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_open import open_store
from foreshock.api.store_schema import FACT_TABLES
from foreshock.api.store_sqlite import SqliteStore
from foreshock.api.store_url import ChdbPlace, SqlitePlace
from foreshock.monitor.record import StepRecord, TensorIdentity, TensorStatistics
from tests.api.service import LAYERS
from tests.api.test_store_twins import NUMBERS, ROLES, rows_of, word

# Dense here and there, and far enough apart that whole runs are read from rollups.
STEPS = st.one_of(
    st.integers(0, 200),
    st.integers(960, 1100),
    st.integers(2040, 2060),
    st.integers(30_000, 30_200),
)
POINTS = (7, 40, 300)


@dataclass
class Bench:
    """A store, and the numbers of its batches."""

    store: Store
    commits: Iterator[int]

    def send(self, runs: list[str], attempt: int, records: list[StepRecord]) -> int:
        number = 0
        for run in runs:
            number = next(self.commits)
            self.store.append([rows_of(run, number, (attempt, records))])
        return number

    def roll(self, run: str) -> list[StaleChunk]:
        stale = self.store.stale_chunks(run)
        for each in stale:
            assert self.store.roll(run, each.attempt, each.chunk, each.newest) > 0
        return stale

    def expire(self, run: str) -> None:
        """Every row of a run's facts, as retention drops it."""
        store = self.store
        for table in FACT_TABLES:
            if isinstance(store, ClickHouseStore):
                store._derived.command(
                    f"ALTER TABLE {table} DELETE WHERE run_id = {{run:String}}"
                    " SETTINGS mutations_sync = 2",
                    {"run": run},
                )
            else:
                assert isinstance(store, SqliteStore)
                store._writer.execute(f"DELETE FROM {table} WHERE run_id = ?", (run,))


@pytest.fixture(scope="module", params=["chdb", "sqlite"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("rolled")
    place = ChdbPlace(folder / "s") if request.param == "chdb" else SqlitePlace(folder / "s.sqlite")
    store = open_store(place, lambda _: LAYERS, fsync=False, limits=Limits(clients=1))
    yield Bench(store, itertools.count(1))
    store.close()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorStatistics, ...]:
    identity = st.builds(
        TensorIdentity,
        st.sampled_from(LAYERS[:2]),
        st.sampled_from(ROLES),
        st.sampled_from(["e4m3", "bf16"]),
        granularity=st.sampled_from(["tensor", "row"]),
        expert=st.sampled_from([None, 3]),
        what_if=st.booleans(),
    )
    return tuple(
        TensorStatistics(
            identity=each,
            numel=4,
            amax=draw(st.none() | NUMBERS),
            sqnr_db=draw(st.none() | NUMBERS),
            nonfinite_count=draw(st.none() | st.integers(0, 2**40)),
        )
        for each in draw(st.lists(identity, unique=True, max_size=4))
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[StepRecord]]:
    steps = sorted(draw(st.sets(STEPS, min_size=1, max_size=8)))
    contents = draw(st.lists(tensors(), min_size=1, max_size=3))
    losses = draw(st.lists(NUMBERS, min_size=1, max_size=3))
    time = datetime(2026, 1, 1, tzinfo=UTC)
    return draw(st.integers(1, 3)), [
        StepRecord(
            step=step,
            time=time,
            scalars={"loss": losses[place % len(losses)]},
            tensors=contents[place % len(contents)],
        )
        for place, step in enumerate(steps)
    ]


HISTORY = st.lists(st.tuples(batches(), st.sampled_from(["roll", "wait", "drop"])), max_size=7)
FORMATS = st.sampled_from([None, "e4m3", "bf16"])
STATISTIC = st.sampled_from(["amax", "sqnr_db", "nonfinite_count"])
VIEWS = [
    View("", None),
    View("", 1),
    View("", 2),
    View("", None, 37, 30_150),
    View("", 2, 64, 30_063),
]


def write(bench: Bench, history: list[tuple[tuple[int, list[StepRecord]], str]]) -> tuple[str, str]:
    """The same facts for two runs; the first one's rollups are made on the way and at the end."""
    rolled, raw = uuid.uuid4().hex, uuid.uuid4().hex
    for (attempt, records), after in history:
        before = next(bench.commits)
        bench.send([rolled, raw], attempt, records)
        if after != "wait":
            bench.roll(rolled)
        if after == "drop":
            # Rolled up by mistake before it was acknowledged, which it never is.
            bench.store.discard_after(before)
    return rolled, raw


def assert_equal(
    bench: Bench, runs: tuple[str, str], points: int, statistic: str, form: str | None
) -> None:
    store = bench.store
    for view in VIEWS:
        one, two = (View(run, view.attempt, view.first_step, view.last_step) for run in runs)
        near(store.scalar_series(one, "loss", points), store.scalar_series(two, "loss", points))
        for layer, expert in itertools.product(range(2), (-1, 3)):
            key = SeriesKey(
                layer=layer, role="input", statistic=statistic, format=form, expert=expert
            )
            near(store.tensor_series(one, key, points), store.tensor_series(two, key, points))
        maps = [store.heatmap(each, "input", statistic, points, form) for each in (one, two)]
        assert maps[0].steps == maps[1].steps
        assert word(dict(maps[0].values)) == word(dict(maps[1].values))


def near(one: Series, two: Series) -> None:
    for name in ("step", "low", "high", "nonfinite"):
        assert word(getattr(one, name)) == word(getattr(two, name)), name
    assert one.mean == pytest.approx(two.mean, rel=1e-6, abs=1e-8, nan_ok=True)


# Shrinking takes thousands of examples, and one costs hundreds of queries.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@given(HISTORY, st.sampled_from(POINTS), STATISTIC, FORMATS)
@settings(max_examples=5, phases=PHASES)
def test_rollups_say_what_the_rows_say(
    bench: Bench, history: list[Any], points: int, statistic: str, form: str | None
) -> None:
    runs = write(bench, history)
    assert_equal(bench, runs, points, statistic, form)
    bench.roll(runs[0])
    assert bench.store.stale_chunks(runs[0]) == []
    assert_equal(bench, runs, points, statistic, form)


@pytest.mark.long
@pytest.mark.timeout(900)
@given(HISTORY, st.sampled_from(POINTS), STATISTIC, FORMATS)
@settings(max_examples=60, phases=PHASES)
def test_rollups_say_what_the_rows_say_often(
    bench: Bench, history: list[Any], points: int, statistic: str, form: str | None
) -> None:
    runs = write(bench, history)
    assert_equal(bench, runs, points, statistic, form)
    bench.roll(runs[0])
    assert_equal(bench, runs, points, statistic, form)


def records(first: int, count: int, value: float = 0.0, layer: int = 0) -> list[StepRecord]:
    """One tensor and a loss per step, both the number of the step plus `value`."""
    identity = TensorIdentity(LAYERS[layer], "input", "e4m3", granularity="tensor")
    time = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        StepRecord(
            step=step,
            time=time,
            scalars={"loss": step + value},
            tensors=(TensorStatistics(identity=identity, numel=4, amax=step + value),),
        )
        for step in range(first, first + count)
    ]


KEY = SeriesKey(layer=0, role="input", statistic="amax")


def answers(store: Store, run: str, attempt: int | None = None, points: int = 100) -> list[object]:
    view = View(run, attempt)
    return [
        store.scalar_series(view, "loss", points),
        store.tensor_series(view, KEY, points),
        store.heatmap(view, "input", "amax", points),
    ]


def test_only_rollups_are_read_where_they_are_whole(bench: Bench) -> None:
    """Rows changed behind the store's back do not show, so they were not read."""
    run = uuid.uuid4().hex
    bench.send([run], 1, records(0, 2048))
    bench.send([run], 1, records(30_000, 1))
    before = answers(bench.store, run)
    bench.roll(run)
    assert answers(bench.store, run) == before
    store, sql = bench.store, "tensor_stats {} amax = 1e9 WHERE run_id = '" + run + "'"
    if isinstance(store, ClickHouseStore):
        sql = sql.format("UPDATE")
        store._derived.command(f"ALTER TABLE {sql} SETTINGS mutations_sync = 2")
    else:
        assert isinstance(store, SqliteStore)
        store._writer.execute("UPDATE " + sql.format("SET"))
    assert answers(bench.store, run) == before
    short = store.tensor_series(View(run, None, 0, 1000), KEY, 1)
    assert short.high == (1e9,)
    bench.send([run], 1, records(70, 1, 0.5))
    changed = store.tensor_series(View(run), KEY, 100)
    assert max(changed.high) == 1e9


def test_buckets_of_long_ranges_are_whole_blocks(bench: Bench) -> None:
    run = uuid.uuid4().hex
    bench.send([run], 1, records(70, 10))
    bench.send([run], 1, records(30_000, 10))
    for points in (3, 50, 100):
        steps = bench.store.heatmap(View(run), "input", "amax", points).steps
        assert len(steps) <= points
        assert {step % 64 for step in steps} == {0}
    # Narrow buckets stay as they are, and so do those of short runs.
    assert bench.store.heatmap(View(run), "input", "amax", 20_000).steps[0] == 70
    assert bench.store.heatmap(View(run, None, 70, 79), "input", "amax", 5).steps[:2] == (70, 72)


def test_rollups_answer_when_the_rows_have_expired(bench: Bench) -> None:
    run = uuid.uuid4().hex
    bench.send([run], 1, records(0, 1500))
    bench.send([run], 1, records(30_000, 100))
    bench.roll(run)
    before = answers(bench.store, run)
    bench.expire(run)
    assert answers(bench.store, run) == before
    assert bench.store.scalar_names(run) == ["loss"]
    assert bench.store.tensor_kinds(run).roles == ["input"]
    assert bench.store.tensor_kinds(run).formats == ["e4m3"]
    # A short range too, in buckets of whole blocks.
    short = bench.store.scalar_series(View(run, 1, 128, 1000), "loss", 1000)
    assert short.step[:2] == (128, 192)
    assert short.mean[0] == 128 + 31.5
    # Nothing is left to roll up, and what came since is added.
    assert bench.store.stale_chunks(run) == []
    bench.send([run], 1, records(40_000, 1))
    assert bench.store.scalar_series(View(run), "loss", 100).step[-1] == 40_000


def test_a_block_in_which_attempts_meet(bench: Bench) -> None:
    run = uuid.uuid4().hex
    bench.send([run], 1, records(0, 1100))
    bench.send([run], 1, records(23_000, 1))
    bench.send([run], 2, records(1000, 1100, 1e6))
    bench.send([run], 2, records(23_999, 1))
    before = answers(bench.store, run)
    bench.roll(run)
    assert answers(bench.store, run) == before
    first = answers(bench.store, run, 1)
    bench.expire(run)
    assert answers(bench.store, run, 1) == first
    # The block of step 1,000 is the new attempt's alone now: 960 to 999 are gone.
    wide = bench.store.scalar_series(View(run), "loss", 375)
    place = wide.step.index(1000)
    assert wide.low[place] == 1e6 + 1000
    assert wide.high[place - 1] < 1e6


def test_late_data_is_rolled_up_again(bench: Bench) -> None:
    run = uuid.uuid4().hex
    bench.send([run], 1, records(0, 1024))
    newest = bench.send([run], 1, records(30_000, 10))
    assert [(each.attempt, each.chunk) for each in bench.roll(run)] == [(1, 0), (1, 29)]
    assert bench.store.stale_chunks(run) == []
    late = bench.send([run], 1, records(512, 3, 7e5))
    assert bench.store.stale_chunks(run) == [StaleChunk(1, 0, late)]
    assert newest < late
    high = bench.store.scalar_series(View(run), "loss", 20).high[0]
    assert high == 7e5 + 514
    bench.roll(run)
    bench.expire(run)
    assert bench.store.scalar_series(View(run), "loss", 20).high[0] == high


def test_what_is_not_settled_is_not_rolled_up(bench: Bench) -> None:
    run = uuid.uuid4().hex
    settled = bench.send([run], 1, records(0, 64))
    bench.send([run], 1, records(64, 64))
    assert bench.store.roll(run, 1, 0, settled) == 1
    assert bench.store.roll(run, 1, 5, settled) == 0
    assert [each.chunk for each in bench.store.stale_chunks(run)] == [0]


def test_a_deleted_run_leaves_no_rollups(bench: Bench) -> None:
    run, other = uuid.uuid4().hex, uuid.uuid4().hex
    bench.send([run, other], 1, records(0, CHUNK_STEPS))
    for each in (run, other):
        bench.roll(each)
    kept = answers(bench.store, other)
    bench.store.delete_run(run)
    assert bench.store.roll(run, 1, 0, 2**40) == 0
    assert bench.store.scalar_series(View(run), "loss", 5).step == ()
    assert bench.store.scalar_names(run) == []
    assert answers(bench.store, other) == kept


def test_rollups_over_a_hole_of_values(bench: Bench) -> None:
    """A block without a finite value says what kind of others it has."""
    run = uuid.uuid4().hex
    for first, value in ((0, math.nan), (128, math.inf), (256, -math.inf), (384, 1.0)):
        bench.send([run], 1, records(first, 3, value))
    bench.send([run], 1, records(30_000, 1))
    before = [word(vars_of(each)) for each in answers(bench.store, run, points=400)]
    bench.roll(run)
    assert [word(vars_of(each)) for each in answers(bench.store, run, points=400)] == before
    low = bench.store.scalar_series(View(run), "loss", 400).low
    assert word(list(low))[:4] == ["NaN", math.inf, -math.inf, 385.0]


def vars_of(answer: Any) -> dict[str, Any]:
    return {name: getattr(answer, name) for name in answer.__slots__}


def test_of_several_rows_of_a_step_rollups_count_the_one_that_reads_show(bench: Bench) -> None:
    run = uuid.uuid4().hex
    time = datetime(2026, 1, 1, tzinfo=UTC)

    def row(form: str, granularity: str, amax: float, *, what_if: bool = False) -> TensorStatistics:
        identity = TensorIdentity(
            LAYERS[0], "input", form, granularity=granularity, what_if=what_if
        )
        return TensorStatistics(identity=identity, numel=4, amax=amax)

    tensors = (
        row("bf16", "tensor", 1.0),
        row("e4m3", "row", 2.0),
        row("e4m3", "tensor", 3.0, what_if=True),
        row("e4m3", "tensor", 4.0),
    )
    steps = [StepRecord(step=step, time=time, tensors=tensors) for step in (3, 4, 30_000)]
    bench.send([run], 1, steps)

    def shown() -> list[object]:
        found: list[object] = []
        for form in (None, "e4m3", "bf16"):
            key = SeriesKey(layer=0, role="input", statistic="amax", format=form)
            found.append(bench.store.tensor_series(View(run), key, 9))
            found.append(bench.store.heatmap(View(run), "input", "amax", 9, form))
        return found

    before = shown()
    bench.roll(run)
    assert shown() == before
    assert bench.store.tensor_series(View(run), KEY, 9).low == (4.0, 4.0)


def test_a_range_that_cuts_a_block_shows_no_step_outside(bench: Bench) -> None:
    run = uuid.uuid4().hex
    bench.send([run], 1, records(0, 200))
    bench.send([run], 1, records(30_000, 200))
    bench.roll(run)
    for attempt in (None, 1):
        cut = bench.store.scalar_series(View(run, attempt, 10, 30_100), "loss", 9)
        assert cut.step[0] == cut.low[0] == 10
        assert cut.high[-1] == 30_100
