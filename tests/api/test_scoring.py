"""Scoring many runs at once, in processes that die: the risks of one scorer, record by record."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.api.columns import RecordReader
from foreshock.api.diagnosis_process import DiagnosisProcess
from foreshock.api.scorer import LocalScorer
from foreshock.api.scoring import ScoringTask, ShippedScorers
from foreshock.api.scoring_records import KnownLayout, scoring_records
from foreshock.api.scoring_workers import InlineScoring, ScoringWorkers
from foreshock.api.signals import EXTREMES, summarise, worst_layers
from foreshock.api.spawned import ProcessLost
from foreshock.monitor.record import (
    Event,
    Risk,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_table,
)
from tests.api.live_helpers import ScriptedScorer, wait_until
from tests.api.test_live import World

ROOT = Path(__file__).parent.parent.parent
ODD = (0.0, 1.0, 3.5, -2.0, float("nan"), float("inf"), float("-inf"), None)


def make_run(seed: int, count: int, layers: int = 4, cadence: int = 3) -> list[StepRecord]:
    """A run whose loss turns up at the end; statistics with holes, what-if rows, events."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(count):
        rise = max(0.0, (step - count * 0.8) / 20)
        scalars = {
            "loss": 2 + 3 * float(np.exp(-step / 50)) + 0.05 * rng.standard_normal() + rise,
            "grad_norm": float(np.exp(0.1 * rng.standard_normal() + rise)),
            "update_ratio": 1e-3 * float(np.exp(0.05 * rng.standard_normal())),
        }
        events = (Event("data_switch"),) if step == count // 2 else ()
        measured = step % cadence == 0
        tensors = tuple(tensors_of(rng, layers)) if measured else ()
        time = datetime(2026, 11, 1, tzinfo=UTC) + timedelta(seconds=step)
        records.append(StepRecord(step, time, scalars, tensors, events))
    return records


def tensors_of(rng: np.random.Generator, layers: int) -> Iterator[TensorStatistics]:
    for layer in range(layers):
        for role in ("input", "weight", "grad_output", "output"):
            for what_if in (False, True):
                identity = TensorIdentity(
                    f"blocks.{layer}", role, "bf16" if what_if else "e4m3", what_if=what_if
                )
                values: dict[str, Any] = {
                    name: None if rng.random() < 0.1 else float(np.exp(rng.standard_normal()))
                    for name in ("amax", "rms", "kurtosis", "headroom_log2", "sqnr_db")
                }
                yield TensorStatistics(identity=identity, numel=64, nonfinite_count=0, **values)


def risks_alone(records: list[StepRecord]) -> list[Risk]:
    """What one scorer says, record by record, through columns of one record."""
    scorer, reader = LocalScorer(), RecordReader()
    risks = []
    for row in reader.read(records_to_table(records)):
        layout = row.layout
        risk = scorer.score(
            step=row.step,
            scalars=row.scalars,
            events=row.events,
            identities=None if layout is None else layout.identities,
            statistics=row.statistics,
        )
        risks.append(risk)
    return risks


tensor = st.builds(
    TensorStatistics,
    identity=st.builds(
        TensorIdentity,
        layer=st.sampled_from(["a", "b", "c", "d"]),
        role=st.sampled_from(["input", "weight", "grad_output", "output"]),
        format=st.just("e4m3"),
        what_if=st.booleans(),
    ),
    numel=st.just(4),
    amax=st.sampled_from(ODD),
    headroom_log2=st.sampled_from(ODD),
    sqnr_db=st.sampled_from(ODD),
    kurtosis=st.sampled_from(ODD),
    nonfinite_count=st.sampled_from([0, 3, None]),
)
scalar = st.dictionaries(
    st.sampled_from(["loss", "grad_norm", "param_norm", "other"]),
    st.sampled_from([1.0, -1.0, float("nan"), float("inf")]),
)
mixed = st.lists(
    st.tuples(scalar, st.lists(tensor, max_size=9, unique_by=lambda t: t.identity)), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(mixed)
def test_many_records_of_any_layout_have_the_signals_of_each_alone(
    rows: list[tuple[dict[str, float], list[TensorStatistics]]],
) -> None:
    start = datetime(2026, 11, 1, tzinfo=UTC)
    table = records_to_table(
        StepRecord(step, start, scalars, tuple(tensors))
        for step, (scalars, tensors) in enumerate(rows)
    )
    found = scoring_records(table, [KnownLayout() for _ in rows])
    with np.errstate(invalid="ignore"):
        alone = list(RecordReader().read(table))
        for record, row in zip(found, alone, strict=True):
            assert (record.step, record.time) == (row.step, row.time)
            assert repr(record.scalars) == repr(row.scalars)
            identities = None if row.layout is None else row.layout.identities
            expected = summarise(identities, row.statistics, row.scalars)
            np.testing.assert_array_equal(record.signals, expected)
            assert record.measured == (row.layout is not None)
            if identities is not None:
                worst = worst_layers(identities, row.statistics or {})
                assert record.worst == tuple(worst.get(name) for name in EXTREMES)


def test_many_runs_at_once_get_the_risks_that_each_gets_alone() -> None:
    runs = {(f"{seed:032x}", 1): make_run(seed, 120, layers=2 + seed) for seed in range(4)}
    alone = {key: risks_alone(records) for key, records in runs.items()}
    scoring = InlineScoring(ShippedScorers())
    found: dict[tuple[str, int], list[Risk]] = {key: [] for key in runs}
    for start, width in ((0, 1), (1, 4), (5, 50), (55, 65)):
        tasks = [
            ScoringTask(
                key=key,
                table=records_to_table(records[start : start + width]),
                fresh=start == 0,
            )
            for key, records in runs.items()
        ]
        for answer in scoring.score(tasks):
            found[answer.key] += [risk for _, risk in answer.risks]
    assert found == alone
    assert any(risk.drivers for risk in alone[f"{0:032x}", 1])


def test_a_run_goes_on_from_a_snapshot_as_if_nothing_had_been() -> None:
    records = make_run(7, 150)
    key = ("a" * 32, 1)
    first, second = InlineScoring(ShippedScorers()), InlineScoring(ShippedScorers())
    (answer,) = first.score(
        [ScoringTask(key=key, table=records_to_table(records[:100]), fresh=True)]
    )
    snapshot = answer.snapshot
    assert snapshot is not None
    assert snapshot.step == 99
    assert not second.holds(key)
    rest = ScoringTask(
        key=key, table=records_to_table(records[100:]), fresh=True, state=snapshot.state
    )
    (again,) = second.score([rest])
    assert [risk for _, risk in again.risks] == risks_alone(records)[100:]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.registry.close()


@pytest.mark.parametrize("moment", ["early", "late"])
def test_a_killed_worker_loses_nothing_and_the_risk_goes_on(world: World, moment: str) -> None:
    records = make_run(3, 160, layers=2)
    workers = ScoringWorkers(2, ShippedScorers())
    live = world.analysis(scoring=workers)
    live.start()
    kill_at = 20 if moment == "early" else 100
    for start in range(0, 160, 20):
        world.send(live, records_to_table(records[start : start + 20]))
        if start == kill_at:
            wait_until(lambda: len(world.risks()) >= kill_at, 60)
            for pid in workers.pids:
                os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(world.risks()) == 160, 60)
    wait_until(lambda: live.idle)
    live.stop()
    assert workers.restarts >= 1
    expected = {
        risk.step: tuple(risk.probability[h] for h in (10, 100, 1000))
        for risk in risks_alone(records)
    }
    assert world.store.probabilities(world.run_id) == expected
    latest = live.latest(world.run_id)
    assert latest is not None
    assert latest.step == 159


