"""Fit the heads of an artifact on a corpus, and choose alarm thresholds on held-out runs.

Thresholds come from an alarm budget, never from a probability that sounds high. It evaluates
nothing: the runs used here are not the runs a report may speak of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.base import clone

from foreshock.api.alerts import AlertSettings, alarm_starts
from foreshock.api.artifact import HEADS, Artifact, Head
from foreshock.api.corpus import CorpusRun, training_rows
from foreshock.api.familiarity import reference_of
from foreshock.api.features import FEATURES
from foreshock.api.forecaster import DivergenceForecaster

__all__ = [
    "BUDGETS",
    "Series",
    "artifact_of",
    "columns_of",
    "fit_artifact",
    "fit_forecaster",
    "fit_head",
    "held_out_series",
    "risks_of",
    "threshold_for",
    "version_of",
]

FloatArray = npt.NDArray[np.float64]

BUDGETS: Final = ("0.1", "1")
"""False alarms per 10,000 healthy steps."""
_GRID: Final = 60
_BATCH: Final = 128
"""Runs that are scored at once."""


@dataclass(frozen=True, slots=True)
class Series:
    """A score over the judged rows of one run, and which of them are healthy."""

    scores: FloatArray
    healthy: npt.NDArray[np.bool_]


def columns_of(head: str | Sequence[str]) -> npt.NDArray[np.intp]:
    """Columns of a feature vector that a head, or a list of features, sees."""
    names = HEADS[head] if isinstance(head, str) else head
    return np.array([FEATURES.index(name) for name in names])


def false_alarms(series: Iterable[Series], threshold: float, settings: AlertSettings) -> int:
    """How many alarms begin on healthy rows."""
    total = 0
    for one in series:
        if not one.healthy.any() or not np.any(one.scores >= threshold):
            continue
        total += sum(bool(one.healthy[i]) for i in alarm_starts(one.scores, threshold, settings))
    return total


def threshold_for(
    series: Sequence[Series], budget: float, settings: AlertSettings | None = None
) -> tuple[float | None, str]:
    """The lowest threshold that keeps a budget on these held-out runs.

    Args:
        series: Held-out scores.
        budget: False alarms per 10,000 healthy steps.
        settings: Hysteresis of the alarms that are counted.

    Returns:
        The threshold, or None and the reason.
    """
    settings = settings or AlertSettings()
    healthy = sum(int(np.count_nonzero(s.healthy)) for s in series)
    allowed = budget * healthy / 10_000
    if allowed < 1:
        return None, (
            f"{healthy} healthy steps cannot tell a budget of {budget:g} per 10,000: that is"
            f" {allowed:.2g} alarms"
        )
    scores = np.concatenate([s.scores for s in series])
    scores = np.unique(scores[np.isfinite(scores)])
    if scores.size == 0:
        return None, "no scores"
    high = float(scores[-1])
    # Candidates lie close together where scores are high: that is where the budget is kept.
    shares = 1 - np.geomspace(1e-4, 1.0, _GRID)
    candidates = np.unique(np.quantile(scores, shares))[::-1]
    best = float(np.nextafter(high, np.inf))
    for candidate in candidates:
        if false_alarms(series, float(candidate), settings) > allowed:
            break
        best = float(candidate)
    return best, ""


def fit_head(
    name: str,
    runs: Sequence[CorpusRun],
    prototype: DivergenceForecaster | None = None,
    most: int = 20_000,
) -> Head:
    """Fit one head and its thresholds.

    Args:
        name: In `HEADS`.
        runs: Training runs; thresholds come from their held-out scores.
        prototype: Parameters to fit with; it is cloned.
        most: About so many rows are fitted on.
    """
    forecaster = fit_forecaster(name, runs, prototype or DivergenceForecaster(), most)
    supported = [
        int(h) for h, ok in zip(forecaster.horizons, forecaster.supported_, strict=True) if ok
    ]
    if not supported:
        reason = next(iter(forecaster.reasons_.values()), "nothing to fit")
        none = dict.fromkeys(BUDGETS)
        return Head(forecaster, none, dict.fromkeys(BUDGETS, reason), features=HEADS[name])
    at = max((h for h in supported if h <= 100), default=supported[0])
    series = held_out_series(name, forecaster, runs, at)
    thresholds: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for budget in BUDGETS:
        thresholds[budget], reason = threshold_for(series, float(budget))
        if reason:
            reasons[budget] = reason
    return Head(forecaster, thresholds, reasons, at, HEADS[name])


def fit_forecaster(
    name: str | Sequence[str],
    runs: Sequence[CorpusRun],
    prototype: DivergenceForecaster,
    most: int = 20_000,
) -> DivergenceForecaster:
    """Fit a clone of `prototype` on a head's features of about so many thinned rows."""
    rows = training_rows(runs, most=most)
    columns = columns_of(name)
    forecaster: DivergenceForecaster = clone(prototype)
    return forecaster.fit(
        rows.features[:, columns],
        rows.times,
        groups=rows.groups,
        runs=rows.runs,
        sample_weight=rows.weights,
    )


