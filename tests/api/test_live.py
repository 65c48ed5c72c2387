"""Live analysis: every record once and in order, whatever arrival, load or restarts do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from foreshock.api.alert_log import AlertLog
from foreshock.api.diagnosis import Cause
from foreshock.api.exposition import ServiceTally
from foreshock.api.leases import Leases, SoleReplica
from foreshock.api.live import LiveAnalysis, LiveParts
from foreshock.api.live_run import HOLD_SECONDS, RunAnalysis
from foreshock.api.registry import LaunchRequest, Registry
from foreshock.api.scoring import Scored, ScoringTask
from foreshock.api.scoring_workers import InlineScoring, Scoring
from foreshock.api.silence import SilenceWatch
from foreshock.api.store import StoreUnreachable
from foreshock.api.stream import EventStream
from foreshock.monitor.record import SCHEMA, Event, records_to_table
from tests.api.live_helpers import SUBJECT, ScriptedScorer, record, table_of, wait_until


class MemoryStore:
    """Records and risk rows in memory; `broken` makes every call fail."""

    def __init__(self) -> None:
        self.tables: dict[tuple[str, int], pa.Table] = {}
        self.risks: dict[tuple[str, int], dict[int, str]] = {}
        self.rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self.broken = False
        self.away: set[str] = set()

    def probabilities(self, run_id: str, attempt: int = 1) -> dict[int, tuple[float | None, ...]]:
        """By step, one per horizon; a risk that was kept twice has too many."""
        found: dict[int, tuple[float | None, ...]] = {}
        for row in self.rows[run_id, attempt]:
            found[row["step"]] = (*found.get(row["step"], ()), row["probability"])
        return found

    def commit(self, run_id: str, attempt: int, table: pa.Table) -> None:
        held = self.tables.get((run_id, attempt), SCHEMA.empty_table())
        self.tables[run_id, attempt] = pa.concat_tables([held, table]).sort_by("step")

    def _table(self, run_id: str, attempt: int) -> pa.Table:
        if self.broken:
            raise OSError("the store is away")
        return self.tables.get((run_id, attempt), SCHEMA.empty_table())

    def step_before(self, run_id: str, attempt: int, up_to: int, count: int) -> int:
        steps = [s for s in self._table(run_id, attempt)["step"].to_pylist() if s <= up_to]
        return steps[-count:][0] - 1 if steps else -1

    def next_records(self, run_id: str, attempt: int, after: int, count: int) -> pa.Table:
        table = self._table(run_id, attempt)
        return table.filter(pc.greater(table["step"], after)).slice(0, count)

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        if self.broken:
            raise OSError("the store is away")
        if self.away & {group[0] for group in groups}:
            raise StoreUnreachable("a shard is away")
        for run_id, attempt, table in groups:
            held = self.risks.setdefault((run_id, attempt), {})
            held |= dict(zip(table["step"].to_pylist(), table["state"].to_pylist(), strict=True))
            self.rows.setdefault((run_id, attempt), []).extend(table.to_pylist())

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        self._table(run_id, attempt)
        return max(self.risks.get((run_id, attempt), {}), default=None)


class Lapsing(SoleReplica):
    """A lease that is out when it is asked for once, and back at the next look."""

    out = False

    def holds(self, name: str) -> bool:
        held, self.out = not self.out, False
        return held


class Slow(InlineScoring):
    """Takes so long over the second of its chunks that the lease runs out."""

    leases: Lapsing
    chunks = 0

    def score(self, tasks: Sequence[ScoringTask]) -> list[Scored]:
        answers = super().score(tasks)
        self.chunks += 1
        self.leases.out = self.chunks == 2
        return answers


class World:
    """A registry with one run, a store, and the analyses that come and go on top of them."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry(folder / "registry.sqlite")
        self.store = MemoryStore()
        self.stream = EventStream()
        self.tally = ServiceTally()
        self.scorers: list[ScriptedScorer] = []
        self.fail_at: int | None = None
        self.diagnose: Callable[[str, int, int], tuple[Cause, ...]] = lambda *_: (CAUSE,)
        request = LaunchRequest(project="default", run="llama", launch_id="1" * 32)
        self.run_id, _, _ = self.registry.launch(request)
        self.log = AlertLog(self.registry)
        self.watch = SilenceWatch()
        self.leases: Leases = SoleReplica()

    def new_scorer(self) -> ScriptedScorer:
        self.scorers.append(ScriptedScorer(fail_at=self.fail_at))
        return self.scorers[-1]

    def analysis(
        self,
        queue_batches: int = 100,
        idle_seconds: float = 900.0,
        scoring: Scoring | None = None,
    ) -> LiveAnalysis:
        self.log = AlertLog(self.registry)
        parts = LiveParts(
            registry=self.registry,
            store=self.store,
            log=self.log,
            stream=self.stream,
            tally=self.tally,
            scoring=scoring or InlineScoring(self.new_scorer),
            watch=self.watch,
            diagnose=lambda *where: self.diagnose(*where),
            alerted=lambda: None,
            leases=self.leases,
        )
        return LiveAnalysis(parts, queue_batches=queue_batches, idle_seconds=idle_seconds)

    def send(self, live: LiveAnalysis, table: pa.Table, attempt: int = 1) -> None:
        self.store.commit(self.run_id, attempt, table)
        live.committed(self.run_id, attempt, table)

    def risks(self, attempt: int = 1) -> dict[int, str]:
        return self.store.risks.get((self.run_id, attempt), {})

    @property
    def seen(self) -> list[int]:
        return self.scorers[-1].seen


