"""The trainer under a guard: it goes back, skips data, changes precision, and hurts nobody."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from foreshock.monitor.guard import GuardPolicy
from foreshock.monitor.record import Risk, StepRecord, Suspect
from foreshock.trainer.config import RunConfig, StatesConfig
from foreshock.trainer.faults import BadBatch, LearningRateRamp, ScaleFault
from foreshock.trainer.guarded import Guarded
from foreshock.trainer.loop import RunResult, train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched

POLICY = GuardPolicy(snapshot_every=4, good_after=4, skip_extra=0, cooldown=2)


class Alarm:
    """A scorer that fires once, at one step of the first time through."""

    def __init__(self, step: int, kind: str = "detection") -> None:
        self.step, self.kind, self.fired = step, kind, False
        self.seen: list[int] = []

    def __call__(self, record: StepRecord) -> Risk:
        self.seen.append(record.step)
        fires = record.step == self.step and not self.fired
        self.fired = self.fired or fires
        return Risk(
            step=record.step,
            probability={},
            state="firing" if fires else "ok",
            kind=self.kind if fires else None,  # type: ignore[arg-type]
        )


def run(
    config: RunConfig,
    tmp_path: Path,
    scorer: Callable[[StepRecord], Risk],
    *,
    policy: GuardPolicy = POLICY,
    cause: str | None = None,
) -> tuple[RunResult, Guarded]:
    suspect = None if cause is None else Suspect(name=cause, layers=("blocks.0.mlp.down",))
    guarded = Guarded(scorer, policy, diagnose=lambda records: suspect, patience=5.0)
    watch = watched(config, spool=tmp_path, sinks=[guarded.sink])
    return train(config, watch=watch, overseer=guarded), guarded


def test_a_quiet_guard_changes_no_loss(tmp_path: Path) -> None:
    config = debug_cpu()
    result, guarded = run(config, tmp_path, Alarm(10**9))
    assert [s.loss for s in result.steps] == [s.loss for s in train(config).steps]
    assert guarded.guard is not None
    assert guarded.guard.entries == []
    assert guarded.guard.errors == 0


def test_rolled_back_on_the_same_data_it_repeats_itself_bit_for_bit(tmp_path: Path) -> None:
    config = debug_cpu()
    alone = [s.loss for s in train(config).steps]
    scorer = Alarm(13)
    # The precision of one layer is all that changes, and only for what comes after.
    result, _ = run(config, tmp_path, scorer, cause="scale")
    steps = [s.step for s in result.steps]
    back = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    to = steps[back]
    assert to < 13
    assert steps == [*range(steps[back - 1] + 1), *range(to, config.steps)]
    losses = [s.loss for s in result.steps]
    assert losses[:back] == alone[:back]
    assert losses[back] == pytest.approx(alone[to], abs=0.02)
    assert scorer.seen == [
        *range(scorer.seen[: scorer.seen.index(to, to + 1)][-1] + 1),
        *range(to, 20),
    ]


def test_skipped_data_is_not_trained_on(tmp_path: Path) -> None:
    clean = replace(debug_cpu(), steps=24)
    config = replace(clean, fault=BadBatch(start=12, duration=2, kind="constant", gain=50.0))
    result, guarded = run(config, tmp_path, Alarm(14), cause="bad_data")
    again = [s.loss for s in result.steps][-8:]
    assert result.steps[-1].step == 23
    # A constant byte is learnt at once; text is not.
    assert min(again) > 3.0
    assert guarded.guard is not None
    assert "skipping the data" in str(guarded.guard.entries[0])


def test_a_nonfinite_loss_is_rolled_back_before_the_loop_gives_up(tmp_path: Path) -> None:
    config = replace(
        debug_cpu(),
        steps=30,
        fault=LearningRateRamp(start=17, factor=1e38, limit=1e38),
    )
    unguarded = train(config)

    def scorer(record: StepRecord) -> Risk:
        bad = not math.isfinite(record.scalars["loss"])
        return Risk(
            step=record.step,
            probability={},
            state="firing" if bad else "ok",
            kind="detection" if bad else None,
        )

    assert unguarded.ended == "nonfinite"
    result, _ = run(config, tmp_path, scorer, cause="learning_rate")
    assert result.ended == "finished"
    assert math.isfinite(result.steps[-1].loss)


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_before_anything_is_known_good_the_beginning_is_gone_back_to(
    tmp_path: Path, level: str
) -> None:
    config = replace(debug_cpu(), states=StatesConfig(level=level))  # type: ignore[arg-type]
    alone = [s.loss for s in train(config).steps]
    result, _ = run(config, tmp_path, Alarm(2), cause="scale")
    steps = [s.step for s in result.steps]
    back = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    assert steps[back] == 0
    assert result.steps[0].loss == alone[0]
    assert result.steps[back].loss == pytest.approx(alone[0], abs=0.02)
    assert result.steps[-1].loss == pytest.approx(alone[-1], abs=0.3)


def test_a_scale_that_no_longer_fits_is_met_by_bf16_without_a_rollback(tmp_path: Path) -> None:
    config = replace(debug_cpu(), fault=ScaleFault(start=6, growth=4.0, roles=("input",)))
    result, guarded = run(config, tmp_path, Alarm(10**9))
    assert len(result.steps) == config.steps
    assert guarded.guard is not None
    assert "bfloat16" in str(guarded.guard.entries[0])
    assert "scales" in guarded.guard.entries[0].why


def test_steps_that_are_too_long_begin_again_at_a_lower_rate(tmp_path: Path) -> None:
    clean = replace(debug_cpu(), steps=40)
    config = replace(clean, optimizer=replace(clean.optimizer, learning_rate=1.0))
    result, guarded = run(config, tmp_path, Alarm(10**9))
    assert guarded.guard is not None
    told = " ".join(str(entry) for entry in guarded.guard.entries)
    assert "roll back to before step 0" in told
    assert "steps have changed the weights" in told
    assert len(result.steps) > config.steps
    assert result.steps[-1].loss < train(config).steps[-1].loss


def test_events_tell_what_was_done_and_why(tmp_path: Path) -> None:
    from foreshock.monitor.record import read_stream, table_to_records

    run(debug_cpu(), tmp_path, Alarm(13), cause="scale")
    records = [
        record
        for path in sorted(tmp_path.rglob("*.arrow"))
        for record in table_to_records(read_stream(path.read_bytes()))
    ]
    told = [e for r in records for e in r.events if e.kind == "guard"]
    assert len(told) == 1
    assert "roll back" in (told[0].detail or "")
    assert "bfloat16 for blocks.0.mlp.down" in (told[0].detail or "")
    assert "likeliest cause scale" in (told[0].detail or "")


def test_advice_changes_nothing(tmp_path: Path) -> None:
    config = debug_cpu()
    result, guarded = run(config, tmp_path, Alarm(13), policy=replace(POLICY, advise=True))
    assert [s.loss for s in result.steps] == [s.loss for s in train(config).steps]
    assert guarded.guard is not None
    assert any("advice only" in reason for e in guarded.guard.entries for reason in e.left_out)


def test_a_scorer_that_raises_or_hangs_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.monitor.containment._UNDER_TEST", False)
    config = debug_cpu()

    def broken(record: StepRecord) -> Risk:
        raise RuntimeError("no model")

    result, guarded = run(config, tmp_path, broken)
    assert [s.loss for s in result.steps] == [s.loss for s in train(config).steps]
    assert guarded.guard is not None
    assert guarded.guard.errors == config.steps
    assert guarded.guard.entries == []


def test_a_guard_that_breaks_lets_the_run_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreshock.monitor.containment._UNDER_TEST", False)
    monkeypatch.setattr("foreshock.monitor.guard.runtime.decide", lambda *_: 1 / 0)
    config = debug_cpu()
    result, guarded = run(config, tmp_path, Alarm(5))
    assert [s.loss for s in result.steps] == [s.loss for s in train(config).steps]
    assert guarded.guard is not None
    assert guarded.guard.errors > 0


def _one_of_two(rank: int, folder: str) -> None:
    """A process of the next test."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    config = debug_cpu()
    # Rank 1 has a scorer that would never act: it must follow rank 0 all the same.
    guarded = Guarded(Alarm(13 if rank == 0 else 10**9), POLICY, patience=20.0)
    watch = watched(config, spool=Path(folder) / "spool", sinks=[guarded.sink])
    result = train(config, watch=watch, overseer=guarded)
    seen = {"steps": [s.step for s in result.steps], "losses": [s.loss for s in result.steps]}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))


@pytest.mark.long
def test_two_processes_go_back_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one["steps"] != sorted(set(one["steps"]))
    assert one["steps"][-1] == debug_cpu().steps - 1
