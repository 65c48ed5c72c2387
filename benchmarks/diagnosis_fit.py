"""What the rules of the diagnosis are worth, fitted on runs whose cause is known.

One slope for all rules and a bias for each, by regularised maximum likelihood: few numbers, since
the runs are few. `benchmarks.diagnosis_accuracy --fit` calls it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from foreshock.api.diagnosis_odds import CAUSES

__all__ = ["WEIGHTS", "fitted", "write_weights"]

WEIGHTS: Final = Path("api/foreshock/api/artifacts/diagnosis_odds.json")
_PENALTY: Final = 0.1
"""On squared biases, and on the squared log of the slope, per cause: one run's worth or so."""

FloatArray = npt.NDArray[np.float64]


def fitted(
    strengths: Sequence[Mapping[str, float]], causes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Slope and bias of every cause.

    Args:
        strengths: Of every run, cause to strength; "unknown" is left out and has 0.
        causes: The true one of every run. A cause that no run has gets the mean bias of the others.
    """
    known: list[str] = [name for name in CAUSES if name in set(causes) and name != "unknown"]
    table = np.array([[run[name] for name in known] for run in strengths])
    truth = np.array([known.index(c) if c in known else len(known) for c in causes])

    def loss(values: FloatArray) -> float:
        slope, biases = np.exp(values[0]), values[1:]
        logits = np.column_stack((slope * table + biases, np.zeros(len(table))))
        highest = logits.max(axis=1)
        sums = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
        likelihood = logits[np.arange(len(truth)), truth] - sums
        return float(-likelihood.sum() + _PENALTY * np.square(values).sum())

    best = minimize(loss, np.zeros(len(known) + 1), method="BFGS").x
    slope = float(np.exp(best[0]))
    biases: dict[str, float] = dict(zip(known, map(float, best[1:]), strict=True))
    other = float(np.mean(best[1:]))
    return {
        name: {"slope": 0.0, "bias": 0.0}
        if name == "unknown"
        else {"slope": round(slope, 3), "bias": round(biases.get(name, other), 3)}
        for name in CAUSES
    }


def write_weights(subjects: Sequence[Mapping[str, Any]], seeds: str, stacks: Sequence[int]) -> None:
    """Fit, and write what the diagnosis reads.

    Args:
        subjects: As `benchmarks.diagnosis_accuracy.judge` gives them.
        seeds: Which range of seeds they are from.
        stacks: Which stacks of it.
    """
    numbers = " ".join(map(str, stacks))
    strengths, causes = [s["strengths"] for s in subjects], [s["cause"] for s in subjects]
    counts = {name: causes.count(name) for name in CAUSES}
    runs = json.dumps([[s["run"], s["cause"]] for s in subjects]).encode()
    document = {
        "provenance": {
            "commands": [
                "python -m benchmarks.diagnosis_runs --range look --out build/diagnosis/look"
                f" --stacks {numbers}",
                "python -m benchmarks.diagnosis_accuracy --runs build/diagnosis/look --fit"
                f" --stacks {numbers}",
            ],
            "seeds": seeds,
            "runs": len(subjects),
            "runs_of_cause": counts,
            "runs_sha256": hashlib.sha256(runs).hexdigest(),
            "not_fitted": [name for name in CAUSES if not counts[name]],
        },
        "weights": fitted(strengths, causes),
    }
    WEIGHTS.write_text(json.dumps(document, indent=1) + "\n")
