"""Runs, launches, attempts, layers and the ledger in a real SQLite file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from foreshock.api.attempts import StreamPoint
from foreshock.api.ledger import BatchKey, Ledger, LedgerEntry, Span
from foreshock.api.registry import LaunchConflict, LaunchRequest, Registry
from tests.api.service import new_launch


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(tmp_path / "registry.sqlite")
    yield made
    made.close()


def request(run: str = "a", launch: str | None = None, project: str = "p") -> LaunchRequest:
    return LaunchRequest(project=project, run=run, launch_id=launch or new_launch())


def test_the_same_launch_gives_the_same_answer_and_a_new_one_the_next_attempt(
    registry: Registry,
) -> None:
    first = request()
    run_id, attempt, new = registry.launch(first)
    assert (attempt, new) == (1, True)
    assert registry.launch(first) == (run_id, 1, False)
    assert registry.launch(request()) == (run_id, 2, True)
    assert registry.launch(first) == (run_id, 1, False)
    other, attempt, _ = registry.launch(request(project="q"))
    assert other != run_id
    assert attempt == 1


def test_a_launch_belongs_to_one_run(registry: Registry) -> None:
    launch = new_launch()
    registry.launch(request("a", launch))
    with pytest.raises(LaunchConflict):
        registry.launch(request("b", launch))
    assert registry.run_id("b", "p") is None


def test_the_id_of_a_launch_means_something_within_its_project_only(registry: Registry) -> None:
    launch = new_launch()
    ours, _, _ = registry.launch(request("a", launch, "p"))
    theirs, attempt, new = registry.launch(request("a", launch, "q"))
    assert (theirs != ours, attempt, new) == (True, 1, True)
    assert registry.launch(request("a", launch, "q")) == (theirs, 1, False)
    with pytest.raises(LaunchConflict):
        registry.launch(request("b", launch, "q"))
    owners = registry.launch_owners(launch)
    assert [(owner.run_id, owner.project) for owner in owners] == [(ours, "p"), (theirs, "q")]
    assert len({owner.key for owner in owners}) == 2
    for owner in owners:
        assert registry.launch_owner(owner.key) == owner
        run = registry.run(owner.run_id)
        assert run is not None
        assert [each.launch_id for each in run.attempts] == [launch]
    registry.delete(ours)
    assert registry.launch_owners(launch) == owners[1:]
    # The other one keeps its place, whoever was first.
    assert registry.launch(request("a", launch, "q")) == (theirs, 1, False)


def test_a_run_that_went_elsewhere_is_looked_up_anew(registry: Registry) -> None:
    """Two replicas: one remembers a run that the other has deleted and announced anew."""
    launch = new_launch()
    registry.launch(request())
    old, number, _ = registry.launch(request("a", launch))
    replica = Registry(Path(str(registry.engine.url.database)))
    assert replica.launch_owners(launch)[0].run_id == old
    assert replica.attempt(old, launch, 0, 0) == number == 2
    registry.delete(old)
    fresh, number, _ = registry.launch(request("a", launch))
    assert replica.remembered_owners(launch)[0].run_id == old
    assert replica.launch_owners(launch)[0].run_id == fresh
    assert replica.attempt(fresh, launch, 0, 0) == number == 1
    registry.delete(fresh)
    replica.forget_run(fresh)
    assert replica.remembered_owners(launch) == ()
    assert replica.launch_owner(launch) is None
    replica.close()


def test_synced_to_disk_and_open_to_readers(registry: Registry) -> None:
    with registry.engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2


def test_many_threads_announce_at_once(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(registry.launch, [request() for _ in range(24)]))
    assert sorted(attempt for _, attempt, _ in answers) == list(range(1, 25))
    assert len({run_id for run_id, _, _ in answers}) == 1


def test_layers_keep_their_ids_and_the_model_its_order(registry: Registry) -> None:
    launch = LaunchRequest(
        project="p", run="a", launch_id=new_launch(), layers=("blocks.2", "blocks.10")
    )
    run_id, _, _ = registry.launch(launch)
    assert registry.layer_ids(run_id, ["extra", "blocks.10"])["extra"] == 2
    reopened = Registry(Path(str(registry.engine.url.database)))
    assert reopened.layer_names(run_id) == ["blocks.2", "blocks.10", "extra"]
    run = reopened.run(run_id)
    assert run is not None
    assert reopened.ordered_layers(run) == ["blocks.2", "blocks.10", "extra"]
    reopened.close()


def test_too_many_layers_are_refused(registry: Registry) -> None:
    run_id, _, _ = registry.launch(request())
    with pytest.raises(ValueError, match="65535"):
        registry.layer_ids(run_id, [f"l{i}" for i in range(65_536)])
    assert registry.layer_names(run_id) == []


def entry(
    run_id: str, launch: str, sequence: int, commit: int, span: Span, epoch: int = 0
) -> LedgerEntry:
    return LedgerEntry(
        run_id=run_id,
        key=BatchKey(launch, 0, sequence),
        digest=f"d{sequence}",
        commit=commit,
        point=StreamPoint(sequence, epoch, epoch, span.last_step),
        attempts=(span.attempt,),
        spans=(span,),
        records=1,
        received_at=datetime.now(UTC),
    )


def test_the_ledger_finds_batches_neighbours_and_tips(registry: Registry) -> None:
    launch = request()
    run_id, _, _ = registry.launch(launch)
    ledger = Ledger(registry)
    assert ledger.newest_commit() == 0
    entries = [
        entry(run_id, launch.launch_id, sequence, commit, Span(1, step, step + 9, None))
        for commit, (sequence, step) in enumerate([(1, 0), (5, 40), (3, 20)], start=1)
    ]
    ledger.commit(entries)
    for known in (ledger, Ledger(registry)):
        assert known.newest_commit() == 3
        tip = known.tip((launch.launch_id, 0))
        assert tip is not None
        assert tip.sequence == 5
        before, after = known.neighbours(BatchKey(launch.launch_id, 0, 2))
        assert before is not None
        assert after is not None
        assert (before.sequence, after.sequence) == (1, 3)
        assert known.neighbours(BatchKey(launch.launch_id, 0, 9))[1] is None
        assert known.neighbours(BatchKey(launch.launch_id, 1, 2)) == (None, None)
        found = known.find(BatchKey(launch.launch_id, 0, 3))
        assert found is not None
        assert (found.digest, found.commit) == ("d3", 3)
        assert known.find(BatchKey(launch.launch_id, 0, 4)) is None


def test_an_attempt_remembers_its_steps_and_its_newest_loss(registry: Registry) -> None:
    launch = request()
    run_id, _, _ = registry.launch(launch)
    ledger = Ledger(registry)
    spans = [Span(1, 10, 19, 2.0), Span(1, 20, 29, math.nan), Span(1, 0, 9, 7.0)]
    ledger.commit([entry(run_id, launch.launch_id, i, i + 1, span) for i, span in enumerate(spans)])
    run = registry.run(run_id)
    assert run is not None
    attempt = run.current
    assert attempt is not None
    assert (attempt.first_step, attempt.last_step) == (0, 29)
    assert attempt.last_loss is not None
    assert math.isnan(attempt.last_loss)
    assert attempt.last_received is not None


def test_a_rollback_gets_the_next_number_once(registry: Registry) -> None:
    launch = request()
    run_id, _, _ = registry.launch(launch)
    assert registry.attempt(run_id, launch.launch_id, 0, 0) == 1
    assert registry.attempt(run_id, launch.launch_id, 1, 5) == 2
    registry.launch(request())
    assert registry.attempt(run_id, launch.launch_id, 2, 5) == 4
    assert registry.attempt(run_id, launch.launch_id, 1, 5) == 2
    run = registry.run(run_id)
    assert run is not None
    assert run.current is None
    assert [a.epoch for a in run.attempts] == [0, 1, 0, 2]
