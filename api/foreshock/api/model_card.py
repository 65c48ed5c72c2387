"""The card of the forecaster that comes with the package, readable without the model.

A service shows it without loading what only its scoring processes need. Written by `artifact.save`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from foreshock.api.dynamics import (
    DYNAMIC_GRADIENT,
    DYNAMIC_LOSS,
    DYNAMIC_PLAIN,
    DYNAMIC_SCALED,
)
from foreshock.api.features import GRADIENT_FEATURES, LOSS_FEATURES, MOVE_FEATURES

__all__ = ["CARD_FILE", "FIRST_HEADS", "HEADS", "SHIPPED", "load_shipped_card"]

CARD_FILE: Final = "model_card.json"
SHIPPED: Final = Path(__file__).parent / "artifacts"
"""Folder of the artifact that comes with the package."""

FIRST_HEADS: Final[Mapping[str, tuple[str, ...]]] = {
    # How far each role's statistics moved, not every statistic of its own: with some sixty events
    # a weight for each of 249 features costs more than it knows (docs/forecast.md).
    "full": (*LOSS_FEATURES, *GRADIENT_FEATURES, *MOVE_FEATURES),
    "gradient": (*LOSS_FEATURES, *GRADIENT_FEATURES),
    "loss": LOSS_FEATURES,
}
"""What the heads of an artifact see that does not say so itself."""

_LOSS: Final = (*LOSS_FEATURES, *DYNAMIC_LOSS)
_GRADIENT: Final = (*_LOSS, *GRADIENT_FEATURES, *DYNAMIC_GRADIENT)

HEADS: Final[Mapping[str, tuple[str, ...]]] = {
    "full": (*_GRADIENT, *MOVE_FEATURES, *DYNAMIC_PLAIN, *DYNAMIC_SCALED),
    # Statistics of layers that need no scale: what a run in bfloat16 can tell.
    "layers": (*_GRADIENT, *DYNAMIC_PLAIN, "nonfinite_tensors.recent"),
    "gradient": _GRADIENT,
    "loss": _LOSS,
}
"""Which features each head sees when it is fitted, richest first."""


def load_shipped_card() -> Mapping[str, Any] | None:
    """What is known of the shipped model; None where there is none."""
    try:
        text = (SHIPPED / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    found: Mapping[str, Any] = json.loads(text)
    return found
