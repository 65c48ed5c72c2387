"""Reports into records, without a relay: extremes, events, health; late and rewound steps."""

from __future__ import annotations

import dataclasses
import random
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.collect.gathering import Addition, Gathering
from foreshock.api.collect.merging import merged
from foreshock.monitor.record import (
    Event,
    Held,
    Place,
    StepRecord,
    StepReport,
    TensorIdentity,
    TensorStatistics,
    read_stream,
    records_to_table,
    table_to_records,
    write_stream,
)
from foreshock.monitor.record.reports import event_key, join, rank_mask
from tests.monitor.report_strategies import reports

UP = Place("up", "input")


def record(step: int = 0, *tensors: TensorStatistics, **more: object) -> StepRecord:
    time = datetime(2026, 1, 1, tzinfo=UTC)
    made = StepRecord(step=step, time=time, scalars={"loss": 2.0}, tensors=tensors)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def tensor(layer: str = "up", *, what_if: bool = False, **statistics: object) -> TensorStatistics:
    identity = TensorIdentity(layer, "input", "e4m3", what_if=what_if)
    return TensorStatistics(identity=identity, numel=8, **statistics)  # type: ignore[arg-type]


def report(step: int, ranks: list[int], *events: Event, **more: object) -> StepReport:
    return StepReport(
        step=step,
        ranks=rank_mask(ranks),
        events={event_key(e): e for e in events},
        **more,  # type: ignore[arg-type]
    )


def merge(
    of: list[StepRecord], *additions: Addition, world_size: int | None = 4
) -> list[StepRecord]:
    table = merged(records_to_table(of), additions, world_size)
    # What goes on has to pass the service's door.
    return table_to_records(read_stream(write_stream(table)))


def test_an_extreme_of_another_rank_replaces_the_records_own() -> None:
    own = [
        tensor(amax=3.0, amax_rank=0, headroom_log2=4.0, rms=1.0),
        tensor(what_if=True, headroom_log2=6.0),
        tensor("down", amax=9.0, amax_rank=0, headroom_log2=0.5),
        tensor("none"),
    ]
    told = report(
        0,
        [0, 3],
        largest={
            UP: Held(7.5, 3),
            Place("down", "input"): Held(2.0, 3),
            Place("x", "input"): Held(1, 3),
        },
        tightest={
            UP: Held(1.5, 3),
            Place("down", "input"): Held(8.0, 3),
            Place("none", "input"): Held(2.0, 3),
        },
    )
    (got,) = merge([record(0, *own)], Addition(told))
    up, what_if, down, none = got.tensors
    assert (up.amax, up.amax_rank, up.headroom_log2, up.rms) == (7.5, 3, 1.5, 1.0)
    assert (what_if.amax, what_if.amax_rank, what_if.headroom_log2) == (None, None, 6.0)
    assert (down.amax, down.amax_rank, down.headroom_log2) == (9.0, 0, 0.5)
    assert (none.amax, none.headroom_log2) == (None, 2.0)


def test_the_rank_of_an_extreme_is_filled_in_where_the_record_lacks_it() -> None:
    value = float(np.float32(0.1))
    told = report(0, [2], largest={UP: Held(float(str(np.float32(0.1))), 2)})
    (got,) = merge([record(0, tensor(amax=value))], Addition(told))
    assert got.tensors[0].amax_rank == 2
    (kept,) = merge([record(0, tensor(amax=value, amax_rank=0))], Addition(told))
    assert kept.tensors[0].amax_rank == 0, "of equals the record's stays"


def test_health_of_the_fleet() -> None:
    told = report(
        0,
        [0, 1, 3],
        broken=0b10,
        health={"step_seconds_max": Held(1.5, 3), "step_seconds_min": Held(0.5, 1)},
    )
    (got,) = merge([record(scalars={"loss": 2.0, "ranks_heard": 7.0})], Addition(told))
    assert got.scalars == {
        "loss": 2.0,
        "ranks_heard": 7.0,  # the training's own word of this name
        "ranks_silent": 1.0,
        "ranks_nonfinite": 1.0,
        "ranks_step_seconds_max": 1.5,
        "ranks_step_seconds_max_at": 3.0,
        "ranks_step_seconds_min": 0.5,
        "ranks_step_seconds_min_at": 1.0,
    }
    (nobody,) = merge([record()], Addition(None))
    assert nobody.scalars == {"loss": 2.0, "ranks_heard": 0.0, "ranks_silent": 4.0}


