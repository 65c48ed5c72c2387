"""How often the diagnosis names the cause: held-out runs with injected faults.

    python -m benchmarks.diagnosis_accuracy --out diagnosis.json [--seconds 150] [--processes 16]
    python -m benchmarks.diagnosis_accuracy --report docs/results/diagnosis.json

Each subject is one run with a fault at a random step, of a random size, in random layers, with a
seed at and above 5 * 2^40, where no corpus, demonstration or guard study has any. It is asked for
causes once at the first alarm of the shipped forecaster (a forecast or a detection); a run without
an alarm is asked 60 steps after its fault began, and counted apart. A first cause of "unknown", or
one below half, is an abstention. Localisation: the first layer named is one of those hit, for
faults that hit some layers only.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.guard_study import digest, wilson

SEEDS: Final = 5 << 40
KINDS: Final = ("learning_rate", "scale", "outlier", "bad_data", "underflow")
CAUSES: Final = (*KINDS, "unknown")
STEPS: Final = 360
_UNDECIDED: Final = 0.5


def subject(number: int) -> tuple[str, Any, int]:
    """Cause, configuration and first step of the fault."""
    from foreshock.trainer.config import (
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        RunConfig,
        ScheduleConfig,
    )

    random = np.random.Generator(np.random.Philox(key=[number, SEEDS]))
    cause = KINDS[number % len(KINDS)]
    delayed = cause == "outlier" or random.uniform() < 0.5
    config = RunConfig(
        name=f"diagnosis-{number}",
        model=ModelConfig(
            architecture=("llama3", "fog_max")[number // 5 % 2], width=48, layers=3, heads=3
        ),
        precision=PrecisionConfig(
            backend="emulated", scaling="delayed" if delayed else "current", history=16
        ),
        optimizer=OptimizerConfig(
            learning_rate=float(np.exp(random.uniform(math.log(1e-3), math.log(4e-3)))),
            beta2=(0.95, 0.99, 0.999)[int(random.integers(3))],
        ),
        schedule=ScheduleConfig(warmup_steps=int(random.integers(20, 60))),
        data=DataConfig(sequence_length=48, batch_size=4),
        steps=STEPS,
        seed=SEEDS + number,
        tensor_every=4,
    )
    start = int(random.integers(130, 220))
    return cause, replace(config, **_fault(cause, start, config, random)), start


def _fault(cause: str, start: int, config: Any, random: np.random.Generator) -> dict[str, Any]:
    from foreshock.trainer.faults import BadBatch, LearningRateRamp, OutlierRamp, ScaleFault

    block = f"blocks.{random.integers(config.model.layers)}."
    where = ("", block, f"{block}mlp.")[int(random.integers(3))]
    if cause == "learning_rate":
        factor = float(random.uniform(1.02, 1.1))
        return {"fault": LearningRateRamp(start=start, factor=factor, limit=1e4)}
    if cause == "bad_data":
        bad = BadBatch(
            start=start,
            duration=int(random.integers(8, 40)),
            kind=("noise", "constant", "shuffled")[int(random.integers(3))],
            gain=float(np.exp(random.uniform(0, math.log(300)))),
        )
        return {"fault": bad}
    if cause == "outlier":
        ramp = OutlierRamp(
            start=start,
            layer=where,
            channel=int(random.integers(48)),
            growth=float(random.uniform(1.08, 1.2)),
            limit=1e9,
        )
        return {"fault": ramp}
    roles = (("input",), ("weight",), ("input", "weight", "grad_output"))[int(random.integers(3))]
    if cause == "underflow":
        growth, roles = float(random.uniform(0.85, 0.95)), ("grad_output",)
    else:
        growth = float(random.uniform(1.03, 1.15))
    return {"fault": ScaleFault(start=start, growth=growth, roles=roles, layers=where)}


def run_subject(number: int) -> dict[str, Any]:
    """Train one run until it is asked about, and ask."""
    from foreshock.api.diagnosis import diagnose
    from foreshock.api.run_window import run_window
    from foreshock.monitor.record import records_to_table

    cause, config, start = subject(number)
    began = time.monotonic()
    records, alarm = _recorded(config, start)
    asked = start + 60 if alarm is None else alarm[0] + 4
    window = run_window(records_to_table([r for r in records if r.step <= asked][-300:]))
    causes = diagnose(window)
    layers = {i.layer for i in window.identities}
    hit = {layer for layer in layers if _hits(config.fault, layer)}
    return {
        "subject": number,
        "cause": cause,
        "alarm": None if alarm is None else alarm[1],
        "after": asked - start,
        "named": [c.name for c in causes],
        "probabilities": [c.probability for c in causes],
        "layers": list(causes[0].layers) if causes else [],
        "hit": sorted(hit) if hit != layers else [],
        "seconds": round(time.monotonic() - began, 1),
    }


def _recorded(config: Any, start: int) -> tuple[list[Any], tuple[int, str | None] | None]:
    """Records of a run up to a little after its first alarm, and that alarm."""
    import logging

    import torch

    from foreshock.api.artifact import load_shipped
    from foreshock.api.scorer import LocalScorer
    from foreshock.monitor.sinks import StepRecordSink
    from foreshock.trainer.loop import train
    from foreshock.trainer.watched import watched

    torch.set_num_threads(1)
    logging.getLogger("foreshock.monitor").setLevel(logging.ERROR)
    artifact = load_shipped()
    assert artifact is not None
    if artifact.trained_on(config.fingerprint()):
        raise SystemExit(f"{config.name} was fitted on")
    scorer = LocalScorer(artifact)
    records: list[Any] = []
    alarms: list[tuple[int, str | None]] = []

    def hear(record: Any) -> None:
        records.append(record)
        risk = scorer(record)
        if risk.state == "firing" and record.step >= start:
            alarms.append((record.step, risk.kind))

    def enough() -> bool:
        if not records:
            return False
        return bool(records[-1].step >= (alarms[0][0] + 6 if alarms else start + 120))

    with tempfile.TemporaryDirectory() as spool:
        watch = watched(config, spool=Path(spool), sinks=[StepRecordSink(hear)])
        train(config, watch=watch, stop=enough)
    return records, alarms[0] if alarms else None


def _hits(fault: Any, layer: str) -> bool:
    from foreshock.trainer.faults import OutlierRamp, ScaleFault

    if isinstance(fault, ScaleFault):
        return fault.layers in layer
    return isinstance(fault, OutlierRamp) and fault.hits(layer)


# Judging.


def first(found: dict[str, Any]) -> str:
    """The cause given first; unknown where it abstains."""
    if not found["named"] or found["probabilities"][0] < _UNDECIDED:
        return "unknown"
    return str(found["named"][0])


def share(hits: int, count: int) -> str:
    """Share with its interval."""
    if not count:
        return "-"
    low, high = wilson(hits, count)
    return f"{hits / count:.0%} [{low:.0%}, {high:.0%}]"


def report(document: dict[str, Any]) -> str:
    """The measurement in Markdown."""
    subjects = document["subjects"]
    lines = [
        "# Diagnosis",
        "",
        f"{len(subjects)} held-out runs with injected faults, seeds from 5 * 2^40 on."
        f" `python -m benchmarks.diagnosis_accuracy`, {document['device']}; alarms by the"
        f" forecaster {document['version']}, sha256 {document['digest'][:16]}. In brackets 95 %"
        " intervals (Wilson). Asked at the first alarm; without one, 60 steps after the fault"
        " began. A first cause below one half counts as an abstention.",
        "",
        "| asked | runs | top-1 | top-1 of those not abstained | top-3 | abstained"
        " | first layer hit |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = {
        "at an alarm": [s for s in subjects if s["alarm"]],
        "without an alarm": [s for s in subjects if not s["alarm"]],
        "all": subjects,
    }
    lines += [_row(name, mine) for name, mine in groups.items()]
    lines += ["", "True cause (rows) and cause named (columns), at an alarm:", ""]
    lines += ["| | " + " | ".join(CAUSES) + " |", "|---" * (len(CAUSES) + 1) + "|"]
    for cause in KINDS:
        named = Counter(first(s) for s in groups["at an alarm"] if s["cause"] == cause)
        lines.append(f"| {cause} | " + " | ".join(str(named[c]) for c in CAUSES) + " |")
    lines += ["", *_calibration(groups["at an alarm"]), ""]
    return "\n".join(lines)


def _row(name: str, mine: list[dict[str, Any]]) -> str:
    said = [s for s in mine if first(s) != "unknown"]
    right = sum(first(s) == s["cause"] for s in mine)
    three = sum(s["cause"] in s["named"][:3] for s in mine)
    local = [s for s in mine if s["hit"]]
    found = sum(bool(s["layers"]) and s["layers"][0] in s["hit"] for s in local)
    return (
        f"| {name} | {len(mine)} | {share(right, len(mine))} | {share(right, len(said))} |"
        f" {share(three, len(mine))} | {share(len(mine) - len(said), len(mine))} |"
        f" {share(found, len(local))} |"
    )


def _calibration(mine: list[dict[str, Any]]) -> list[str]:
    lines = ["| probability of the first cause | runs | right |", "|---|---|---|"]
    for low, high in ((0.0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01)):
        some = [s for s in mine if s["named"] and low <= s["probabilities"][0] < high]
        right = sum(s["named"][0] == s["cause"] for s in some)
        lines.append(f"| {low:g} to {min(high, 1):g} | {len(some)} | {share(right, len(some))} |")
    return lines


def main() -> None:
    """Run what is missing until the time is up, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/diagnosis.json"))
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--device", default="CPU", help="said in the report")
    parser.add_argument("--report", type=Path, help="only write the Markdown of this JSON again")
    given = parser.parse_args()
    if given.report:
        _write(given.report, json.loads(given.report.read_text()))
        return
    document = _begun(given.out, given.device)
    done = {s["subject"] for s in document["subjects"]}
    todo = [n for n in range(given.subjects) if n not in done]
    end = time.monotonic() + given.seconds
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
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
            print(
                found["subject"],
                found["cause"],
                found["alarm"],
                found["after"],
                first(found),
                found["layers"][:1],
                f"{found['seconds']} s",
                flush=True,
            )
        pool.terminate()
    print(report(document))


def _begun(path: Path, device: str) -> dict[str, Any]:
    """What is there of the same forecaster, or an empty document."""
    from foreshock.api.artifact import load_shipped

    artifact = load_shipped()
    if artifact is None:
        raise SystemExit("no forecaster is installed with the package; `foreshock fit` makes one")
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        if before["digest"] == digest():
            return before
    return {"version": artifact.version, "digest": digest(), "device": device, "subjects": []}


def _write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    part.replace(path)
    path.with_suffix(".md").write_text(report(document))


if __name__ == "__main__":
    main()