def held_out_series(
    name: str | Sequence[str],
    forecaster: DivergenceForecaster,
    runs: Sequence[CorpusRun],
    horizon: int,
) -> list[Series]:
    """Scores of the training runs by the model that has not seen their group."""
    columns = columns_of(name)
    position = [int(h) for h in forecaster.horizons].index(horizon)
    parts: dict[int, list[CorpusRun]] = {}
    for run in runs:
        if run.group in forecaster.fold_of_group_ and run.judged.any():
            parts.setdefault(forecaster.fold_of_group_[run.group], []).append(run)
    series = []
    for some in parts.values():
        # Many runs at once: an ensemble costs more per call than per row.
        for first in range(0, len(some), _BATCH):
            batch = some[first : first + _BATCH]
            rows = np.concatenate([run.features[run.judged][:, columns] for run in batch])
            risk = forecaster.held_out_cumulative(rows, batch[0].group)[:, position]
            ends = np.cumsum([np.count_nonzero(run.judged) for run in batch])[:-1]
            for run, score in zip(batch, np.split(risk, ends), strict=True):
                series.append(Series(score, run.healthy[run.judged]))
    return series


def risks_of(
    name: str | Sequence[str], forecaster: DivergenceForecaster, runs: Sequence[CorpusRun]
) -> list[FloatArray]:
    """Cumulative probabilities (T, horizons) of each run."""
    columns = columns_of(name)
    risks: list[FloatArray] = []
    for first in range(0, len(runs), _BATCH):
        batch = runs[first : first + _BATCH]
        rows = np.concatenate([run.features[:, columns] for run in batch])
        ends = np.cumsum([len(run.steps) for run in batch])[:-1]
        risks += np.split(forecaster.predict_cumulative(rows), ends)
    return risks


def fit_artifact(
    runs: Sequence[CorpusRun],
    card: dict[str, Any],
    prototype: DivergenceForecaster | None = None,
) -> Artifact:
    """Fit every head on all runs.

    Args:
        runs: The corpus.
        card: Goes into the model card, beside what is known here.
        prototype: Parameters to fit with; it is cloned.
    """
    return artifact_of({name: fit_head(name, runs, prototype) for name in HEADS}, runs, card)


def artifact_of(
    heads: Mapping[str, Head], runs: Sequence[CorpusRun], card: dict[str, Any]
) -> Artifact:
    """The artifact of heads that were fitted on these runs."""
    prints = sorted(run.fingerprint for run in runs)
    supported = [b for b in reversed(BUDGETS) if heads["full"].thresholds.get(b) is not None]
    return Artifact(
        heads=heads,
        version=version_of(prints, {name: head.features for name, head in heads.items()}),
        budget=supported[0] if supported else BUDGETS[-1],
        fingerprints=frozenset(prints),
        card=card | describe(runs, heads) | _reference(runs),
    )


def _reference(runs: Sequence[CorpusRun]) -> dict[str, Any]:
    found = reference_of(runs, HEADS["full"])
    return {} if found is None else {"reference": found.as_dict()}


def version_of(fingerprints: Sequence[str], heads: Mapping[str, Sequence[str]] = HEADS) -> str:
    """Name of a model: a digest of its training runs and of the features that its heads see."""
    seen = [*fingerprints, *(f"{head}:{name}" for head, names in heads.items() for name in names)]
    return f"first-light-{hashlib.sha256(' '.join(seen).encode()).hexdigest()[:12]}"


def describe(runs: Sequence[CorpusRun], heads: Mapping[str, Head]) -> dict[str, Any]:
    """The facts of a fit that a reader of the model card needs."""
    families: dict[str, dict[str, int]] = {}
    for run in runs:
        counts = families.setdefault(run.family, {})
        counts[run.label.kind] = counts.get(run.label.kind, 0) + 1
    return {
        "runs": len(runs),
        "groups": len({run.group for run in runs}),
        "rows": int(sum(len(run.steps) for run in runs)),
        "healthy_rows": int(sum(run.healthy.sum() for run in runs)),
        "events": sum(run.label.diverges for run in runs),
        "families": families,
        "models": {name: repr(head.forecaster) for name, head in heads.items()},
        "base_rate_per_step": {n: h.forecaster.base_rate_ for n, h in heads.items()},
        "unsupported_horizons": {
            name: {str(k): v for k, v in head.forecaster.reasons_.items()}
            for name, head in heads.items()
        },
    }
