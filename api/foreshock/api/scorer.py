"""The local scorer: records of one run in, risk out; what the guard, the service and the CLI call.

Causal by construction: an answer depends on the records given so far, in order. It knows no faults,
no configurations and no names of runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from foreshock.api.alerts import PLANNED_EVENTS, AlertMachine
from foreshock.api.artifact import HEADS, Artifact, Head, load_shipped
from foreshock.api.detection import Detection, LossDetector
from foreshock.api.familiarity import Reference, Unfamiliarity
from foreshock.api.features import FEATURES, SIGNAL_OF_FEATURE, FeatureExtractor
from foreshock.api.scoring_records import ScoringRecord
from foreshock.api.signals import EXTREMES, summarise, worst_layers
from foreshock.monitor.record import (
    HORIZONS,
    STATISTICS,
    Driver,
    Event,
    Risk,
    StepRecord,
    TensorIdentity,
)

__all__ = ["NO_MODEL", "LocalScorer"]

FloatArray = npt.NDArray[np.float64]

NO_MODEL: Final = "no fitted model installed"
_DRIVERS: Final = 5
_SIGNAL_NAMES: Final = tuple(dict.fromkeys(SIGNAL_OF_FEATURE.values()))
_SIGNAL: Final = np.array([_SIGNAL_NAMES.index(SIGNAL_OF_FEATURE[name]) for name in FEATURES])
_PLACE: Final = {name: index for index, name in enumerate(FEATURES)}
_TENSORS: Final = np.array(
    [i for i, f in enumerate(FEATURES) if f.startswith(("input.", "weight."))]
)
_SCALED: Final = np.array(
    [i for i, f in enumerate(FEATURES) if f.split(".")[1:2] in (["headroom_log2"], ["sqnr_db"])]
)
_NEEDS: Final = {
    "full": _TENSORS,
    "layers": _TENSORS,
    "gradient": np.array([i for i, f in enumerate(FEATURES) if f.startswith("grad_norm.")]),
    "loss": np.array([i for i, f in enumerate(FEATURES) if f.startswith("loss.")]),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forecast:
    """What the model says at one record."""

    probability: dict[int, float | None]
    reasons: dict[int, str]
    band: dict[int, tuple[float, float]]
    drivers: tuple[Driver, ...] = ()
    alarm: float | None = None
    threshold: float | None = None


class LocalScorer:
    """Risk of one run and attempt, record by record.

    Args:
        artifact: A fitted forecaster; None takes the one that comes with the package, and without
            that the scorer detects only.
        prior: Expected onsets per step where it is used; None keeps the training rate.
        threshold_factor: Of the model's alarm threshold; above 1 alarms less often.

    Attributes:
        features: Of the latest record; None while there is too little history.
        alarm_score: Probability over the threshold that was fitted, at the latest record; None =
            no forecast.
        detection: What the loss itself shows at the latest record.
    """

    def __init__(
        self,
        artifact: Artifact | None = None,
        *,
        prior: float | None = None,
        threshold_factor: float = 1.0,
    ) -> None:
        self._artifact = artifact if artifact is not None else load_shipped()
        self._prior = prior
        self.threshold_factor = threshold_factor
        heads = self._artifact.heads if self._artifact else {}
        self._columns = {
            name: np.array([_PLACE[f] for f in head.features]) for name, head in heads.items()
        }
        # Only an artifact that knows runs without scales asks for scales in its richest head.
        self._needs = _NEEDS | ({"full": _SCALED} if "layers" in heads else {})
        settings = self._artifact.features if self._artifact else None
        self._extractor = FeatureExtractor(settings)
        self._detector = LossDetector()
        self._machine = AlertMachine(None, self._artifact.alerts if self._artifact else None)
        self._worst: tuple[str | None, ...] = (None,) * len(EXTREMES)
        self._reference: Reference | None = None
        self.features: FloatArray | None = None
        self.alarm_score: float | None = None
        self.detection = Detection()

    def __call__(self, record: StepRecord) -> Risk:
        """Score one record."""
        identities: tuple[TensorIdentity, ...] | None = None
        statistics: dict[str, FloatArray] | None = None
        if record.tensors:
            identities = tuple(tensor.identity for tensor in record.tensors)
            statistics = {
                name: np.array(
                    [_number(getattr(tensor, name)) for tensor in record.tensors], np.float64
                )
                for name in STATISTICS
            }
        return self.score(
            step=record.step,
            scalars=record.scalars,
            events=record.events,
            identities=identities,
            statistics=statistics,
        )

    def score(
        self,
        *,
        step: int,
        scalars: Mapping[str, float],
        events: Sequence[Event] = (),
        identities: Sequence[TensorIdentity] | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> Risk:
        """Score one record given as columns.

        Args:
            step: Optimizer step; one at or below the last starts the run afresh.
            scalars: Name to value; a name that stands there was measured, even if NaN.
            events: Planned ones start the levels afresh.
            identities: One per tensor row, None off the cadence.
            statistics: Name to (rows,), masked or NaN = not measured.
        """
        if identities and statistics:
            layers = worst_layers(identities, statistics)
            self._worst = tuple(layers.get(name) for name in EXTREMES)
        return self._answer(step, scalars, events, summarise(identities, statistics, scalars))

    def score_record(self, record: ScoringRecord) -> Risk:
        """Score one record whose signals are made already; the same answer as `score`."""
        if record.measured:
            self._worst = record.worst
        return self._answer(record.step, record.scalars, record.events, record.signals)

    def familiarity(self) -> Unfamiliarity | None:
        """Whether the latest record is like the model's training records; None = cannot say."""
        if self._artifact is None or self.features is None:
            return None
        document = self._artifact.card.get("reference")
        if document is None:
            return None
        if self._reference is None:
            self._reference = Reference.from_dict(document)
        return self._reference.judge(self.features[[_PLACE[n] for n in self._reference.names]])

    @property
    def state(self) -> Any:
        """All that it learned from the records so far; can be pickled, and holds no model."""
        return self._extractor, self._detector, self._machine, self._worst, self.features

    @state.setter
    def state(self, state: Any) -> None:
        self._extractor, self._detector, self._machine, self._worst, self.features = state

    def _answer(
        self, step: int, scalars: Mapping[str, float], events: Sequence[Event], signals: FloatArray
    ) -> Risk:
        if any(event.kind in PLANNED_EVENTS for event in events):
            self._extractor.rebaseline()
            self._detector.rebaseline()
            self._machine.rebaseline()
        self.features = self._extractor.update(step, signals)
        loss = scalars.get("loss")
        self.detection = self._detector.update(step, None if loss is None else float(loss))
        forecast = self._certain() if self.detection.certain else self._forecast()
        self.alarm_score = (
            forecast.alarm / forecast.threshold
            if forecast.alarm is not None and forecast.threshold
            else None
        )
        return self._risk(step, forecast, self.detection)

    def _risk(self, step: int, forecast: _Forecast, detection: Detection) -> Risk:
        fitted = forecast.threshold
        self._machine.threshold = None if fitted is None else fitted * self.threshold_factor
        state = self._machine.update(
            forecast.alarm, detected=detection.detected, suspected=detection.suspected
        )
        return Risk(
            step=step,
            probability=forecast.probability,
            reasons=forecast.reasons,
            band=forecast.band,
            expected_lead=_expected_lead(forecast.probability),
            kind=self._machine.kind,
            state=state,
            drivers=forecast.drivers,
            model_version=self._artifact.version if self._artifact else "none",
        )

    def _certain(self) -> _Forecast:
        """The loss is lost: no model needed."""
        return _Forecast(
            probability=dict.fromkeys(HORIZONS, 1.0),
            reasons={},
            band=dict.fromkeys(HORIZONS, (1.0, 1.0)),
        )

    def _silent(self, reason: str) -> _Forecast:
        return _Forecast(
            probability=dict.fromkeys(HORIZONS),
            reasons=dict.fromkeys(HORIZONS, reason),
            band={},
        )

    def _forecast(self) -> _Forecast:
        if self._artifact is None:
            return self._silent(NO_MODEL)
        if self.features is None:
            return self._silent(self._extractor.missing or "too little history")
        name = next((n for n in HEADS if self._usable(n, self.features)), None)
        if name is None:
            return self._silent("neither loss, gradient norm nor tensors in the recent records")
        return self._ask(self._artifact, self._artifact.heads[name], name)

    def _usable(self, name: str, features: FloatArray) -> bool:
        assert self._artifact is not None
        head = self._artifact.heads.get(name)
        return head is not None and bool(np.isfinite(features[self._needs[name]]).any())

    def _ask(self, artifact: Artifact, head: Head, name: str) -> _Forecast:
        assert self.features is not None
        row = self.features[self._columns[name]]
        middle, low, high, contributions = head.forecaster.explain(row, prior=self._prior)
        probability: dict[int, float | None] = {}
        reasons: dict[int, str] = {}
        band: dict[int, tuple[float, float]] = {}
        for index, horizon in enumerate(int(h) for h in head.forecaster.horizons):
            if math.isnan(middle[index]):
                probability[horizon] = None
                reasons[horizon] = head.forecaster.reasons_.get(horizon, "not supported")
            else:
                probability[horizon] = float(middle[index])
                band[horizon] = (float(low[index]), float(high[index]))
        at = head.alarm_horizon
        return _Forecast(
            probability=probability,
            reasons=reasons,
            band=band,
            drivers=self._drivers(contributions, self._columns[name]),
            alarm=None if at is None else probability.get(at),
            threshold=head.thresholds.get(artifact.budget),
        )

    def _drivers(
        self, contributions: FloatArray, columns: npt.NDArray[np.intp]
    ) -> tuple[Driver, ...]:
        """The signals that raise the risk most, their features' contributions added up."""
        totals = np.bincount(_SIGNAL[columns], weights=contributions, minlength=len(_SIGNAL_NAMES))
        ranked = np.argsort(-totals, kind="stable")[:_DRIVERS]
        layers = dict(zip(EXTREMES, self._worst, strict=True))
        return tuple(
            Driver(_SIGNAL_NAMES[i], float(totals[i]), layers.get(_SIGNAL_NAMES[i]))
            for i in ranked.tolist()
            if totals[i] > 0
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _expected_lead(probability: Mapping[int, float | None]) -> float | None:
    """Mean steps to the onset, given that it comes within the longest supported horizon."""
    lower, before, total, moment = 0.0, 0.0, 0.0, 0.0
    for horizon in sorted(probability):
        value = probability[horizon]
        if value is None:
            break
        moment += (value - before) * (lower + horizon) / 2
        total, before, lower = value, value, float(horizon)
    return moment / total if total > 0 else None
