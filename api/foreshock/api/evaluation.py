"""How good the forecast is: held-out groups, fixed alarm budgets, beside the baselines.

Forecast and detection are reported apart. Nothing here is tuned on the runs it reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from foreshock.api.alerts import alarm_starts
from foreshock.api.artifact import HEADS
from foreshock.api.baselines import BASELINES, SHIPPED_RULES, TimeOnlyHazard
from foreshock.api.corpus import CorpusRun
from foreshock.api.fitting import (
    BUDGETS,
    Series,
    fit_forecaster,
    held_out_series,
    risks_of,
    threshold_for,
)
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.outcomes import AlarmFigures, Outcome, detected_by, figures, outcome_of
from foreshock.api.quality import RiskQuality, risk_quality
from foreshock.api.splits import grouped_folds, left_out

__all__ = ["AlarmFigures", "Evaluation", "evaluate", "leave_one_out", "outcomes_of"]

FloatArray = npt.NDArray[np.float64]

_LATE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything `foreshock evaluate` prints.

    Attributes:
        runs, groups, events, healthy_steps: Of the corpus.
        alarms: One row per method and budget.
        risk: Head and horizon to the quality of its probabilities.
        detection: The loss detector by itself.
        by_family: Family to (events, share forecast) of the full head at the largest budget.
        held_out: What was left out, to the full head's figures on it.
        by_class: As `by_family`, for explosions, malignant spikes and slow drifts.
    """

    runs: int
    groups: int
    events: int
    healthy_steps: int
    alarms: list[AlarmFigures]
    risk: dict[str, RiskQuality]
    detection: dict[str, float | None]
    by_family: dict[str, tuple[int, float]] = field(default_factory=dict)
    held_out: dict[str, AlarmFigures] = field(default_factory=dict)
    by_class: dict[str, tuple[int, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Trial:
    """Outcomes of one method on test runs."""

    outcomes: list[Outcome] = field(default_factory=list)
    reason: str = ""


def evaluate(
    runs: Sequence[CorpusRun],
    *,
    folds: int = 5,
    heads: Sequence[str] = tuple(HEADS),
    prototype: DivergenceForecaster | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate heads and baselines by folds of groups.

    Args:
        runs: The corpus.
        folds: Outer folds; every run is tested once by models and thresholds that saw none of its
            group.
        heads: Which heads.
        prototype: Parameters to fit with.
        progress: Told what is being done.

    Raises:
        ValueError: Fewer groups than folds.
    """
    prototype = prototype or DivergenceForecaster()
    trials: dict[tuple[str, str], _Trial] = {}
    answers: dict[str, list[tuple[CorpusRun, FloatArray]]] = {name: [] for name in heads}
    clock: list[tuple[CorpusRun, FloatArray]] = []
    published = {
        name: {run.name: score(run.signals) for run in runs}
        for name, score in {**BASELINES, **SHIPPED_RULES}.items()
    }
    for number, split in enumerate(grouped_folds(runs, folds)):
        train, test = split.train, split.test
        progress(f"fold {number + 1} of {folds}")
        for name in heads:
            _try_head(name, train, test, prototype, trials, answers[name])
        for name, scores in published.items():
            _try_baseline(name, scores, train, test, trials)
        _try_clock(train, test, trials, clock)
    first = trials.get((heads[0], BUDGETS[-1]), _Trial())
    alarms = [_figures(method, budget, trial) for (method, budget), trial in trials.items()]
    return Evaluation(
        runs=len(runs),
        groups=len({run.group for run in runs}),
        events=sum(run.label.diverges for run in runs),
        healthy_steps=int(sum(run.healthy.sum() for run in runs)),
        alarms=alarms,
        risk=_risk(answers, clock, prototype),
        detection=_detection(runs),
        by_family=_slices(first, lambda one: one.family),
        by_class=_slices(first, lambda one: one.event_class),
    )


def leave_one_out(
    runs: Sequence[CorpusRun],
    *,
    prototype: DivergenceForecaster | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, AlarmFigures]:
    """The full head on what its training never saw: a fault family, an architecture, a recipe.

    Each in two parts, so that no group stands on both sides; healthy runs of the tested groups are
    tested beside.
    """
    prototype = prototype or DivergenceForecaster()
    trials: dict[str, dict[tuple[str, str], _Trial]] = {}
    for split in left_out(runs):
        progress(split.title)
        here = trials.setdefault(split.title, {})
        _try_head("full", split.train, split.test, prototype, here, [])
    return {
        title: _figures("full", BUDGETS[-1], found["full", BUDGETS[-1]])
        for title, found in trials.items()
    }


def _try_head(
    name: str,
    train: Sequence[CorpusRun],
    test: Sequence[CorpusRun],
    prototype: DivergenceForecaster,
    trials: dict[tuple[str, str], _Trial],
    answers: list[tuple[CorpusRun, FloatArray]],
) -> None:
    forecaster = fit_forecaster(name, train, prototype)
    supported = [int(h) for h in np.array(forecaster.horizons)[forecaster.supported_]]
    if not supported:
        reason = next(iter(forecaster.reasons_.values()), "nothing to fit")
        for budget in BUDGETS:
            trials.setdefault((name, budget), _Trial()).reason = reason
        return
    at = max((h for h in supported if h <= 100), default=supported[0])
    position = [int(h) for h in forecaster.horizons].index(at)
    risks = risks_of(name, forecaster, test)
    answers.extend(zip(test, risks, strict=True))
    calibration = held_out_series(name, forecaster, train, at)
    scores = [risk[:, position] for risk in risks]
    _apply(name, calibration, test, scores, trials)


def _try_baseline(
    name: str,
    scores: Mapping[str, FloatArray],
    train: Sequence[CorpusRun],
    test: Sequence[CorpusRun],
    trials: dict[tuple[str, str], _Trial],
) -> None:
    if name in SHIPPED_RULES:
        for budget in BUDGETS:
            trial = trials.setdefault((name, budget), _Trial())
            trial.outcomes += outcomes_of(test, [scores[run.name] for run in test], 1.0)
        return
    series = [Series(scores[run.name][run.judged], run.healthy[run.judged]) for run in train]
    _apply(name, series, test, [scores[run.name] for run in test], trials)


def _try_clock(
    train: Sequence[CorpusRun],
    test: Sequence[CorpusRun],
    trials: dict[tuple[str, str], _Trial],
    answers: list[tuple[CorpusRun, FloatArray]],
) -> None:
    clock = TimeOnlyHazard()
    kept = [run for run in train if run.judged.any()]
    clock.fit(
        [run.steps[run.judged].astype(np.float64) for run in kept],
        [run.times()[0][run.judged] <= 101 for run in kept],
    )
    series = [
        Series(clock.predict(run.steps[run.judged].astype(np.float64)), run.healthy[run.judged])
        for run in kept
    ]
    scores = [clock.predict(run.steps.astype(np.float64)) for run in test]
    answers.extend(zip(test, scores, strict=True))
    _apply("time only", series, test, scores, trials)


def _apply(
    name: str,
    calibration: Sequence[Series],
    test: Sequence[CorpusRun],
    scores: Sequence[FloatArray],
    trials: dict[tuple[str, str], _Trial],
) -> None:
    for budget in BUDGETS:
        trial = trials.setdefault((name, budget), _Trial())
        threshold, reason = threshold_for(calibration, float(budget))
        if threshold is None:
            trial.reason = reason
            continue
        trial.outcomes += outcomes_of(test, scores, threshold)


def outcomes_of(
    test: Sequence[CorpusRun], scores: Sequence[FloatArray], threshold: float
) -> list[Outcome]:
    """What a threshold on scores (T,) of each run does."""
    found = []
    for run, score in zip(test, scores, strict=True):
        judged = np.flatnonzero(run.judged)
        starts = alarm_starts(score[judged], threshold)
        found.append(outcome_of(run, [int(run.steps[judged[i]]) for i in starts]))
    return found


def _figures(method: str, budget: str, trial: _Trial) -> AlarmFigures:
    if trial.reason:
        return AlarmFigures(method=method, budget=budget, reason=trial.reason)
    return figures(method, budget, trial.outcomes)


def _risk(
    answers: Mapping[str, list[tuple[CorpusRun, FloatArray]]],
    clock: list[tuple[CorpusRun, FloatArray]],
    prototype: DivergenceForecaster,
) -> dict[str, RiskQuality]:
    by_time = {id(run): score for run, score in clock}
    table = {}
    for name, pairs in answers.items():
        for position, horizon in enumerate(int(h) for h in prototype.horizons):
            rows = [
                (run, risk[:, position], by_time[id(run)] if horizon == 100 else None)
                for run, risk in pairs
                if np.isfinite(risk[:, position]).any()
            ]
            if rows:
                table[f"{name}, {horizon} steps"] = risk_quality(rows, horizon, prototype.gap)
    return table


def _detection(runs: Sequence[CorpusRun]) -> dict[str, float | None]:
    """The loss detector by itself: share of divergences within 8 and 100 steps, false alarms."""
    events = [run for run in runs if run.label.onset is not None]
    false, steps, alarmed, calm = 0, 0, 0, 0
    for run in runs:
        starts = run.detected & ~np.concatenate([[False], run.detected[:-1]])
        false += int(np.count_nonzero(starts & run.healthy))
        steps += int(run.healthy.sum())
        if run.label.onset is None:
            calm += 1
            alarmed += bool(starts.any())
    within = {
        late: _share([detected_by(run, (run.label.onset or 0) + late) for run in events])
        for late in (_LATE, 100)
    }
    return {
        "within_8_steps": within[_LATE],
        "within_100_steps": within[100],
        "false_per_10000": 1e4 * false / steps if steps else None,
        "healthy_runs_with_alarm": alarmed / calm if calm else None,
    }


def _share(flags: Sequence[bool]) -> float | None:
    return float(np.mean(flags)) if flags else None


def _slices(trial: _Trial, of: Callable[[Outcome], str]) -> dict[str, tuple[int, float]]:
    """Events and the share forecast, by what `of` says of a run."""
    found: dict[str, list[bool]] = {}
    for one in trial.outcomes:
        if one.onset is not None and one.judged:
            found.setdefault(of(one), []).append(one.lead is not None)
    return {name: (len(v), float(np.mean(v))) for name, v in sorted(found.items())}
