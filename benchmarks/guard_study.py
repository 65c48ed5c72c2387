"""What a guard is worth: the same runs with no guard, with a naive rule, with the guard.

    python -m benchmarks.guard_study --out guard.json [--seconds 280] [--processes 16]
    python -m benchmarks.guard_study --report docs/results/guard.json

Every subject is one run that is broken in some way (or is healthy) and its healthy twin. The naive
rule rolls back to the newest snapshot, and skips the data, whenever the loss stands six standard
deviations over the mean of the last 128 (OLMo-core's spike rule). A run is lost if it ends without
a finite loss or more than 0.25 nat above its twin without a guard; saved if it then ends within
0.05 nat of it. Losses are of held-out text after the last step. Seeds of the study stand at and
above 7 * 2^40; those that the guard's rules were made with (`--development`) at and above 5 * 2^40;
neither where a corpus or a demonstration has any, and that no subject was fitted on is checked as
well. (The first published study had 3 * 2^40, and has been looked at.)
Results are kept subject by subject, and a second call with the same --out goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.guard_report import GROUPS, STEPS, report

SEEDS: Final = 7 << 40
DEVELOPMENT_SEEDS: Final = 5 << 40
HARD: Final = ("plain", "warm-up", "decay", "data switch", "batch ramp", "plateau", "noisy")
ARMS: Final = ("twin", "off", "naive", "guard")


def subject(number: int, seeds: int = SEEDS) -> tuple[str, Any, Any]:
    """Group, configuration and healthy twin of one subject; the healthy are their own twins."""
    from foreshock.trainer.config import (
        DataConfig,
        EvaluationConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        RunConfig,
        ScheduleConfig,
    )

    random = np.random.Generator(np.random.Philox(key=[number, seeds]))
    group = GROUPS[number % len(GROUPS)]
    twin = RunConfig(
        name=f"guard-{number}",
        model=ModelConfig(
            architecture=("llama3", "fog_max")[number // 5 % 2], width=48, layers=3, heads=3
        ),
        precision=PrecisionConfig(
            backend="emulated", scaling=("delayed", "current")[number // 10 % 2], history=16
        ),
        optimizer=OptimizerConfig(
            learning_rate=float(np.exp(random.uniform(math.log(1e-3), math.log(4e-3)))),
            clip=(1.0, None)[int(random.integers(2))],
            beta2=(0.95, 0.99, 0.999)[int(random.integers(3))],
        ),
        schedule=ScheduleConfig(warmup_steps=int(random.integers(20, 60))),
        data=DataConfig(sequence_length=48, batch_size=4, held_out=0.05),
        steps=STEPS,
        seed=seeds + number,
        tensor_every=4,
        evaluation=EvaluationConfig(every=STEPS, batches=24),
    )
    if group == "healthy":
        twin = _hard(HARD[number // len(GROUPS) % len(HARD)], twin, random)
    return group, _broken(group, twin, random), twin


def _hard(what: str, plain: Any, random: np.random.Generator) -> Any:
    """A healthy run of a kind that fools detectors."""
    from foreshock.trainer.config import ScheduleConfig

    at = int(random.integers(120, 220))
    schedule, data, optimizer = plain.schedule, plain.data, plain.optimizer
    if what == "warm-up":
        # The longest steps that are healthy: the highest rate, reached at once and late.
        optimizer = replace(optimizer, learning_rate=4e-3)
        schedule = ScheduleConfig(warmup_steps=(10, 200)[int(random.integers(2))])
    elif what == "decay":
        schedule = replace(schedule, decay_share=float(random.uniform(0.3, 0.8)))
    elif what == "data switch":
        data = replace(data, alternate="docstrings", switch_at=at)
    elif what == "batch ramp":
        data = replace(data, repeats=4, repeats_until=at)
    elif what == "plateau":
        schedule = replace(schedule, drop_at=at, drop_to=float(random.uniform(0.01, 0.1)))
    elif what == "noisy":
        data = replace(data, repeats=4)
    return replace(plain, schedule=schedule, data=data, optimizer=optimizer)


def _broken(group: str, twin: Any, random: np.random.Generator) -> Any:
    from foreshock.trainer.config import ScheduleConfig
    from foreshock.trainer.faults import BadBatch, LearningRateRamp, OutlierRamp, ScaleFault

    start = int(random.integers(120, 220))
    if group == "runaway rate":
        jump = random.uniform() < 0.25
        factor = float(random.uniform(20, 200) if jump else random.uniform(1.02, 1.08))
        ramp = LearningRateRamp(start=start, factor=factor, limit=factor if jump else 1e4)
        return replace(twin, fault=ramp)
    if group == "bad batches":
        kind = ("noise", "constant", "shuffled")[int(random.integers(3))]
        bad = BadBatch(
            start=start,
            duration=int(random.integers(8, 50)),
            kind=kind,  # type: ignore[arg-type]
            gain=float(np.exp(random.uniform(math.log(10), math.log(3000)))),
        )
        return replace(twin, fault=bad, optimizer=replace(twin.optimizer, clip=None, beta2=0.999))
    if group == "scale fault":
        if twin.precision.scaling == "delayed" and random.uniform() < 0.3:
            outlier = OutlierRamp(
                start=start, layer="", channel=int(random.integers(48)), growth=1.12, limit=1e9
            )
            return replace(twin, fault=outlier)
        stale = random.uniform() < 0.5
        roles = ("input", "weight", "grad_output") if stale else ("input",)
        growth = float(random.uniform(1.03, 1.1))
        broken = ScaleFault(start=start, growth=growth, roles=roles, stale_inverse=stale)
        return replace(twin, fault=broken)
    if group == "natural rate":
        low, high = {"llama3": (0.2, 4.0), "fog_max": (0.02, 0.15)}[twin.model.architecture]
        rate = float(np.exp(random.uniform(math.log(low), math.log(high))))
        warmup = (100, 150, 200)[int(random.integers(3))]
        return replace(
            twin,
            optimizer=replace(twin.optimizer, learning_rate=rate),
            schedule=ScheduleConfig(warmup_steps=warmup),
        )
    return twin


class NaiveRule:
    """Six standard deviations over the mean of the last losses: back to the newest snapshot."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        from foreshock.monitor.guard import TorchControls

        self._controls = TorchControls(model, optimizer)
        self._losses: deque[float] = deque(maxlen=128)
        self._newest: int | None = None
        self.latest = math.nan
        self.rollbacks = 0

    def begin(self, step: int) -> None:
        """It keeps nothing before its first snapshot."""

    def attach(self, watcher: object) -> None:
        """It needs no watch."""

    def after(self, next_step: int) -> Any:
        """Judge the newest loss."""
        from foreshock.trainer.loop import GoBack

        if self._spiked(self.latest) and self._newest is not None and self.rollbacks < 8:
            self._controls.restore(self._newest)
            self.rollbacks += 1
            return GoBack(self._newest, next_step - self._newest + 8)
        if math.isfinite(self.latest):
            self._losses.append(self.latest)
        if next_step % 20 == 0:
            if self._newest is not None:
                self._controls.forget(self._newest)
            self._controls.snapshot(next_step)
            self._newest = next_step
        return None

    def close(self) -> None:
        """Let go."""
        self._controls.close()

    def _spiked(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if len(self._losses) < 32:
            return False
        spread = statistics.stdev(self._losses)
        return loss > statistics.fmean(self._losses) + 6 * spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one arm of one subject ended."""

    loss: float | None
    ended: str
    steps: int
    wasted: int
    rollbacks: int = 0
    interventions: int = 0
    failures: int = 0
    first_action: int | None = None
    told: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


def run_arm(arm: str, config: Any) -> Outcome:
    """Train one arm to its end."""
    from foreshock.trainer.loop import train

    if arm != "guard":
        rules: list[NaiveRule] = []

        def make(model: Any, optimizer: Any) -> NaiveRule:
            rules.append(NaiveRule(model, optimizer))
            return rules[0]

        def hear(step: Any) -> None:
            if rules:
                rules[0].latest = step.loss

        result = train(config, on_step=hear, overseer=make if arm == "naive" else None)
        return _outcome(config, result, rollbacks=rules[0].rollbacks if rules else 0)
    return _guarded(config)


def _guarded(config: Any) -> Outcome:
    from foreshock.api.scorer import LocalScorer
    from foreshock.api.suspicion import suspect_of
    from foreshock.monitor.guard import RollBack
    from foreshock.trainer.guarded import Guarded
    from foreshock.trainer.loop import train
    from foreshock.trainer.watched import watched

    guarded = Guarded(LocalScorer(_artifact()), diagnose=suspect_of, patience=5.0)
    with tempfile.TemporaryDirectory() as spool:
        watch = watched(config, spool=Path(spool), sinks=[guarded.sink])
        result = train(config, watch=watch, overseer=guarded)
    guard = guarded.guard
    assert guard is not None
    acted = [e for e in guard.entries if e.done]
    return _outcome(
        config,
        result,
        rollbacks=sum(isinstance(a, RollBack) for e in acted for a in e.done),
        interventions=len(acted),
        failures=guard.errors,
        first_action=acted[0].step if acted else None,
        told=tuple(f"{e.step}: {e}" for e in guard.entries),
    )


def _outcome(config: Any, result: Any, **more: Any) -> Outcome:
    last = result.steps[-1]
    kept = last.step + 1
    finite = last.eval_loss is not None and math.isfinite(last.eval_loss)
    return Outcome(
        loss=last.eval_loss if finite else None,
        ended=result.ended,
        steps=len(result.steps),
        wasted=len(result.steps) - kept,
        **more,
    )


_ARTIFACT: list[Any] = []


def _artifact() -> Any:
    from foreshock.api.artifact import load_shipped

    if not _ARTIFACT:
        _ARTIFACT.append(load_shipped())
    return _ARTIFACT[0]


def run_subject(number: int, seeds: int = SEEDS) -> dict[str, Any]:
    """All arms of one subject."""
    import torch

    torch.set_num_threads(1)
    group, config, twin = subject(number, seeds)
    artifact = _artifact()
    if artifact is None:
        raise SystemExit("no forecaster is installed with the package; `foreshock fit` makes one")
    if any(artifact.trained_on(c.fingerprint()) for c in (config, twin)):
        raise SystemExit(f"subject {number} was fitted on")
    arms: dict[str, dict[str, Any]] = {}
    with _quiet():
        for arm in ARMS:
            began = time.monotonic()
            if arm == "off" and group == "healthy":
                arms[arm] = dict(arms["twin"])
                continue
            outcome = run_arm(arm, twin if arm == "twin" else config)
            arms[arm] = outcome.as_dict() | {"seconds": round(time.monotonic() - began, 1)}
    fault = None if config.fault is None else type(config.fault).__name__
    return {
        "subject": number,
        "group": group,
        "architecture": config.model.architecture,
        "scaling": config.precision.scaling,
        "fault": fault,
        "hard": HARD[number // len(GROUPS) % len(HARD)] if group == "healthy" else None,
        "arms": arms,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    logging.getLogger("foreshock.monitor").setLevel(logging.ERROR)
    yield


# Running.


def digest() -> str:
    """sha256 of the forecaster's file."""
    import hashlib

    from foreshock.api.model_card import SHIPPED

    return hashlib.sha256((SHIPPED / "forecaster.skops").read_bytes()).hexdigest()


def main() -> None:
    """Run what is missing until the time is up, and write JSON and Markdown."""
    given = _arguments()
    if given.report:
        _write(given.report, json.loads(given.report.read_text()))
        return
    document = _begun(given)
    done = {s["subject"] for s in document["subjects"]}
    todo = [n for n in range(given.subjects) if n not in done]
    end = time.monotonic() + given.seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.processes, maxtasksperchild=None) as pool:
        run = functools.partial(run_subject, seeds=document["seeds"])
        results = pool.imap_unordered(run, todo)
        for _ in todo:
            try:
                found = results.next(max(end - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                print("the time is up; the rest is left out", flush=True)
                break
            document["subjects"].append(found)
            document["subjects"].sort(key=lambda s: s["subject"])
            _write(given.out, document)
            _tell(found)
        pool.terminate()
    print(report(document))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/guard.json"))
    parser.add_argument("--subjects", type=int, default=120)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument(
        "--development", action="store_true", help="the seeds that rules were made with"
    )
    parser.add_argument("--device", default="CPU", help="said in the report")
    parser.add_argument("--report", type=Path, help="only write the Markdown of this JSON again")
    return parser.parse_args()


def _begun(given: argparse.Namespace) -> dict[str, Any]:
    seeds = DEVELOPMENT_SEEDS if given.development else SEEDS
    if given.out.exists():
        before: dict[str, Any] = json.loads(given.out.read_text())
        if before["digest"] == digest() and before.get("seeds") == seeds:
            return before
        print("another forecaster or other seeds than in the results so far: all is run again")
    artifact = _artifact()
    return {
        "version": artifact.version,
        "digest": digest(),
        "seeds": seeds,
        "device": given.device,
        "processes": given.processes,
        "command": "python -m benchmarks.guard_study",
        "subjects": [],
    }


def _tell(found: dict[str, Any]) -> None:
    arms = found["arms"]
    losses = " ".join(f"{arm} {arms[arm]['loss'] and round(arms[arm]['loss'], 3)}" for arm in ARMS)
    seconds = sum(arms[arm].get("seconds", 0) for arm in ARMS)
    print(
        f"{found['subject']:3d} {found['group']:13s} {losses} wasted {arms['guard']['wasted']}"
        f" ({seconds:.0f} s)",
        flush=True,
    )


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)
    path.with_suffix(".md").write_text(report(document))


if __name__ == "__main__":
    main()
