"""What an alarm rule did on one run, and the figures of many runs.

Small and plain, so that figures of any slice (a class of events, a seed, a recipe) come from the
same few numbers. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from foreshock.api.corpus import CorpusRun

__all__ = ["AlarmFigures", "Outcome", "bootstrap", "detected_by", "figures", "outcome_of"]

_LONGEST: Final = 1000
_LATE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run under one rule.

    Attributes:
        run, group, family, event_class, architecture, recipe, kind: Of the run.
        judged: Whether any record of it could be forecast at.
        onset: Step at which the loss begins to rise; None without a divergence.
        lead: Steps from the first useful alarm to the onset; None without one.
        detected: Whether the loss detector speaks by 8 steps after the onset.
        false_alarms, healthy_steps: On records on which an alarm is false.
        alarmed: Whether any alarm began.
    """

    run: str
    group: str
    family: str
    event_class: str
    architecture: str
    recipe: str
    kind: str
    judged: bool
    onset: int | None
    lead: float | None
    detected: bool
    false_alarms: int
    healthy_steps: int
    alarmed: bool


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
        lead_quartiles: First and third.
        lead_share: Median of the leads as a share of the steps to the onset.
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
    lead_quartiles: tuple[float, float] | None = None
    lead_share: float | None = None
    false_rate: float | None = None
    healthy_runs: float | None = None


def outcome_of(run: CorpusRun, alarms: Sequence[int]) -> Outcome:
    """What alarms at these steps mean for a run."""
    onset = run.label.onset
    healthy = set(run.steps[run.healthy].tolist())
    useful = [
        step
        for step in alarms
        if onset is not None and step not in healthy and 0 < onset - step <= _LONGEST
    ]
    return Outcome(
        run=run.name,
        group=run.group,
        family=run.family,
        event_class=run.event_class,
        architecture=run.architecture,
        recipe=run.recipe,
        kind=run.kind,
        judged=bool(run.judged.any()),
        onset=onset,
        lead=float(onset - useful[0]) if onset is not None and useful else None,
        detected=onset is not None and detected_by(run, onset + _LATE),
        false_alarms=sum(step in healthy for step in alarms),
        healthy_steps=len(healthy),
        alarmed=bool(alarms),
    )


def detected_by(run: CorpusRun, step: int) -> bool:
    """Whether the loss detector speaks from the onset to a step."""
    onset = run.label.onset or 0
    return bool(run.detected[(run.steps >= onset) & (run.steps <= step)].any())


def figures(method: str, budget: str, outcomes: Sequence[Outcome]) -> AlarmFigures:
    """The figures of some runs; an event without a record to be forecast at does not count."""
    events = [o for o in outcomes if o.onset is not None and o.judged]
    calm = [o for o in outcomes if o.onset is None]
    hits = [o.lead is not None for o in events]
    leads = np.array([o.lead for o in events if o.lead is not None])
    shares = [o.lead / max(o.onset or 1, 1) for o in events if o.lead is not None]
    steps = sum(o.healthy_steps for o in outcomes)
    caught = [o.lead is not None or o.detected for o in events]
    some = leads.size > 0
    return AlarmFigures(
        method=method,
        budget=budget,
        events=len(events),
        forecast=float(np.mean(hits)) if hits else None,
        interval=bootstrap(hits, [o.group for o in events]),
        detected=float(np.mean(caught)) if caught else None,
        lead_median=float(np.median(leads)) if some else None,
        lead_low=float(np.quantile(leads, 0.1)) if some else None,
        lead_quartiles=(float(np.quantile(leads, 0.25)), float(np.quantile(leads, 0.75)))
        if some
        else None,
        lead_share=float(np.median(shares)) if some else None,
        false_rate=1e4 * sum(o.false_alarms for o in outcomes) / steps if steps else None,
        healthy_runs=sum(o.alarmed for o in calm) / len(calm) if calm else None,
    )


def bootstrap(hits: Sequence[bool], groups: Sequence[str]) -> tuple[float, float] | None:
    """95 % interval of the share of hits, groups drawn with replacement."""
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
