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
from foreshock.api.baselines import BASELINES, TimeOnlyHazard
from foreshock.api.corpus import CorpusRun
from foreshock.api.fitting import (
    BUDGETS,
    Series,
    columns_of,
    fit_forecaster,
    held_out_series,
    threshold_for,
)
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.quality import RiskQuality, risk_quality

__all__ = ["AlarmFigures", "Evaluation", "evaluate", "leave_one_out"]

FloatArray = npt.NDArray[np.float64]

_LONGEST: Final = 1000
_LATE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmFigures:
    """One method at one alarm budget, on runs it has not seen.

    Attributes:
        method: Name.
        budget: False alarms per 10,000 healthy steps it was tuned for.
        reason: Why there are no figures; empty otherwise.
        events: Divergences with a step to be forecast at.
        forecast: Share with an alarm at most 1,000 steps before the onset.
        interval: 95 % of a bootstrap over groups of `forecast`.
        detected: Share with an alarm by 8 steps after the onset, the loss detector included.
        lead_median, lead_low: Median and 10th percentile of the leads in steps.
        false_rate: False alarms per 10,000 healthy steps as measured.
        healthy_runs: Share of the runs that do not diverge with any alarm.
    """

    method: str
    budget: str
    reason: str = ""
    events: int = 0
    forecast: float | None = None
    interval: tuple[float, float] | None = None
    detected: float | None = None
    lead_median: float | None = None
    lead_low: float | None = None
    false_rate: float | None = None
    healthy_runs: float | None = None


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

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Trial:
    """Alarms of one method on test runs: per run, the steps at which alarms begin."""

    runs: list[CorpusRun] = field(default_factory=list)
    alarms: list[list[int]] = field(default_factory=list)
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
        name: {run.name: score(run.signals) for run in runs} for name, score in BASELINES.items()
    }
    for number, (train, test) in enumerate(_folds(runs, folds)):
        progress(f"fold {number + 1} of {folds}")
        for name in heads:
            _try_head(name, train, test, prototype, trials, answers[name])
        for name, scores in published.items():
            _try_baseline(name, scores, train, test, trials)
        _try_clock(train, test, trials, clock)
    alarms = [_figures(method, budget, trial) for (method, budget), trial in trials.items()]
    return Evaluation(
        runs=len(runs),
        groups=len({run.group for run in runs}),
        events=sum(run.label.diverges for run in runs),
        healthy_steps=int(sum(run.healthy.sum() for run in runs)),
        alarms=alarms,
        risk=_risk(answers, clock, prototype),
        detection=_detection(runs),
        by_family=_families(trials, heads[0]),
    )


def leave_one_out(
    runs: Sequence[CorpusRun],
    *,
    prototype: DivergenceForecaster | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, AlarmFigures]:
    """The full head on what its training never saw: one fault family, one architecture.

    Healthy test runs are those of the left-out architecture, or the group folds' tenth otherwise.
    """
    prototype = prototype or DivergenceForecaster()
    results = {}
    for title, parts in _left_out(runs).items():
        progress(title)
        train, test = parts
        trials: dict[tuple[str, str], _Trial] = {}
        _try_head("full", train, test, prototype, trials, [])
        results[title] = _figures("full", BUDGETS[-1], trials[("full", BUDGETS[-1])])
    return results


def _left_out(
    runs: Sequence[CorpusRun],
) -> dict[str, tuple[list[CorpusRun], list[CorpusRun]]]:
    parts = {}
    for family in sorted({run.family for run in runs if run.label.diverges}):
        hit = [run for run in runs if run.family == family]
        calm = [run for run in runs if run.family == "healthy"]
        tested = {id(run) for run in (*hit, *calm[::5])}
        train = [run for run in runs if id(run) not in tested]
        parts[f"without {family}"] = (train, [*hit, *calm[::5]])
    shapes = sorted({run.architecture for run in runs})
    for shape in shapes if len(shapes) > 1 else ():
        test = [run for run in runs if run.architecture == shape]
        train = [run for run in runs if run.architecture != shape]
        parts[f"without {shape}"] = (train, test)
    return parts


