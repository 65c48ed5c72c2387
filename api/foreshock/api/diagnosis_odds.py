"""What the strength of a case is worth: from rules to probabilities.

A multinomial logit over causes, fitted on runs whose cause is known (`benchmarks.
diagnosis_accuracy --fit`); the weights and where they come from stand in `diagnosis_odds.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final

__all__ = ["CAUSES", "provenance", "shares"]

CAUSES: Final = (
    "learning_rate",
    "scale",
    "underflow",
    "outlier",
    "bad_data",
    "optimizer_state",
    "attention",
    "unknown",
)


@cache
def _document() -> dict[str, Any]:
    found = files("foreshock.api").joinpath("artifacts/diagnosis_odds.json")
    document: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return document


def provenance() -> Mapping[str, Any]:
    """Which runs the weights were fitted on, and how."""
    return dict(_document()["provenance"])


def shares(strengths: Mapping[str, float]) -> dict[str, float]:
    """Probability of each cause.

    Args:
        strengths: Of the case for each cause; that of "unknown" is 0.

    Returns:
        Adding up to 1: softmax of slope x strength + bias.
    """
    weights = _document()["weights"]
    logits = {
        name: weights[name]["slope"] * strength + weights[name]["bias"]
        for name, strength in strengths.items()
    }
    highest = max(logits.values())
    sizes = {name: math.exp(logit - highest) for name, logit in logits.items()}
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()}
