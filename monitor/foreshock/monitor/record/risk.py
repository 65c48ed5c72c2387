"""What a scorer answers for one step: the risk per horizon, and why.

Lives beside the record because the guard inside a training job and the service both speak it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["HORIZONS", "AlertState", "Driver", "Risk", "RiskKind", "Suspect"]

HORIZONS: Final = (10, 100, 1000)
"""Horizons in optimizer steps (in rows for imported logs)."""

RiskKind = Literal["forecast", "detection"]
AlertState = Literal["ok", "pending", "firing", "resolved"]


@dataclass(frozen=True, slots=True)
class Driver:
    """One signal's part in a forecast.

    Attributes:
        signal: Name of the signal, e.g. `grad_output.kurtosis.max`.
        contribution: Its share of the log-odds above the run's usual level; positive raises risk.
        layer: The layer that holds the extreme, where the signal is an extreme over layers.
    """

    signal: str
    contribution: float
    layer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """The answer for one step, from records up to that step only.

    Attributes:
        step: The step it was computed at.
        probability: Per horizon in `HORIZONS`, P(the loss starts to diverge within it); None
            where the model cannot say. Never decreases with the horizon.
        reasons: For each None, why.
        band: Per horizon a (low, high) interval for the probability.
        expected_lead: Steps until onset, given that it comes within the longest supported horizon.
        kind: "forecast" before a rise, "detection" once the loss itself shows it, None if quiet.
        state: The alert state after this step.
        drivers: Signals that moved the forecast, strongest first.
        model_version: Which artifact answered.
    """

    step: int
    probability: Mapping[int, float | None]
    reasons: Mapping[int, str] = field(default_factory=dict)
    band: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    expected_lead: float | None = None
    kind: RiskKind | None = None
    state: AlertState = "ok"
    drivers: tuple[Driver, ...] = ()
    model_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """The likeliest cause of an alarm.

    Attributes:
        name: learning_rate, scale, outlier, underflow, bad_data, optimizer_state, attention, ... or
            unknown.
        layers: Qualified names of the layers that show it; may be empty.
        share: Share of the watched layers that are among them.
        probability: Of the cause.
        since: Step at which what shows it began to move; None = cannot say.
    """

    name: str
    layers: tuple[str, ...] = ()
    share: float = 0.0
    probability: float = 0.0
    since: int | None = None
