"""What a guard is worth: the same runs with no guard, with a naive rule, with the guard.

    python -m benchmarks.guard_study --out guard.json [--seconds 280] [--processes 16]
    python -m benchmarks.guard_study --report docs/results/guard.json

Every subject is one run that is broken in some way (or is healthy) and its healthy twin. The naive
rule rolls back to the newest snapshot, and skips the data, whenever the loss stands six standard
deviations over the mean of the last 128 (OLMo-core's spike rule). A run is lost if it ends without
a finite loss or more than 0.25 nat above its twin without a guard; saved if it then ends within
0.05 nat of it. Losses are of held-out text after the last step. Seeds stand at and above 3 * 2^40,
where no corpus and no demonstration has any; that no subject was fitted on is checked as well.
Results are kept subject by subject, and a second call with the same --out goes on.
"""

from __future__ import annotations

import argparse
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

SEEDS: Final = 3 << 40
GROUPS: Final = ("runaway rate", "bad batches", "scale fault", "natural rate", "healthy")
ARMS: Final = ("twin", "off", "naive", "guard")
STEPS: Final = 400
LOST: Final = 0.25
SAVED: Final = 0.05


def subject(number: int) -> tuple[str, Any, Any]:
    """Group, configuration and healthy twin of one subject."""
    from foreshock.trainer.config import (
        DataConfig,
        EvaluationConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        RunConfig,
        ScheduleConfig,
    )

    random = np.random.Generator(np.random.Philox(key=[number, SEEDS]))
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
        seed=SEEDS + number,
        tensor_every=4,
        evaluation=EvaluationConfig(every=STEPS, batches=24),
    )
    return group, _broken(group, twin, random), twin


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


def run_subject(number: int) -> dict[str, Any]:
    """All arms of one subject."""
    import torch

    torch.set_num_threads(1)
    group, config, twin = subject(number)
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
        "arms": arms,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    logging.getLogger("foreshock.monitor").setLevel(logging.ERROR)
    yield


# Judging.


def lost(found: dict[str, Any]) -> bool:
    """Whether the run is lost without a guard."""
    twin, off = (found["arms"][arm]["loss"] for arm in ("twin", "off"))
    return off is None or off > twin + LOST


def saved(found: dict[str, Any], arm: str) -> bool:
    """Whether an arm ends as well as the twin."""
    loss, twin = found["arms"][arm]["loss"], found["arms"]["twin"]["loss"]
    return loss is not None and loss <= twin + SAVED


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def report(document: dict[str, Any]) -> str:
    """The study in Markdown."""
    subjects = document["subjects"]
    lines = [
        "# Guard study",
        "",
        f"{len(subjects)} subjects of {STEPS} steps, seeds from 3 * 2^40 on, none fitted on."
        f" Forecaster {document['version']}, sha256 of its file {document['digest'][:16]}."
        f" `{document['command']}`, {document['processes']} processes, {document['device']}.",
        "",
        "A run is lost if without a guard it ends non-finite or more than"
        f" {LOST} nat over its healthy twin (held-out loss); saved if it ends within {SAVED} nat of"
        " it, or below. The twin of a rate that is too high by nature has a calm rate. In brackets"
        " 95 % intervals (Wilson).",
        "",
        "| group | lost without | saved by the naive rule | saved by the guard"
        " | median gap to the twin: off, naive, guard | median steps wasted: naive, guard |",
        "|---|---|---|---|---|---|",
    ]
    for group in (*GROUPS[:-1], "all"):
        mine = [s for s in subjects if s["group"] != "healthy" and group in (s["group"], "all")]
        bad = [s for s in mine if lost(s)]
        lines.append(_row(group, len(mine), bad))
    lines += ["", *_harm(subjects), "", *_rest(subjects), ""]
    return "\n".join(lines)