def test_a_worker_that_hangs_is_replaced(world: World) -> None:
    workers = ScoringWorkers(1, ScriptedScorer, answer_seconds=1.5)
    live = world.analysis(scoring=workers)
    live.start()
    world.send(live, records_to_table(make_run(1, 5)))
    wait_until(lambda: len(world.risks()) == 5, 60)
    (pid,) = workers.pids
    os.kill(pid, signal.SIGSTOP)
    world.send(live, records_to_table(make_run(1, 10)[5:]))
    wait_until(lambda: len(world.risks()) == 10, 60)
    live.stop()
    assert workers.restarts >= 1
    assert workers.pids == ()


def test_a_service_that_stops_does_not_wait_for_an_answer(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it close the pipe, and then the store, under the thread that waits for it."""
    workers = ScoringWorkers(1, ScriptedScorer)
    live = world.analysis(scoring=workers)
    live.start()
    world.send(live, records_to_table(make_run(1, 5)))
    wait_until(lambda: len(world.risks()) == 5, 60)
    (pid,) = workers.pids
    os.kill(pid, signal.SIGSTOP)
    world.send(live, records_to_table(make_run(1, 10)[5:]))
    wait_until(lambda: not live.idle, 60)
    live.stop(0.5)
    assert not live._thread.is_alive()
    assert workers.pids == ()
    assert workers.restarts == 0
    assert "Traceback" not in caplog.text
    # What was not scored is scored after the restart.
    again = world.analysis(scoring=InlineScoring(ScriptedScorer))
    again.start()
    world.send(again, records_to_table(make_run(1, 12)[10:]))
    wait_until(lambda: len(world.risks()) == 12, 60)
    again.stop()


def test_a_diagnosis_under_way_does_not_hold_the_service_up() -> None:
    process = DiagnosisProcess()
    process.start()
    table = records_to_table(make_run(1, 40))
    process.diagnose(table)
    pid = process._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(process.diagnose, table)
        wait_until(process._lock.locked, 30)
        began = time.monotonic()
        process.stop()
        # Not the minute after which a process counts as hanging.
        assert time.monotonic() - began < 30
        with pytest.raises(ProcessLost):
            asked.result(30)
    assert process._process.pid is None


def test_workers_end_when_their_service_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from foreshock.api.scoring_workers import ScoringWorkers\n"
        "from tests.api.live_helpers import ScriptedScorer\n"
        "if __name__ == '__main__':\n"
        "    workers = ScoringWorkers(1, ScriptedScorer)\n"
        "    workers.start()\n"
        "    print(*workers.pids, flush=True)\n"
        "    time.sleep(600)\n"
    )
    file = tmp_path / "service.py"
    file.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not alive(pid), 60)


def alive(pid: int) -> bool:
    try:
        # A process that ended, but was not waited for, still has its id.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_that_left_memory_leaves_the_worker_too(world: World) -> None:
    scoring = InlineScoring(ScriptedScorer)
    live = world.analysis(idle_seconds=0.0, scoring=scoring)
    live.start()
    world.send(live, records_to_table(make_run(1, 5)))
    wait_until(lambda: len(world.risks()) == 5)
    wait_until(lambda: live.latest(world.run_id) is None)
    wait_until(lambda: not scoring.holds((world.run_id, 1)))
    live.stop()


def test_no_worker_is_no_service() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        ScoringWorkers(0, ScriptedScorer)


def test_a_threshold_factor_reaches_the_scorers_of_other_processes() -> None:
    again: ShippedScorers = pickle.loads(pickle.dumps(ShippedScorers(2.5)))
    scorer = again()
    assert isinstance(scorer, LocalScorer)
    assert scorer.threshold_factor == 2.5
