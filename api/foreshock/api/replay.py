"""Past runs as if an alert had been on: when it would have paged, how far ahead, how often in vain.

Pure: tracks of scores in, pages and figures out. A run is scored once (`track`); policies are then
tried on the track, which holds all that an alert looks at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

from foreshock.api.alerts import PLANNED_EVENTS, AlertMachine, AlertSettings, alarm_starts
from foreshock.api.labels import Kind, label_run
from foreshock.api.replay_policy import ReplayPolicy
from foreshock.api.scorer import LocalScorer
from foreshock.monitor.record import Risk, RiskKind, StepRecord

__all__ = ["Budget", "Outcome", "Page", "Replay", "RunReplay", "Track", "replay", "track"]

FloatArray = npt.NDArray[np.float64]

_LONGEST: Final = 1000
"""A page further ahead of an onset than this many steps is no forecast of it."""
_WEEK: Final = 7 * 24 * 3600.0
_PAUSE: Final = 20
"""Records further apart than so many usual intervals: the run stood still in between."""
_GRID: Final = 60
_CONFIDENCE: Final = 0.95

Outcome = str
"""in time (before the onset), late (after it), in vain (nothing followed)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Track:
    """All that an alert looks at, of one attempt of a run.

    Attributes:
        run: Name.
        attempt: Its number, from 1.
        steps: int64 (T,).
        seconds: (T,) of training since the first record, without pauses; NaN where not known.
        tokens: (T,) cumulative; NaN where not known.
        loss: (T,); NaN where there is none.
        score: (T,) probability over the model's threshold; NaN = no forecast.
        detected, suspected, planned: (T,) flags: the loss shows it; may show it; a planned event.
        risks: The answers at each record.
        lacking: Reasons why there was no forecast, with the number of records.
    """

    run: str
    attempt: int
    steps: npt.NDArray[np.int64]
    seconds: FloatArray
    tokens: FloatArray
    loss: FloatArray
    has_loss: npt.NDArray[np.bool_]
    score: FloatArray
    detected: npt.NDArray[np.bool_]
    suspected: npt.NDArray[np.bool_]
    planned: npt.NDArray[np.bool_]
    risks: tuple[Risk, ...]
    lacking: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One time that somebody would have been called.

    Attributes:
        step: At which record.
        kind: forecast or detection.
        probability: Within the longest horizon that has an answer; None without a forecast.
        outcome: in time, late or in vain.
        lead_steps, lead_tokens, lead_hours: From the page to the onset, negative when late; None
            in vain or where not known.
        drivers: Signals that raised the risk most, with their layers.
    """

    step: int
    kind: RiskKind
    probability: float | None
    outcome: Outcome
    lead_steps: int | None = None
    lead_tokens: float | None = None
    lead_hours: float | None = None
    drivers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReplay:
    """What the policy would have done on one attempt.

    Attributes:
        run, attempt: Which.
        records: How many were read.
        label: What happened to it; None without a loss to tell by.
        onset: Step at which the loss began its rise; None without a divergence.
        hours: Of training; None where not known.
        pages: In order.
        lacking: Reasons why there was no forecast, with the number of records.
    """

    run: str
    attempt: int
    records: int
    label: Kind | None
    onset: int | None
    hours: float | None
    pages: tuple[Page, ...]
    lacking: dict[str, int]

    @property
    def missed(self) -> bool:
        """Whether it diverged and nobody was called by 8 steps after the onset."""
        soon = any(p.lead_steps is not None and p.lead_steps >= -8 for p in self.pages)
        return self.onset is not None and not soon


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a budget would buy on these runs, forecasts only.

    Attributes:
        factor: Of the model's threshold.
        vain_per_week: Pages in vain per week of training.
        vain_highest: End of its 95 % interval (Poisson, exact): so many a week these runs allow.
        forecast: Share of the divergences that were paged ahead; None without any.
        forecast_interval: 95 % interval of it (binomial, exact).
    """

    factor: float
    vain_per_week: float | None
    vain_highest: float | None
    forecast: float | None
    forecast_interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The answer.

    Attributes:
        policy: As it was applied: its factor is the one that was found for its budget.
        runs: One per attempt.
        weeks: Of training in all; None where the records tell no time.
        curve: Factors from the most to the least talkative.
        notes: What a reader must know before believing it.
    """

    policy: ReplayPolicy
    runs: tuple[RunReplay, ...]
    weeks: float | None
    curve: tuple[Budget, ...]
    notes: tuple[str, ...]

    @property
    def pages(self) -> list[Page]:
        """Of all runs."""
        return [page for run in self.runs for page in run.pages]

    @property
    def events(self) -> int:
        """Attempts that diverged."""
        return sum(run.onset is not None for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = asdict(self)
        for run, plain in zip(self.runs, found["runs"], strict=True):
            plain["missed"] = run.missed
        return found


def track(
    run: str,
    attempt: int,
    records: Iterable[StepRecord],
    scorer: LocalScorer,
    *,
    seconds_per_step: float | None = None,
    timed: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> Track:
    """Score an attempt, record by record, as it would have been scored live.

    Args:
        run: Name.
        attempt: Number.
        records: In order of their steps.
        scorer: A fresh one.
        seconds_per_step: In place of the records' times; None takes those.
        timed: Whether the records' times were measured.
        progress: Called after each record.

    Raises:
        ValueError: Steps do not rise, or there is no record.
    """
    steps: list[int] = []
    stamps: list[float] = []
    tokens, losses, has_loss = [], [], []
    score, detected, suspected, planned, risks = [], [], [], [], []
    lacking: dict[str, int] = {}
    for record in records:
        if steps and record.step <= steps[-1]:
            raise ValueError(
                f"{run}: step {record.step} follows step {steps[-1]}; give each attempt by itself"
            )
        risk = scorer(record)
        ratio = scorer.alarm_score
        steps.append(record.step)
        stamps.append(record.time.timestamp())
        tokens.append(record.scalars.get("tokens", math.nan))
        losses.append(record.scalars.get("loss", math.nan))
        has_loss.append("loss" in record.scalars)
        score.append(math.nan if ratio is None else ratio)
        detected.append(scorer.detection.detected)
        suspected.append(scorer.detection.suspected)
        planned.append(any(event.kind in PLANNED_EVENTS for event in record.events))
        risks.append(risk)
        if ratio is None and not scorer.detection.certain:
            # "warming up: 3 of 48 records" and its successors are one reason.
            reasons = {reason.partition(":")[0] for reason in risk.reasons.values()}
            for reason in sorted(reasons) or ["no forecast"]:
                lacking[reason] = lacking.get(reason, 0) + 1
        progress()
    if not steps:
        raise ValueError(f"{run} has no record")
    at = np.array(steps, np.int64)
    return Track(
        run=run,
        attempt=attempt,
        steps=at,
        seconds=_training_seconds(at, np.array(stamps) if timed else None, seconds_per_step),
        tokens=np.array(tokens),
        loss=np.array(losses),
        has_loss=np.array(has_loss),
        score=np.array(score),
        detected=np.array(detected),
        suspected=np.array(suspected),
        planned=np.array(planned),
        risks=tuple(risks),
        lacking=lacking,
    )


def _training_seconds(
    steps: npt.NDArray[np.int64], stamps: FloatArray | None, per_step: float | None
) -> FloatArray:
    """Seconds since the first record without pauses; NaN without a clock that moves on."""
    if per_step is not None:
        return np.asarray((steps - steps[0]) * per_step, np.float64)
    gaps = np.zeros(0) if stamps is None else np.diff(stamps)
    if gaps.size == 0 or not (gaps > 0).any() or (gaps < 0).any():
        return np.full(len(steps), np.nan)
    usual = float(np.median(gaps[gaps > 0]))
    worked = np.where(gaps > _PAUSE * usual, usual, gaps)
    return np.concatenate([[0.0], np.cumsum(worked)])


def replay(tracks: Sequence[Track], policy: ReplayPolicy) -> Replay:
    """Apply a policy to tracks.

    Args:
        tracks: One per attempt.
        policy: With a weekly budget the factor is chosen on these tracks: the smallest that keeps
            it.

    Raises:
        ValueError: No track, or a weekly budget and no record tells the time.
    """
    if not tracks:
        raise ValueError("nothing to replay: no record in what was given")
    weeks = _weeks(tracks)
    factors = np.geomspace(0.25, 64.0, _GRID)
    labels = [_label(t) for t in tracks]
    curve = tuple(_buys(tracks, labels, float(f), policy, weeks) for f in factors)
    notes = _notes(tracks, labels, weeks)
    if policy.vain_pages_per_week is not None:
        if weeks is None:
            raise ValueError(
                "vain_pages_per_week needs times: the records tell none; set seconds_per_step"
            )
        chosen, note = _choose(curve, policy.vain_pages_per_week, weeks)
        policy = replace(policy, threshold_factor=chosen, vain_pages_per_week=None)
        notes += note
    runs = tuple(_apply(t, label, policy) for t, label in zip(tracks, labels, strict=True))
    return Replay(policy=policy, runs=runs, weeks=weeks, curve=curve, notes=tuple(notes))


def _weeks(tracks: Sequence[Track]) -> float | None:
    seconds = [float(t.seconds[-1]) for t in tracks]
    return None if any(math.isnan(s) for s in seconds) else sum(seconds) / _WEEK


@dataclass(frozen=True, slots=True)
class _Label:
    kind: Kind | None
    onset: int | None


def _label(t: Track) -> _Label:
    if not t.has_loss.any():
        return _Label(None, None)
    found = label_run(t.steps[t.has_loss], t.loss[t.has_loss])
    return _Label(found.kind, found.onset)


def _apply(t: Track, label: _Label, policy: ReplayPolicy) -> RunReplay:
    machine = AlertMachine(policy.threshold_factor, policy.alerts)
    pages: list[Page] = []
    before: tuple[str, RiskKind | None] = ("ok", None)
    for index in range(len(t.steps)):
        if t.planned[index]:
            machine.rebaseline()
        ratio = float(t.score[index])
        state = machine.update(
            None if math.isnan(ratio) else ratio,
            detected=bool(t.detected[index]),
            suspected=bool(t.suspected[index]),
        )
        began = state == "firing" and before[0] != "firing"
        # A forecast that comes true is told once more, as the service does.
        turned = state == "firing" and before == ("firing", "forecast") != (state, machine.kind)
        if (began or turned) and machine.kind is not None:
            pages.append(_page(t, index, machine.kind, label))
        before = (state, machine.kind)
    return RunReplay(
        run=t.run,
        attempt=t.attempt,
        records=len(t.steps),
        label=label.kind,
        onset=label.onset,
        hours=None if math.isnan(t.seconds[-1]) else float(t.seconds[-1]) / 3600,
        pages=tuple(p for p in pages if _is_sent(p, policy)),
        lacking=dict(t.lacking),
    )


def _is_sent(page: Page, policy: ReplayPolicy) -> bool:
    return page.kind in policy.page_on and page.step >= policy.quiet_steps


def _page(t: Track, index: int, kind: RiskKind, label: _Label) -> Page:
    step = int(t.steps[index])
    risk = t.risks[index]
    known = [value for value in risk.probability.values() if value is not None]
    page = Page(
        step=step,
        kind=kind,
        probability=max(known) if known else None,
        outcome="in vain",
        drivers=tuple(d.signal + (f" in {d.layer}" if d.layer else "") for d in risk.drivers[:3]),
    )
    if label.onset is None or label.onset - step > _LONGEST:
        return page
    rise = min(int(np.searchsorted(t.steps, label.onset)), len(t.steps) - 1)
    lead = label.onset - step
    tokens = float(t.tokens[rise] - t.tokens[index])
    seconds = float(t.seconds[rise] - t.seconds[index])
    return replace(
        page,
        outcome="in time" if lead > 0 else "late",
        lead_steps=lead,
        lead_tokens=tokens if math.isfinite(tokens) else None,
        lead_hours=None if math.isnan(seconds) else seconds / 3600,
    )


def _buys(
    tracks: Sequence[Track],
    labels: Sequence[_Label],
    factor: float,
    policy: ReplayPolicy,
    weeks: float | None,
) -> Budget:
    vain, events, hits = 0, 0, 0
    for t, label in zip(tracks, labels, strict=True):
        events += label.onset is not None
        steps = t.steps[_forecasts(t, factor, policy.alerts)]
        steps = steps[steps >= policy.quiet_steps]
        if label.onset is None:
            vain += len(steps)
            continue
        ahead = label.onset - steps
        vain += int((ahead > _LONGEST).sum())
        hits += bool(((ahead > 0) & (ahead <= _LONGEST)).any())
    rate, highest = _per_week(vain, weeks)
    return Budget(
        factor=factor,
        vain_per_week=rate,
        vain_highest=highest,
        forecast=hits / events if events else None,
        forecast_interval=_share_interval(hits, events) if events else None,
    )


def _forecasts(t: Track, factor: float, settings: AlertSettings) -> list[int]:
    """Records at which an alarm on forecasts begins."""
    # Once the loss has left its band an alarm is a detection.
    scores = np.where(t.detected | t.suspected, np.nan, t.score)
    return alarm_starts(scores, factor, settings)


def _per_week(count: int, weeks: float | None) -> tuple[float | None, float | None]:
    if not weeks:
        return None, None
    # Garwood's interval of a Poisson count.
    high = float(stats.chi2.ppf((1 + _CONFIDENCE) / 2, 2 * (count + 1))) / 2
    return count / weeks, high / weeks


def _share_interval(hits: int, events: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share."""
    found = stats.binomtest(hits, events).proportion_ci(_CONFIDENCE, method="exact")
    return float(found.low), float(found.high)