def _row(group: str, count: int, bad: list[dict[str, Any]]) -> str:
    shares = []
    for arm in ("naive", "guard"):
        hits = sum(saved(s, arm) for s in bad)
        low, high = wilson(hits, len(bad))
        text = f"{hits / len(bad):.0%} [{low:.0%}, {high:.0%}]" if bad else "-"
        shares.append(f"{hits}: {text}")
    gaps = ", ".join(_median_gap(bad, arm) for arm in ("off", "naive", "guard"))
    waste = ", ".join(
        f"{statistics.median(s['arms'][arm]['wasted'] for s in bad):g}" if bad else "-"
        for arm in ("naive", "guard")
    )
    return f"| {group} | {len(bad)} of {count} | {shares[0]} | {shares[1]} | {gaps} | {waste} |"


def _median_gap(bad: list[dict[str, Any]], arm: str) -> str:
    if not bad:
        return "-"
    gaps = [
        math.inf
        if s["arms"][arm]["loss"] is None
        else s["arms"][arm]["loss"] - s["arms"]["twin"]["loss"]
        for s in bad
    ]
    return f"{statistics.median(gaps):.3f}"


def _harm(subjects: list[dict[str, Any]]) -> list[str]:
    healthy = [s for s in subjects if s["group"] == "healthy"]
    if not healthy:
        return ["No healthy run was finished."]
    lines = [
        "| healthy runs | extra steps | touched | mean gap to the twin | worst gap |",
        "|---|---|---|---|---|",
    ]
    for arm in ("naive", "guard"):
        extra = sum(s["arms"][arm]["wasted"] for s in healthy) / (STEPS * len(healthy))
        touched = sum(
            bool(s["arms"][arm]["rollbacks"] or s["arms"][arm]["interventions"]) for s in healthy
        )
        gaps = [(s["arms"][arm]["loss"] or math.inf) - s["arms"]["twin"]["loss"] for s in healthy]
        lines.append(
            f"| {arm} | {extra:.1%} | {touched} of {len(healthy)} |"
            f" {statistics.fmean(gaps):+.4f} | {max(gaps):+.4f} |"
        )
    return lines


def _rest(subjects: list[dict[str, Any]]) -> list[str]:
    mild = [s for s in subjects if s["group"] != "healthy" and not lost(s)]
    worse = [
        s["subject"]
        for s in mild
        if s["arms"]["guard"]["loss"] is None
        or s["arms"]["guard"]["loss"] - SAVED
        > max(s["arms"]["off"]["loss"], s["arms"]["twin"]["loss"])
    ]
    missed = [s["subject"] for s in subjects if lost(s) and not saved(s, "guard")]
    failures = sum(s["arms"]["guard"]["failures"] for s in subjects)
    return [
        f"Of {len(mild)} broken runs that get over it by themselves the guard made {len(worse)}"
        f" worse by more than {SAVED} nat ({worse}). Lost with the guard: {missed}. Failures inside"
        f" the guard: {failures}.",
    ]


# Running.


def digest() -> str:
    """sha256 of the forecaster's file."""
    import hashlib

    from foreshock.api.model_card import SHIPPED

    return hashlib.sha256((SHIPPED / "forecaster.skops").read_bytes()).hexdigest()


def main() -> None:
    """Run what is missing until the time is up, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/guard.json"))
    parser.add_argument("--subjects", type=int, default=120)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--device", default="CPU", help="said in the report")
    parser.add_argument("--report", type=Path, help="only write the Markdown of this JSON again")
    given = parser.parse_args()
    if given.report:
        _write(given.report, json.loads(given.report.read_text()))
        return
    document = _begun(given)
    done = {s["subject"] for s in document["subjects"]}
    todo = [n for n in range(given.subjects) if n not in done]
    end = time.monotonic() + given.seconds
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.processes, maxtasksperchild=None) as pool:
        results = pool.imap_unordered(run_subject, todo)
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


def _begun(given: argparse.Namespace) -> dict[str, Any]:
    if given.out.exists():
        before: dict[str, Any] = json.loads(given.out.read_text())
        if before["digest"] == digest():
            return before
        print("another forecaster than in the results so far: all is run again")
    artifact = _artifact()
    return {
        "version": artifact.version,
        "digest": digest(),
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
