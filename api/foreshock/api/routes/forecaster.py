"""What is known of the forecaster: its data, its thresholds, and how good it was found to be."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, JsonValue

from foreshock.api.access.scopes import READ
from foreshock.api.model_card import FIRST_HEADS, HEADS, load_shipped_card
from foreshock.api.openapi import errors
from foreshock.api.problems import Problem
from foreshock.monitor.record import HORIZONS

__all__ = ["ForecasterCard", "HeadCard", "router"]

router = APIRouter(tags=["risk"])


class HeadCard(BaseModel):
    """One fitted head; the richest one that a run's signals allow answers for it."""

    name: str
    features: int = Field(description="How many it looks at.")
    alarm_horizon: int | None = Field(description="Horizon whose probability is compared.")
    thresholds: dict[str, float | None] = Field(
        description="By false alarms allowed per 10,000 healthy steps; null = none keeps it."
    )
    reasons: dict[str, str] = Field(description="For each null, why.")
    base_rate: float | None = Field(description="Onsets per step in its training data.")
    unsupported: dict[str, str] = Field(description="Horizons it has no answer for, and why.")


class ForecasterCard(BaseModel):
    """The model card."""

    version: str
    budget: str = Field(description="The allowance of false alarms in force.")
    horizons: list[int]
    heads: list[HeadCard] = Field(description="Richest first.")
    data: dict[str, JsonValue] = Field(description="What it was fitted on.")
    training_runs: int = Field(description="Runs whose fingerprints it carries.")
    evaluation: dict[str, JsonValue] | None = Field(
        description="Report of `foreshock evaluate`: alarms, `risk` with the calibration of each "
        "head and horizon as [mean forecast, share observed] of ten bins, detection. null = the "
        "artifact came without one."
    )


@router.get("/forecaster", dependencies=[READ], responses=errors(404))
def get_forecaster() -> ForecasterCard:
    """The card of the forecaster that answers for live runs."""
    document = load_shipped_card()
    if document is None:
        raise Problem(404, "no forecaster comes with this installation; `foreshock fit` makes one")
    card: dict[str, Any] = dict(document["card"])
    evaluation = card.pop("evaluation", None)
    rates = card.pop("base_rate_per_step", {})
    unsupported = card.pop("unsupported_horizons", {})
    reference = card.pop("reference", None)
    if reference is not None:
        card["unfamiliar_false_share"] = reference["false_share"]
    return ForecasterCard(
        version=document["version"],
        budget=document["budget"],
        horizons=list(HORIZONS),
        heads=[
            HeadCard(
                name=name,
                features=len(document["heads"][name].get("features") or FIRST_HEADS[name]),
                alarm_horizon=document["heads"][name]["alarm_horizon"],
                thresholds=document["heads"][name]["thresholds"],
                reasons=document["heads"][name]["reasons"],
                base_rate=rates.get(name),
                unsupported=unsupported.get(name, {}),
            )
            for name in HEADS
            if name in document["heads"]
        ],
        data=card,
        training_runs=len(document["fingerprints"]),
        evaluation=evaluation,
    )
