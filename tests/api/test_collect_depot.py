"""What a relay holds on disk: taken once, bounded, nothing that was taken is given up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from foreshock.api.collect.depot import BatchName, Depot, DepotFull, Made, Taken
from foreshock.monitor.record import Event, StepReport
from foreshock.monitor.record.reports import event_key


@pytest.fixture
def depot(tmp_path: Path) -> Iterator[Depot]:
    opened = Depot(tmp_path / "relay.sqlite", max_bytes=1000)
    yield opened
    opened.close()


def put(
    depot: Depot, sequence: int, body: bytes, *, launch: str = "a", ready: bool = False
) -> Taken:
    name = BatchName(launch, 0, sequence)
    return depot.put(name, digest=str(hash(body)), media_type="m", body=body, ready=ready)


def broken(step: int) -> StepReport:
    event = Event("nonfinite", rank=1)
    return StepReport(step=step, ranks=2, events={event_key(event): event})


def test_a_batch_is_taken_once_and_known_after_it_has_gone_on(depot: Depot) -> None:
    assert put(depot, 0, b"one") is Taken.NEW
    assert put(depot, 0, b"one") is Taken.AGAIN
    assert put(depot, 0, b"two") is Taken.CONFLICT
    (batch,) = depot.held()
    assert depot.first_ready() == []
    depot.seal(batch, Made("n", b"made", 0, 0))
    assert depot.held() == []
    (ready,) = depot.first_ready()
    assert (depot.body(ready), ready.media_type, depot.size) == (b"made", "n", 4)
    depot.sent(ready)
    assert (depot.size, depot.count_waiting()) == (0, 0)
    assert put(depot, 0, b"one") is Taken.AGAIN, "the digest is that of what came"
    assert put(depot, 0, b"made") is Taken.CONFLICT


def test_everything_outlives_the_process(tmp_path: Path) -> None:
    first = Depot(tmp_path / "relay.sqlite", max_bytes=1000)
    assert first.announce("a", "run", {"world_size": 3})
    put(first, 0, b"x" * 10)
    first.keep("run", "a", [broken(5)])
    # Not closed: the process was killed.
    second = Depot(tmp_path / "relay.sqlite", max_bytes=1000)
    launch = second.launch("a")
    assert launch is not None
    assert (launch.run, launch.world_size) == ("run", 3)
    assert [second.body(batch) for batch in second.held()] == [b"x" * 10]
    assert [kept.report for kept in second.kept()] == [broken(5)]
    assert second.size == 10
    first.close()
    second.close()


def test_a_full_relay_takes_nothing_more_and_gives_up_refused_batches_only(depot: Depot) -> None:
    put(depot, 0, b"x" * 600, ready=True)
    with pytest.raises(DepotFull, match="600"):
        put(depot, 1, b"y" * 500)
    assert depot.size == 600
    (batch,) = depot.first_ready()
    depot.refuse(batch, "422")
    assert put(depot, 1, b"y" * 500) is Taken.NEW
    assert (depot.size, depot.given_up) == (500, 1)
    assert put(depot, 0, b"x" * 600) is Taken.AGAIN


def test_batches_go_on_in_their_order_launch_by_launch(depot: Depot) -> None:
    put(depot, 7, b"1", launch="b", ready=True)
    put(depot, 0, b"2", launch="a", ready=True)
    put(depot, 8, b"3", launch="b", ready=True)
    assert [depot.body(batch) for batch in depot.first_ready()] == [b"1", b"2"]
    depot.sent(depot.first_ready()[0])
    assert [depot.body(batch) for batch in depot.first_ready()] == [b"2", b"3"]


def test_reports_that_came_after_a_batch_was_made_are_kept(depot: Depot) -> None:
    put(depot, 0, b"x")
    depot.keep("run", "a", [broken(0), broken(9)])
    newest = depot.newest_report()
    depot.keep("run", "a", [broken(1)])
    depot.seal(depot.held()[0], Made("m", b"y", 5, newest))
    assert [kept.report.step for kept in depot.kept()] == [9, 1]
    depot.reports_sent("a", [9, 1], newest)
    assert [kept.report.step for kept in depot.kept()] == [1]


def test_kept_reports_are_bounded_and_the_oldest_go_first(depot: Depot) -> None:
    for start in range(0, 5000, 1000):
        depot.keep("run", "a", [broken(step) for step in range(start, start + 1000)])
    kept = [each.report.step for each in depot.kept()]
    assert kept == list(range(5000 - 4096, 5000))
    assert depot.given_up == 5000 - 4096


def test_a_launch_belongs_to_one_run(depot: Depot) -> None:
    assert depot.announce("a", "run", {})
    assert depot.announce("a", "run", {})
    assert not depot.announce("a", "other", {})


def test_old_launches_are_forgotten_unless_something_waits(
    depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    for launch in "ab":
        depot.announce(launch, "run", {})
        put(depot, 0, b"x", launch=launch, ready=True)
    depot.sent(depot.first_ready()[0])
    monkeypatch.setattr("time.time", lambda: 1e12)
    depot.forget_old()
    assert depot.launch("a") is None
    assert depot.launch("b") is not None
    assert depot.size == 1