def _choose(curve: Sequence[Budget], wanted: float, weeks: float) -> tuple[float, tuple[str, ...]]:
    """The smallest factor from which on the budget is kept."""
    if not weeks:
        return 1.0, ("no time passes in these records: the factor is the model's own",)
    factor = curve[-1].factor
    for step in reversed(curve):
        if step.vain_per_week is None or step.vain_per_week > wanted:
            break
        factor = step.factor
    if curve[-1].vain_per_week is not None and curve[-1].vain_per_week > wanted:
        return factor, ("no threshold keeps the budget on these runs; the highest was taken",)
    if wanted * weeks < 1:
        # So little shows what is too talkative, but not what is quiet enough.
        return max(factor, 1.0), (
            f"{weeks:.2g} weeks are too few for a budget of {wanted:g} a week: on them it allows no"
            " page in vain at all; the factor is the model's own or more",
        )
    return factor, ()


def _notes(
    tracks: Sequence[Track], labels: Sequence[_Label], weeks: float | None
) -> tuple[str, ...]:
    notes = []
    events = sum(label.onset is not None for label in labels)
    if events == 0:
        notes.append(
            "no run diverged: this says how often you would be paged, not what it is worth"
        )
    elif events < 10:
        notes.append(f"{events} divergences: what share is forecast is known only roughly")
    if weeks is None:
        notes.append("some records tell no time: nothing can be said per week (seconds_per_step)")
    blind = sum(not t.has_loss.any() for t in tracks)
    if blind:
        notes.append(f"{blind} attempts hold no loss: whether they diverged is not known")
    silent = [t for t in tracks if np.isnan(t.score).all()]
    if silent:
        notes.append(f"{len(silent)} attempts have no forecast at any record: see lacking")
    return tuple(notes)
