"""Silent runs: noticed by their own cadence, alerted once, taken back; ended ones left alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.silence import Heard, SilenceChange, SilenceSettings, SilenceWatch
from foreshock.monitor.record import Event, records_to_table
from tests.api.live_helpers import record, table_of, wait_until
from tests.api.test_live import World

RUN = "a" * 32
SETTINGS = SilenceSettings(factor=10.0, minimum=60.0)


def heard(received: float, *, last: float | None = None, ended: bool = False) -> Heard:
    time = received if last is None else last
    return Heard(
        received=received,
        first=time,
        last=time,
        records=1,
        attempt=1,
        step=int(received),
        ended=ended,
    )


def fed(times: list[float], watch: SilenceWatch | None = None) -> SilenceWatch:
    watch = watch or SilenceWatch(SETTINGS)
    for time in times:
        watch.heard(RUN, heard(time))
    return watch


def silent(watch: SilenceWatch, now: float) -> list[bool]:
    return [change.silent for change in watch.sweep(now, 1e6)]


@given(st.floats(0.01, 1000), st.integers(2, 40))
def test_the_limit_follows_the_cadence(interval: float, count: int) -> None:
    watch = fed([index * interval for index in range(count)])
    last = (count - 1) * interval
    limit = max(60.0, 10 * interval)
    assert watch.state(RUN, last + 0.99 * limit) == "live"
    assert silent(watch, last + 0.99 * limit) == []
    assert watch.state(RUN, last + 1.01 * limit) == "stale"
    assert silent(watch, last + 1.01 * limit) == [True]
    assert silent(watch, last + 2 * limit) == []


def test_one_late_batch_does_not_take_the_alert_back_but_three_do() -> None:
    watch = fed([0.0, 1.0, 2.0])
    assert silent(watch, 100.0) == [True]
    fed([101.0], watch)
    assert silent(watch, 102.0) == []
    assert silent(watch, 400.0) == []
    fed([401.0, 402.0], watch)
    assert silent(watch, 403.0) == []
    fed([403.0], watch)
    assert silent(watch, 404.0) == [False]


def test_a_run_that_ended_is_not_silent() -> None:
    watch = fed([0.0, 1.0])
    watch.heard(RUN, heard(2.0, ended=True))
    assert watch.state(RUN, 1e4) == "finished"
    assert silent(watch, 1e4) == []
    # It goes on after all.
    watch.heard(RUN, heard(1e4))
    assert watch.state(RUN, 1e4) == "live"
    assert silent(watch, 2e4) == [True]


def test_a_silent_run_that_says_it_ended_is_taken_back_at_once() -> None:
    watch = fed([0.0, 1.0])
    assert silent(watch, 100.0) == [True]
    watch.heard(RUN, heard(101.0, ended=True))
    assert watch.sweep(102.0, 1e6) == [
        SilenceChange(RUN, 1, 101, silent=False, seconds=1.0, ended=True)
    ]


def test_a_spool_that_is_emptied_says_nothing_about_the_cadence() -> None:
    watch = SilenceWatch(SETTINGS)
    for index in range(10):
        watch.heard(RUN, heard(1000.0 + index / 100, last=60.0 * index))
    assert watch.state(RUN, 1000.0 + 500) == "live"
    assert watch.state(RUN, 1000.0 + 700) == "stale"


def test_a_client_with_a_wrong_clock_is_judged_by_the_services() -> None:
    watch = SilenceWatch(SETTINGS)
    for index in range(5):
        watch.heard(RUN, heard(1000.0 + index, last=9e8 + index))
    assert watch.state(RUN, 1010.0) == "live"
    assert watch.state(RUN, 1070.0) == "stale"
    assert watch.skew(RUN) == pytest.approx(1000.0 - 9e8)


def test_the_services_own_absence_is_no_silence_of_the_run() -> None:
    watch = SilenceWatch(SETTINGS)
    watch.recall(RUN, [heard(0.0), heard(1.0), heard(2.0)], now=1000.0, alerted=False)
    assert silent(watch, 1050.0) == []
    assert silent(watch, 1070.0) == [True]
    assert watch.sweep(2e6, 1e6) == []
    assert watch.state(RUN, 2e6) is None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.watch = SilenceWatch(SilenceSettings(factor=0.001, minimum=2.0))
    yield world
    world.registry.close()


def test_a_silent_run_alerts_and_comes_back(world: World) -> None:
    live = world.analysis()
    live.start()
    world.send(live, table_of(range(3)))
    world.send(live, table_of(range(3, 6)))
    wait_until(lambda: len(world.log.find(state="firing")) == 1, 30)
    (alert,) = world.log.find()
    assert (alert.name, alert.kind, alert.fired_step) == ("TrainingRunSilent", "silence", 5)
    assert live.readings()[0].state == "stale"
    for step in range(6, 9):
        world.send(live, table_of([step]))
    wait_until(lambda: not world.log.find(state="firing"), 30)
    (alert,) = world.log.find()
    assert (alert.resolved_step, alert.end_reason) == (8, "the run sends records again")
    live.stop()


def test_risk_that_is_back_to_normal_leaves_the_silence_alone(world: World) -> None:
    live = world.analysis()
    live.start()
    world.send(live, table_of(range(2)))
    wait_until(lambda: len(world.log.find(state="firing")) == 1, 30)
    world.send(live, table_of([2]))
    wait_until(lambda: 2 in world.risks())
    assert [alert.state for alert in world.log.find()] == ["firing"]
    live.stop()


def ended(world: World) -> tuple[int, int] | None:
    run = world.registry.run(world.run_id)
    assert run is not None
    return run.ended


def test_the_end_is_remembered_and_taken_back_by_a_later_record(world: World) -> None:
    live = world.analysis()
    live.start()
    world.send(live, records_to_table([record(0), record(1, events=[Event("end")])]))
    wait_until(
        lambda: (run := world.registry.run(world.run_id)) is not None and run.ended == (1, 1)
    )
    wait_until(lambda: live.idle)
    live.stop()
    again = world.analysis()
    again.start()
    again.stop()
    assert world.log.find() == ()