CAUSE = Cause(
    name="scale",
    probability=0.7,
    layers=("blocks.1.mlp.up",),
    role="input",
    statistic="headroom_log2",
    since_step=3,
    evidence="headroom fell below zero",
    remedy="shorten the amax history",
    source="",
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.registry.close()


@pytest.fixture
def live(world: World) -> Iterator[LiveAnalysis]:
    live = world.analysis()
    live.start()
    yield live
    live.stop()


def test_every_record_is_scored_once_and_in_order(world: World, live: LiveAnalysis) -> None:
    for start in range(0, 100, 5):
        world.send(live, table_of(range(start, start + 5)))
    wait_until(lambda: len(world.risks()) == 100)
    assert world.seen == list(range(100))
    latest = live.latest(world.run_id)
    assert latest is not None
    assert (latest.step, latest.step_seconds, latest.steps_per_record) == (99, 1.0, 1)
    assert live.latest("f" * 32) is None
    wait_until(lambda: live.idle)


def test_batches_that_overtake_each_other_wait(world: World, live: LiveAnalysis) -> None:
    world.send(live, table_of(range(10)))
    wait_until(lambda: len(world.risks()) == 10)
    for start in (14, 12, 10):
        live.committed(world.run_id, 1, table_of([start, start + 1]))
    wait_until(lambda: len(world.risks()) == 16)
    assert world.seen == list(range(16))
    assert world.tally.value("foreshock_late_records_total") == 0


def answered(run: RunAnalysis) -> list[int]:
    """Score what is ready; its steps."""
    table = run.ready(0.0, 100)
    assert table is not None
    scoring = InlineScoring(ScriptedScorer)
    (answer,) = scoring.score([replace(run.task(table), fresh=True)])
    run.scored(table, answer)
    return [risk.step for _, risk in answer.risks]


def test_a_gap_is_waited_for_but_not_for_ever() -> None:
    run = RunAnalysis(SUBJECT)
    run.behind = False
    run.offer(table_of(range(4)))
    assert answered(run) == [0, 1, 2, 3]
    run.offer(table_of([6, 7]))
    assert run.ready(1.0, 100) is None
    assert run.ready(1.0 + HOLD_SECONDS / 2, 100) is None
    assert not run.behind
    assert run.ready(1.0 + HOLD_SECONDS, 100) is None
    # What is missing may lie in the store: it is asked before anything is passed over.
    assert run.behind
    assert (run.pending, run.last_step) == (0, 3)


def test_a_record_that_never_comes_is_passed_over(world: World, live: LiveAnalysis) -> None:
    world.send(live, table_of(range(4)))
    wait_until(lambda: len(world.risks()) == 4)
    world.send(live, table_of([6, 7]))
    wait_until(lambda: 7 in world.risks(), seconds=HOLD_SECONDS + 20)
    assert world.seen == [0, 1, 2, 3, 6, 7]


def test_a_batch_that_came_in_at_another_replica_is_not_passed_over(
    world: World, live: LiveAnalysis
) -> None:
    world.send(live, table_of(range(8)))
    wait_until(lambda: len(world.risks()) == 8)
    # Another replica stored it and was lost before anybody heard of it.
    world.store.commit(world.run_id, 1, table_of(range(8, 16)))
    world.send(live, table_of(range(16, 24)))
    wait_until(lambda: 23 in world.risks(), seconds=HOLD_SECONDS + 20)
    assert sorted(world.risks()) == list(range(24))
    assert world.seen == list(range(24))


def test_sparse_logs_are_not_held_back() -> None:
    run = RunAnalysis(SUBJECT)
    run.behind = False
    for steps in ([0, 10], [20, 30]):
        run.offer(table_of(steps))
        assert answered(run) == steps
    assert run.last_step == 30


def test_late_records_are_counted_and_the_scorer_sees_them_in_order(
    world: World, live: LiveAnalysis
) -> None:
    world.send(live, table_of([0, 1, 2, 5, 6]))
    wait_until(lambda: len(world.risks()) == 5)
    world.send(live, table_of([3, 4]))
    world.send(live, table_of([7]))
    wait_until(lambda: 7 in world.risks())
    assert world.tally.value("foreshock_late_records_total") == 2
    assert world.seen == list(range(8))


def test_records_sent_twice_are_scored_once(world: World, live: LiveAnalysis) -> None:
    world.send(live, table_of(range(5)))
    wait_until(lambda: len(world.risks()) == 5)
    live.committed(world.run_id, 1, table_of(range(3, 8)))
    wait_until(lambda: len(world.risks()) == 8)
    assert world.seen == list(range(8))


def test_a_full_queue_loses_nothing(world: World) -> None:
    live = world.analysis(queue_batches=2)
    for start in range(0, 1000, 10):
        world.send(live, table_of(range(start, start + 10)))
    assert live.queue_length == 2
    live.start()
    wait_until(lambda: len(world.risks()) == 1000)
    live.stop()
    assert world.seen == list(range(1000))
    assert world.tally.value("foreshock_analysis_rereads_total") == 98


def test_committed_returns_at_once_while_the_store_hangs(world: World) -> None:
    hanging = threading.Event()
    live = world.analysis(queue_batches=1)

    def hang(run_id: str, attempt: int) -> int | None:
        hanging.wait(10)
        return None

    def send_all() -> None:
        for step in range(50):
            world.send(live, table_of([step]))

    world.store.last_risk_step = hang  # type: ignore[method-assign]
    live.start()
    done = threading.Thread(target=send_all)
    done.start()
    done.join(2)
    assert not done.is_alive()
    hanging.set()
    wait_until(lambda: len(world.risks()) == 50)
    live.stop()


def test_a_restart_goes_on_where_it_was_with_the_same_risks(world: World) -> None:
    first = world.analysis()
    first.start()
    world.send(first, table_of(range(20), at_4=4.5))
    wait_until(lambda: len(world.risks()) == 20)
    first.stop()
    # Made durable while no analysis ran.
    world.store.commit(world.run_id, 1, table_of(range(20, 25)))
    second = world.analysis()
    second.start()
    world.send(second, table_of(range(25, 30)))
    wait_until(lambda: len(world.risks()) == 30)
    second.stop()
    assert world.seen == list(range(30))
    resumed = second.latest(world.run_id)
    whole = ScriptedScorer()
    for step in range(30):
        last = whole.score(step=step, scalars={"loss": 4.5 if step == 4 else 2.0})
    assert resumed is not None
    assert resumed.risk.probability == last.probability


def test_an_alert_names_cause_and_layers_and_survives_the_restart(world: World) -> None:
    asked: list[int] = []

    def diagnose(run_id: str, attempt: int, step: int) -> tuple[Cause, ...]:
        asked.append(step)
        return (CAUSE,)

    world.diagnose = diagnose
    first = world.analysis()
    first.start()
    world.send(first, table_of(range(10), at_8=4.5, at_9=9.0))
    wait_until(lambda: len(world.risks()) == 10)
    first.stop()
    detection, forecast = world.log.find()
    assert (forecast.name, forecast.fired_step) == ("TrainingDivergenceRisk", 8)
    assert (detection.name, detection.fired_step) == ("TrainingLossDiverging", 9)
    assert forecast.content.causes[0]["name"] == "scale"
    assert forecast.content.causes[0]["layers"] == ["blocks.1.mlp.up"]
    assert asked == [8, 9]
    second = world.analysis()
    second.start()
    world.send(second, table_of(range(10, 20)))
    wait_until(lambda: len(world.risks()) == 20)
    second.stop()
    assert [alert.resolved_step for alert in world.log.find()] == [12, 12]


def test_a_failing_diagnosis_still_alerts(world: World, live: LiveAnalysis) -> None:
    def fail(*_: object) -> tuple[Cause, ...]:
        raise RuntimeError("no diagnosis today")

    world.diagnose = fail
    world.send(live, table_of(range(3), at_2=9.0))
    wait_until(lambda: len(world.log.find(state="firing")) == 1)
    assert world.log.find()[0].content.causes == ()
    assert world.tally.value("foreshock_analysis_errors_total") == 1


def test_a_record_that_cannot_be_scored_is_skipped(world: World) -> None:
    world.fail_at = 5
    live = world.analysis()
    live.start()
    world.send(live, table_of(range(10)))
    wait_until(lambda: 9 in world.risks())
    live.stop()
    assert sorted(world.risks()) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert world.tally.value("foreshock_analysis_errors_total") == 1


def test_a_store_that_was_away_costs_time_only(world: World, live: LiveAnalysis) -> None:
    world.store.broken = True
    world.send(live, table_of(range(5)))
    wait_until(lambda: world.tally.value("foreshock_analysis_errors_total") > 0)
    world.store.broken = False
    wait_until(lambda: len(world.risks()) == 5)
    assert world.seen == list(range(5))


def test_a_lost_shard_holds_back_only_its_own_risks(world: World, live: LiveAnalysis) -> None:
    request = LaunchRequest(project="default", run="other", launch_id="2" * 32)
    other, _, _ = world.registry.launch(request)
    world.store.away = {other}
    for run_id in (other, world.run_id):
        world.store.commit(run_id, 1, table_of(range(5)))
        live.committed(run_id, 1, table_of(range(5)))
    wait_until(lambda: len(world.risks()) == 5)
    assert (other, 1) not in world.store.risks
    world.store.away = set()
    wait_until(lambda: len(world.store.risks.get((other, 1), {})) == 5)
    for run_id in (other, world.run_id):
        # Kept once: three horizons a step.
        assert [len(row) for row in world.store.probabilities(run_id).values()] == [3] * 5


def test_what_was_scored_while_the_lease_was_out_is_scored_again(world: World) -> None:
    world.leases = leases = Lapsing()
    scoring = Slow(world.new_scorer)
    scoring.leases = leases
    live = world.analysis(scoring=scoring)
    live.start()
    for first in (0, 8, 16):
        world.send(live, table_of(range(first, first + 8)))
        wait_until(lambda: scoring.chunks > 0)
        wait_until(lambda: live.idle)
    wait_until(lambda: sorted(world.risks()) == list(range(24)))
    live.stop()
    # A scorer that had seen a step would not have been shown it again.
    assert world.seen == list(range(24))


def test_a_new_attempt_has_its_own_scorer_and_ends_the_alerts_of_the_old(
    world: World, live: LiveAnalysis
) -> None:
    world.send(live, table_of(range(5), at_4=9.0))
    wait_until(lambda: len(world.risks()) == 5)
    world.send(live, table_of(range(2, 6)), attempt=2)
    wait_until(lambda: len(world.risks(2)) == 4)
    assert world.seen == [2, 3, 4, 5]
    (alert,) = world.log.find()
    assert (alert.state, alert.end_reason) == ("resolved", "attempt 2 began")
    latest = live.latest(world.run_id)
    assert latest is not None
    assert (latest.subject.attempt, latest.step) == (2, 5)
    assert [reading.step for reading in live.readings()] == [5]


def test_an_unknown_run_is_no_reason_to_stop(world: World, live: LiveAnalysis) -> None:
    live.committed("f" * 32, 1, table_of([0]))
    world.send(live, table_of(range(3)))
    wait_until(lambda: len(world.risks()) == 3)


def test_a_silent_run_leaves_memory_and_comes_back(world: World) -> None:
    live = world.analysis(idle_seconds=0.0)
    live.start()
    world.send(live, table_of(range(3)))
    wait_until(lambda: len(world.risks()) == 3)
    wait_until(lambda: live.latest(world.run_id) is None)
    world.send(live, table_of([3]))
    wait_until(lambda: len(world.risks()) == 4)
    live.stop()
    assert world.seen == [0, 1, 2, 3]


def test_what_is_at_risk_counts_from_the_checkpoint(world: World, live: LiveAnalysis) -> None:
    dropped = Event("dropped", detail="12 records: the disk is full")
    records = [record(step) for step in range(3)]
    records += [record(3, events=[Event("checkpoint"), dropped]), record(4, kurtosis=3.0)]
    world.send(live, records_to_table(records))
    wait_until(lambda: len(world.risks()) == 5)
    latest = live.latest(world.run_id)
    assert latest is not None
    assert latest.hours_at_risk == pytest.approx(1 / 3600)
    (reading,) = live.readings()
    assert reading.dropped == 12.0
    assert reading.statistics is not None


def test_events_are_published(world: World, live: LiveAnalysis) -> None:
    world.send(live, table_of(range(3), at_2=9.0))
    wait_until(lambda: len(world.risks()) == 3)
    kinds = [event.kind for event in world.stream._events]
    assert sorted(kinds) == ["alert", "risk", "step"]
    assert {event.run_id for event in world.stream._events} == {world.run_id}