def test_events_of_other_ranks_stand_once_and_the_rank_knows_best() -> None:
    own = (
        Event("nonfinite", 0, "up", "input", 1, "elements are not finite"),
        Event("data_switch", rank=0, detail="prose"),
    )
    told = report(
        0,
        [1, 2],
        Event("nonfinite", 0, "up", "input", 1, "3 elements are not finite"),
        Event("nonfinite", 1, "down", "weight", 2, "the norm is inf"),
        Event("data_switch", rank=1, detail="prose"),
        Event("monitor_error", rank=2, detail="worker: OSError"),
        broken=0b110,
    )
    (got,) = merge([record(events=own)], Addition(told))
    assert got.events == (
        Event("nonfinite", 0, "up", "input", 1, "3 elements are not finite"),
        own[1],
        Event("nonfinite", 1, "down", "weight", 2, "the norm is inf"),
        Event("monitor_error", rank=2, detail="worker: OSError"),
    )


def test_ranks_that_broke_beyond_the_named_ones_are_told() -> None:
    told = report(0, list(range(40)), Event("nonfinite", rank=0), broken=rank_mask(range(40)))
    (got,) = merge([record()], Addition(told))
    assert got.scalars["ranks_nonfinite"] == 40
    assert got.events[-1].kind == "ranks_nonfinite"
    assert "39 ranks (1, 2, " in str(got.events[-1].detail)


def test_rank_0_whose_events_stand_in_the_record_is_no_unnamed_one() -> None:
    own = (Event("nonfinite", 0, "up", "input", 0, "inf"),)
    (got,) = merge([record(events=own)], Addition(report(0, [0, 1], broken=0b1)))
    assert got.events == own


def test_a_rank_that_falls_silent_is_named_once() -> None:
    gathering = Gathering(8)
    for step, ranks in enumerate(([0, 1, 2], [0, 2], [0, 2])):
        gathering.add(report(step, ranks))
    additions = [gathering.close(step) for step in range(3)]
    got = merge([record(step) for step in range(3)], *additions, world_size=3)
    assert [[e.kind for e in each.events] for each in got] == [[], ["rank_silent"], []]
    assert got[1].events[0].rank == 1


def test_what_comes_late_is_counted_and_its_events_go_with_the_next_record() -> None:
    gathering = Gathering(8)
    gathering.add(report(0, [0]))
    gathering.close(0)
    late = report(0, [1], Event("nonfinite", 0, "up", "input", 1, "inf"))
    gathering.add(late)
    gathering.add(late)
    addition = gathering.close(1)
    assert addition.report is None
    assert gathering.late == 2
    (got,) = merge([record(1)], addition)
    assert [e.detail for e in got.events if e.kind == "nonfinite"] == ["at step 0, told late: inf"]
    assert gathering.close(2).late == ()


def test_a_step_back_opens_the_later_ones_again() -> None:
    gathering = Gathering(8)
    for step in (4, 5, 2, 3):
        gathering.add(report(step, [0]))
        heard = gathering.close(step).report is not None
        # A report of the first step after a rollback cannot be told from a late one.
        assert heard == (step != 2)
    assert gathering.late == 1


@given(st.lists(reports(), max_size=20), st.randoms(), st.integers(1, 3))
def test_the_order_of_reports_and_repeats_change_nothing(
    told: list[StepReport], rng: random.Random, times: int
) -> None:
    straight, mixed = Gathering(64), Gathering(64)
    for each in told:
        straight.add(each)
    again = told * times
    rng.shuffle(again)
    for each in again:
        mixed.add(each)
    for step in range(6):
        of_step = [each for each in told if each.step == step]
        addition = straight.close(step)
        assert addition == mixed.close(step)
        if of_step:
            expected = of_step[0]
            for each in of_step[1:]:
                expected = join(expected, each)
            assert addition.report == expected
    assert (straight.late, straight.dropped, len(straight)) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.booleans()), max_size=60))
def test_memory_is_bounded_and_what_is_given_up_counted(steps: list[tuple[int, bool]]) -> None:
    gathering = Gathering(5)
    for step, broken in steps:
        gathering.add(report(step, [0], *([Event("nonfinite", rank=0)] if broken else [])))
        assert len(gathering) <= 5
    unlike = len({step for step, _ in steps})
    assert gathering.dropped >= unlike - 5
    assert len(gathering) == min(unlike, 5)


def test_steps_with_events_are_given_up_last() -> None:
    gathering = Gathering(2)
    gathering.add(report(0, [0], Event("nonfinite", rank=0)))
    for step in range(1, 9):
        gathering.add(report(step, [0]))
    assert [each.step for each in gathering.take(9)] == [0, 8]


@pytest.mark.parametrize("count", [1, 7])
def test_records_of_all_shapes_pass(count: int) -> None:
    of = [record(s, *([tensor(amax=float(s))] if s % 2 else [])) for s in range(count)]
    additions = [
        Addition(report(s, [1], largest={UP: Held(100.0, 1)})) if s % 3 else Addition(None)
        for s in range(count)
    ]
    got = merge(of, *additions)
    assert [each.step for each in got] == list(range(count))
    for before, after in zip(of, got, strict=True):
        wanted = 100.0 if before.step % 3 else float(before.step)
        assert [t.amax for t in after.tensors] == [wanted for _ in before.tensors]
