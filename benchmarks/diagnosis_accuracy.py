"""How often the diagnosis names the cause, and the layer: runs with injected faults, and without.

    python -m benchmarks.diagnosis_runs --range look --out build/diagnosis/look
    python -m benchmarks.diagnosis_accuracy --runs build/diagnosis/look --fit
    python -m benchmarks.diagnosis_runs --range judge --out build/diagnosis/judge
    python -m benchmarks.diagnosis_accuracy --runs build/diagnosis/judge \
        --out docs/results/diagnosis.json
    python -m benchmarks.diagnosis_accuracy --report docs/results/diagnosis.json

Every run is asked about once: at the first alarm (forecast or detection) after its fault began, and
without an alarm 60 steps after that. A first cause of "unknown", or one below half, is an
abstention, which is the right answer where nothing is broken. Localisation: the first layers named
are among those hit, for faults that hit some layers only. Rules and weights are made on the range
"look"; "judge" is for figures.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.diagnosis_runs import CAUSE_OF, RANGES, Kept, kept
from benchmarks.guard_report import wilson
from benchmarks.guard_study import digest
from foreshock.api.diagnosis_odds import CAUSES

_LOOKS_BACK: Final = 256
_WITHOUT_ALARM: Final = 60


def window_of(run: Kept, last: int) -> Any:
    """The latest records of a run as of a step, as the service diagnoses them."""
    from foreshock.api.diagnosis import RunWindow

    span = slice(max(0, last + 1 - _LOOKS_BACK), last + 1)
    return RunWindow(
        steps=np.arange(span.start, span.stop, dtype=np.int64),
        scalars={name: _finite(values[span]) for name, values in run.scalars.items()},
        identities=run.identities,
        statistics={name: values[span] for name, values in run.statistics.items()},
        events=tuple(e for e in run.subject.events if span.start <= e[0] < span.stop),
    )


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(np.isfinite(values), values, np.nan)


def first_alarm(run: Kept) -> tuple[int, str] | None:
    """Step and kind of the first alarm of the shipped forecaster from the start of the fault on."""
    from foreshock.api.scorer import LocalScorer
    from foreshock.monitor.record import Event

    scorer = LocalScorer()
    events = dict(run.subject.events)
    measured = np.isfinite(run.statistics["rms"]).any(axis=1)
    for step in range(len(measured)):
        risk = scorer.score(
            step=step,
            scalars={name: float(values[step]) for name, values in run.scalars.items()},
            events=(Event(kind=events[step]),) if step in events else (),
            identities=run.identities if measured[step] else None,
            statistics={name: values[step] for name, values in run.statistics.items()}
            if measured[step]
            else None,
        )
        if step >= run.subject.start and risk.state == "firing":
            return step, str(risk.kind)
    return None


def judged(run: Kept, alarm: tuple[int, str] | None) -> dict[str, Any]:
    """What the diagnosis says of a run, beside what is true."""
    from foreshock.api.diagnosis import diagnose
    from foreshock.api.diagnosis_rules import findings_of

    subject = run.subject
    asked = subject.start + _WITHOUT_ALARM if alarm is None else alarm[0]
    window = window_of(run, asked)
    causes = diagnose(window)
    right = [cause for cause in causes if cause.name == subject.cause]
    # A natural failure has no first step.
    timed = right and subject.cause != "unknown" and subject.family != "natural rate"
    since = right[0].since_step if timed else None
    layers = {identity.layer for identity in run.identities}
    hit = subject.hit(sorted(layers))
    return {
        "run": subject.name,
        "family": subject.family,
        "cause": subject.cause,
        "architecture": subject.config.model.architecture,
        "cadence": subject.config.tensor_every,
        "alarm": None if alarm is None else alarm[1],
        "asked": asked,
        "start": subject.start,
        "named": [cause.name for cause in causes],
        "probabilities": [cause.probability for cause in causes],
        "strengths": {f.name: round(f.strength, 3) for f in findings_of(window)[0]},
        "layers": list(right[0].layers) if right else [],
        "hit": sorted(hit),
        "chance": len(hit) / len(layers),
        "timed": bool(timed),
        "since": since,
        "evidence": causes[0].evidence if causes else "",
    }


def runs_of(folder: Path, seeds: int, stacks: Sequence[int]) -> Iterator[Kept]:
    """All runs of some stacks.

    Raises:
        FileNotFoundError: A stack has not been trained.
    """
    for number in stacks:
        yield from kept(number, seeds, folder / f"{number}.npz")


def judge(folder: Path, seeds: int, stacks: Sequence[int]) -> list[dict[str, Any]]:
    """Ask about every run of some stacks; alarms are looked up once and kept beside them."""
    remembered = folder / f"alarms-{digest()[:12]}.json"
    alarms = json.loads(remembered.read_text()) if remembered.exists() else {}
    found = []
    for run in runs_of(folder, seeds, stacks):
        name = run.subject.name
        if name not in alarms:
            alarms[name] = first_alarm(run)
        alarm = alarms[name]
        found.append(judged(run, None if alarm is None else (alarm[0], alarm[1])))
    remembered.write_text(json.dumps(alarms))
    return found


# Judging.


def first(found: dict[str, Any]) -> str:
    """The cause given first; unknown where it abstains."""
    if not found["named"] or found["probabilities"][0] < 0.5:
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
    broken = [s for s in subjects if s["cause"] != "unknown"]
    calm = [s for s in subjects if s["cause"] == "unknown"]
    groups = {
        "at an alarm": [s for s in broken if s["alarm"]],
        "without an alarm": [s for s in broken if not s["alarm"]],
        "all broken": broken,
    }
    lines = [
        "| broken runs, asked | runs | top-1 | top-1 of those not abstained | top-3 | abstained |",
        "|---|---|---|---|---|---|",
        *(_row(name, mine) for name, mine in groups.items()),
        "",
        f"Nothing broken: {len(calm)} runs, abstained {_abstained(calm)}; of them with an alarm"
        f" {sum(bool(s['alarm']) for s in calm)}, abstained"
        f" {_abstained([s for s in calm if s['alarm']])}.",
        "",
        "True cause (rows) and cause named (columns), all runs; the last column is abstention:",
        "",
        "| | " + " | ".join(CAUSES) + " |",
        "|---" * (len(CAUSES) + 1) + "|",
    ]
    for cause in CAUSES:
        named = Counter(first(s) for s in subjects if s["cause"] == cause)
        lines.append(f"| {cause} | " + " | ".join(str(named[c]) for c in CAUSES) + " |")
    lines += ["", *_families(subjects), "", *_layers(subjects), "", *_since(subjects), ""]
    return "\n".join([*lines, *_reliability(subjects), ""])


def _abstained(mine: Sequence[dict[str, Any]]) -> str:
    return share(sum(first(s) == "unknown" for s in mine), len(mine))


def _row(name: str, mine: list[dict[str, Any]]) -> str:
    said = [s for s in mine if first(s) != "unknown"]
    right = sum(first(s) == s["cause"] for s in mine)
    three = sum(s["cause"] in s["named"][:3] for s in mine)
    return (
        f"| {name} | {len(mine)} | {share(right, len(mine))} | {share(right, len(said))} |"
        f" {share(three, len(mine))} | {_abstained(mine)} |"
    )


def _families(subjects: list[dict[str, Any]]) -> list[str]:
    lines = ["| family | runs | with an alarm | right | abstained |", "|---|---|---|---|---|"]
    for family in CAUSE_OF:
        mine = [s for s in subjects if s["family"] == family]
        if mine:
            right = sum(first(s) == s["cause"] for s in mine)
            said = sum(first(s) == "unknown" for s in mine)
            alarms = sum(bool(s["alarm"]) for s in mine)
            lines.append(f"| {family} | {len(mine)} | {alarms} | {right} | {said} |")
    return lines


def _layers(subjects: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| layers, where some were hit | runs | first named is hit | one of three named is hit"
        " | the same by chance |",
        "|---|---|---|---|---|",
    ]
    local = [s for s in subjects if s["hit"]]
    named = [s for s in local if first(s) == s["cause"]]
    for text, mine in (("all", local), ("cause named rightly", named)):
        one = sum(bool(set(s["layers"][:1]) & set(s["hit"])) for s in mine)
        three = sum(bool(set(s["layers"][:3]) & set(s["hit"])) for s in mine)
        chance = np.mean([s["chance"] for s in mine]) if mine else 0
        lines.append(
            f"| {text} | {len(mine)} | {share(one, len(mine))} | {share(three, len(mine))}"
            f" | {chance:.0%} |"
        )
    return lines


def _since(subjects: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| since when, cause named rightly | runs | answered | median error, steps"
        " | median size of it | within 8 steps |",
        "|---|---|---|---|---|---|",
    ]
    right = [s for s in subjects if s["timed"] and first(s) == s["cause"]]
    for cause in (*CAUSES[:-1], "all"):
        mine = [s for s in right if cause in (s["cause"], "all")]
        errors = np.array([s["since"] - s["start"] for s in mine if s["since"] is not None])
        if errors.size:
            lines.append(
                f"| {cause} | {len(mine)} | {errors.size} | {np.median(errors):+.0f}"
                f" | {np.median(np.abs(errors)):.0f} |"
                f" {share(int((np.abs(errors) <= 8).sum()), errors.size)} |"
            )
    return lines


def _reliability(subjects: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| probability of the first cause | runs | mean | right |",
        "|---|---|---|---|",
    ]
    for low, high in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 0.97), (0.97, 1.01)):
        some = [s for s in subjects if s["named"] and low <= s["probabilities"][0] < high]
        right = sum(s["named"][0] == s["cause"] for s in some)
        mean = np.mean([s["probabilities"][0] for s in some]) if some else 0
        lines.append(
            f"| {low:g} to {min(high, 1):g} | {len(some)} | {mean:.2f}"
            f" | {share(right, len(some))} |"
        )
    losses, briers = [], []
    for s in subjects:
        chances = dict(zip(s["named"], s["probabilities"], strict=True))
        losses.append(-np.log(max(chances.get(s["cause"], 0.0), 1e-4)))
        briers.append(sum((p - (n == s["cause"])) ** 2 for n, p in chances.items()))
    lines += [
        "",
        f"Mean negative log-likelihood of the true cause {np.mean(losses):.2f} nats"
        f" ({np.log(len(CAUSES)):.2f} for a guess), multiclass Brier score {np.mean(briers):.2f}.",
    ]
    return lines


def main() -> None:
    """Judge the runs of a folder, fit the weights on them, or write the report again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--range", choices=sorted(RANGES), help="default: the folder's name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stacks", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--fit", action="store_true", help="write the weights of the rules")
    parser.add_argument("--report", type=Path, help="only write the Markdown of this JSON again")
    given = parser.parse_args()
    if given.report:
        print(report(json.loads(given.report.read_text())))
        return
    seeds = given.range or given.runs.name
    subjects = judge(given.runs, RANGES[seeds], given.stacks)
    if given.fit:
        from benchmarks.diagnosis_fit import write_weights

        write_weights(subjects, f"{seeds}: {RANGES[seeds]} and on", given.stacks)
        print("written; what follows is of the weights before")
    document = {"digest": digest(), "range": seeds, "stacks": given.stacks, "subjects": subjects}
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(report(document))


if __name__ == "__main__":
    main()