def _folds(runs: Sequence[CorpusRun], folds: int) -> list[tuple[list[CorpusRun], list[CorpusRun]]]:
    groups = sorted({run.group for run in runs})
    if len(groups) < folds:
        raise ValueError(f"{len(groups)} groups of runs cannot be split into {folds} folds")
    order = np.random.default_rng(0).permutation(len(groups))
    fold_of = {group: int(order[i]) % folds for i, group in enumerate(groups)}
    return [
        (
            [run for run in runs if fold_of[run.group] != part],
            [run for run in runs if fold_of[run.group] == part],
        )
        for part in range(folds)
    ]


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
    columns = columns_of(name)
    risks = [forecaster.predict_cumulative(run.features[:, columns]) for run in test]
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
        for run, score in zip(test, scores, strict=True):
            judged = np.flatnonzero(run.judged)
            starts = alarm_starts(score[judged], threshold)
            trial.runs.append(run)
            trial.alarms.append([int(run.steps[judged[i]]) for i in starts])


def _figures(method: str, budget: str, trial: _Trial) -> AlarmFigures:
    if trial.reason:
        return AlarmFigures(method=method, budget=budget, reason=trial.reason)
    leads: dict[int, float] = {}
    events, hits, caught, groups = [], [], [], []
    false, steps, calm, calm_alarmed = 0, 0, 0, 0
    for index, (run, alarms) in enumerate(zip(trial.runs, trial.alarms, strict=True)):
        at = dict(zip(run.steps.tolist(), run.healthy.tolist(), strict=True))
        false += sum(at[step] for step in alarms)
        steps += int(run.healthy.sum())
        if run.label.onset is None:
            calm += 1
            calm_alarmed += bool(alarms)
            continue
        if not run.judged.any():
            continue
        useful = [s for s in alarms if not at[s] and run.label.onset - s <= _LONGEST]
        events.append(index)
        groups.append(run.group)
        hits.append(bool(useful))
        if useful:
            leads[index] = float(run.label.onset - useful[0])
        caught.append(bool(useful) or _detected_by(run, run.label.onset + _LATE))
    spread = list(leads.values())
    return AlarmFigures(
        method=method,
        budget=budget,
        events=len(events),
        forecast=_share(hits),
        interval=_bootstrap(hits, groups),
        detected=_share(caught),
        lead_median=float(np.median(spread)) if spread else None,
        lead_low=float(np.quantile(spread, 0.1)) if spread else None,
        false_rate=1e4 * false / steps if steps else None,
        healthy_runs=calm_alarmed / calm if calm else None,
    )


def _detected_by(run: CorpusRun, step: int) -> bool:
    onset = run.label.onset or 0
    return bool(run.detected[(run.steps >= onset) & (run.steps <= step)].any())


def _share(flags: Sequence[bool]) -> float | None:
    return float(np.mean(flags)) if flags else None


def _bootstrap(hits: Sequence[bool], groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % interval of the share, groups drawn with replacement."""
    if not hits:
        return None
    values = np.array(hits, dtype=np.float64)
    names, index = np.unique(np.array(groups), return_inverse=True)
    total = np.bincount(index, weights=values)
    count = np.bincount(index)
    draws = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
    shares = total[draws].sum(axis=1) / count[draws].sum(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


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
        late: _share([_detected_by(run, (run.label.onset or 0) + late) for run in events])
        for late in (_LATE, 100)
    }
    return {
        "within_8_steps": within[_LATE],
        "within_100_steps": within[100],
        "false_per_10000": 1e4 * false / steps if steps else None,
        "healthy_runs_with_alarm": alarmed / calm if calm else None,
    }


def _families(trials: Mapping[tuple[str, str], _Trial], head: str) -> dict[str, tuple[int, float]]:
    trial = trials.get((head, BUDGETS[-1]), _Trial())
    found: dict[str, list[bool]] = {}
    for run, alarms in zip(trial.runs, trial.alarms, strict=True):
        if run.label.onset is None or not run.judged.any():
            continue
        at = dict(zip(run.steps.tolist(), run.healthy.tolist(), strict=True))
        found.setdefault(run.family, []).append(any(not at[s] for s in alarms))
    return {name: (len(v), float(np.mean(v))) for name, v in sorted(found.items())}
