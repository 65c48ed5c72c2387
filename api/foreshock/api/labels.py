"""What happened to a run, from its loss alone: healthy, spike, stalled, diverged or nan, and when.

A slow drift is seen against another run's loss only: that of a twin.

The one implementation of labels and onsets. Looks at the whole run, so it never feeds a forecast:
features, alarms and detection are deliberately elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "HISTORY",
    "WINDOW",
    "Kind",
    "LossEvent",
    "RunLabel",
    "band_of",
    "label_drift",
    "label_run",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
Kind = Literal["healthy", "spike", "stalled", "diverged", "nan", "drift"]

WINDOW: Final = 64
"""Trailing logged points that a point is compared with."""
RECENT: Final = 16
"""Points of the window whose median is the level; the whole window lags behind a falling loss."""
HISTORY: Final = 12
"""Points needed before a point is judged."""
SIGMAS: Final = 7.0
GAP: Final = 16
"""Excursions at most so many points apart are one event."""
MALIGNANT_STEPS: Final = 1000
"""A spike that is not back after so many steps is malignant."""

_DRIFT_POINTS: Final = 50
"""Points for which a run must have left its twin."""


@dataclass(frozen=True, slots=True)
class LossEvent:
    """One excursion of the loss, or several close together.

    Attributes:
        onset: Step at which the loss begins to rise (t_rise).
        crossing: Step at which it leaves its band (7 sigma).
        end: Last step of the excursion.
        peak: Largest finite loss within it.
        malignant: Not back at its level from before within 1,000 steps.
    """

    onset: int
    crossing: int
    end: int
    peak: float
    malignant: bool


@dataclass(frozen=True, slots=True)
class RunLabel:
    """What happened to a run.

    Attributes:
        kind: nan and diverged are final; spike means at least one event, however it ended; drift:
            left its twin for good without any of these.
        onset: t_rise of the run's divergence (nan, diverged or malignant spike); None without one.
        crossing: Where that divergence crosses its threshold, or becomes non-finite.
        events: Every excursion, in order.
        outlier_batches: Steps of excursions too short to be an event.
        note: jump, drift, ends-in-excursion, transient, short: how the rule saw it.
    """

    kind: Kind
    onset: int | None = None
    crossing: int | None = None
    events: tuple[LossEvent, ...] = ()
    outlier_batches: tuple[int, ...] = ()
    note: str = ""

    @property
    def diverges(self) -> bool:
        """Whether the run holds the event that a forecast is about."""
        return self.onset is not None


@dataclass(frozen=True, slots=True)
class _Band:
    """Per point: trailing median, noise sigma and how far a point may rise, NaN without history."""

    middle: FloatArray
    sigma: FloatArray
    rise: FloatArray


def label_run(steps: npt.ArrayLike, loss: npt.ArrayLike) -> RunLabel:
    """Label a run by its loss.

    Rule (evaluation protocol, sections 1 and 4.1): a point is an excursion when it rises above its
    trailing median by max(7 sigma, 3 %, 3 % of the progress made, twice the 90th percentile of
    residuals). A run is `nan` when the loss stays non-finite; `diverged` when the median of its
    last 5 % is above 20 % of its progress, 4 sigma and 3 % over the best stretch of that length, or
    when it ends inside an excursion that lost half of the progress.

    Args:
        steps: (T,) rising optimizer steps of the logged points; the log interval is their median
            difference.
        loss: (T,) losses; non-finite = logged as such. Leave out points without a loss.

    Raises:
        ValueError: Shapes differ, or steps do not rise.
    """
    step = np.asarray(steps, dtype=np.float64).ravel()
    values = np.asarray(loss, dtype=np.float64).ravel()
    if step.shape != values.shape:
        raise ValueError(f"{step.size} steps and {values.size} losses; give one loss per step")
    if np.any(np.diff(step) <= 0):
        raise ValueError("steps do not rise; label each attempt by itself")
    return _Labeller(step, values).label()


def label_drift(
    steps: npt.ArrayLike, loss: npt.ArrayLike, reference: npt.ArrayLike
) -> RunLabel | None:
    """Whether a run left its twin slowly and for good.

    The excess is the difference of the medians of 16 points. It drifts when, from some point to the
    end and for at least 50 points, it stays above its lowest value so far by 4 sigma of its own
    noise, a tenth of the twin's progress and 3 % of the twin's level. The onset is where it last
    was within a tenth of that.

    Args:
        steps: (T,) rising, of points that both runs logged.
        loss: (T,) of the run, finite.
        reference: (T,) of the twin, finite.

    Returns:
        The label, or None where the run stayed with its twin.
    """
    step = np.asarray(steps, dtype=np.float64)
    own, other = np.asarray(loss, np.float64), np.asarray(reference, np.float64)
    if step.size < 4 * _DRIFT_POINTS:
        return None
    level = _trailing_median(other, RECENT)
    excess = _trailing_median(own, RECENT) - level
    noise = 1.4826 * float(np.median(np.abs(np.diff(own - other)))) / np.sqrt(RECENT)
    progress = np.maximum(np.max(other[:3]) - np.minimum.accumulate(level), 0.0)
    above = excess - np.minimum.accumulate(excess)
    needed = np.maximum(np.maximum(4 * noise, 0.1 * progress), 0.03 * np.abs(level))
    low = np.flatnonzero(above <= needed)
    first = int(low[-1]) + 1 if low.size else 0
    if step.size - first < _DRIFT_POINTS:
        return None
    calm = np.flatnonzero(above[:first] <= 0.1 * needed[:first])
    onset = int(calm[-1]) + 1 if calm.size else first
    return RunLabel("drift", int(step[onset]), int(step[first]), note="twin")


class _Labeller:
    """The rule on one run; indices refer to the finite points before the loss is lost for good."""

    def __init__(self, step: FloatArray, values: FloatArray) -> None:
        finite = np.isfinite(values)
        self.lost, self.transient = _nonfinite(finite)
        self.lost_step = None if self.lost is None else int(step[self.lost])
        keep = finite.copy()
        if self.lost is not None:
            keep[self.lost :] = False
        self.step, self.loss = step[keep], values[keep]
        self.interval = float(np.median(np.diff(step))) if step.size > 1 else 1.0
        self.median5 = _centred_median(self.loss, 5)
        self.start = float(self.loss[:3].max()) if self.loss.size else np.nan
        self.best = float(self.median5.min()) if self.loss.size else np.nan
        self.progress = max(self.start - self.best, 0.0) if self.loss.size else np.nan
        self.band = _band(self.loss, self.start, self.median5)

    def label(self) -> RunLabel:
        events, outliers = self._events()
        if self.lost_step is not None:
            return self._lost(events, outliers)
        if self.loss.size == 0:
            return RunLabel("healthy", note="short")
        found = self._diverged(events)
        if found is not None:
            first, note = found
            return self._final("diverged", first, events, outliers, note)
        if self.progress < 0.02 * abs(self.start):
            return RunLabel("stalled", None, None, events, outliers)
        malignant = next((e for e in events if e.malignant), None)
        if malignant is not None:
            return RunLabel(
                "spike", malignant.onset, malignant.crossing, events, outliers, "malignant"
            )
        if events or self.transient:
            return RunLabel("spike", None, None, events, outliers, _note(self.transient))
        return RunLabel("healthy", None, None, events, outliers)

    def _lost(self, events: tuple[LossEvent, ...], outliers: tuple[int, ...]) -> RunLabel:
        """The loss became non-finite for good: the onset is the rise that ran into it, if any."""
        assert self.lost_step is not None
        found = self._diverged(events) if self.loss.size > HISTORY else None
        if found is not None:
            return self._final("nan", found[0], events, outliers, "diverged-before-nan")
        last = events[-1] if events else None
        if last is not None and self._points_between(last.end, self.lost_step) <= GAP:
            return RunLabel("nan", last.onset, last.crossing, events, outliers)
        note = "short" if self.loss.size <= HISTORY else ""
        return RunLabel("nan", self.lost_step, self.lost_step, events, outliers, note)

    def _points_between(self, first: int, last: int) -> int:
        return int(np.count_nonzero((self.step > first) & (self.step < last)))

    def _final(
        self,
        kind: Kind,
        index: int,
        events: tuple[LossEvent, ...],
        outliers: tuple[int, ...],
        note: str,
    ) -> RunLabel:
        onset = int(self.step[self._rise(index)])
        covering = [e for e in events if e.crossing <= self.step[index] <= e.end]
        if covering:
            onset = min(onset, covering[0].onset)
        later = [e.crossing for e in events if e.crossing >= onset]
        crossing = later[0] if later else int(self.step[index])
        return RunLabel(kind, onset, crossing, events, outliers, note)

    def _diverged(self, events: tuple[LossEvent, ...]) -> tuple[int, str] | None:
        """First point of a final rise and how it was seen, or None."""
        count = self.loss.size
        if count <= HISTORY or self.progress <= 0:
            return None
        width = int(np.clip(round(0.05 * count), 8, 100))
        stretch = _trailing_median(self.loss, min(width, count))
        best, last = float(np.min(stretch)), float(stretch[-1])
        sigma = _noise(self.loss, self.median5)
        rise = last - best
        if rise > max(0.2 * self.progress, 4 * sigma, 0.03 * abs(best)):
            first = self._leaves(best)
            at = int(self.step[first])
            near = any(self._points_between(e.crossing, at) <= GAP for e in events if e.end >= at)
            return first, "jump" if near else "drift"
        inside = events and events[-1].end >= self.step[-1]
        if inside and float(np.median(self.loss[-3:])) - self.best > 0.5 * self.progress:
            return int(np.searchsorted(self.step, events[-1].crossing)), "ends-in-excursion"
        return None

    def _leaves(self, best: float) -> int:
        """First point after the last one within 10 % of the progress of the best."""
        within = np.flatnonzero(self.loss <= best + 0.1 * self.progress)
        return min(int(within[-1]) + 1, self.loss.size - 1) if within.size else 0

    def _rise(self, index: int) -> int:
        """Walk back from a crossing to just after the last calm point (t_rise)."""
        median3 = _trailing_median(self.loss, 3)
        calm = median3 <= self.band.middle + self.band.sigma
        before = np.flatnonzero(calm[:index])
        return int(before[-1]) + 1 if before.size else index

    def _events(self) -> tuple[tuple[LossEvent, ...], tuple[int, ...]]:
        above = self.loss - self.band.middle > self.band.rise
        events: list[LossEvent] = []
        outliers: list[int] = []
        for first, last in _clusters(np.flatnonzero(above)):
            if self._is_event(first, last, above):
                events.append(self._event(first, last))
            else:
                outliers.append(int(self.step[first]))
        return tuple(events), tuple(outliers)

    def _is_event(self, first: int, last: int, above: npt.NDArray[np.bool_]) -> bool:
        if self.interval <= 1.5:
            return self._stays(first, last)
        points = int(np.count_nonzero(above[first : last + 1]))
        if self.interval <= 10 and points < 2:
            return False
        height = float(np.max(self.loss[first : last + 1] - self.band.middle[first : last + 1]))
        return points > 1 or height >= 0.1 * self.progress

    def _stays(self, first: int, last: int) -> bool:
        """Dense logs: the 3-point median stays above half the threshold for 4 points or more."""
        level = self.band.middle[first] + self.band.rise[first] / 2
        stretch = slice(max(first - 1, 0), min(last + 6, self.loss.size))
        return _longest_run(_centred_median(self.loss[stretch], 3) > level) >= 4

    def _event(self, first: int, last: int) -> LossEvent:
        level = self.band.middle[first] + self.band.sigma[first] * 2
        calm = np.flatnonzero(self.median5[last:] <= level)
        crossing = int(self.step[first])
        back = self.step[last + calm[0]] if calm.size else None
        known = self.step[-1] - crossing >= MALIGNANT_STEPS
        malignant = (back is None and known) or (
            back is not None and back - crossing > MALIGNANT_STEPS
        )
        return LossEvent(
            onset=int(self.step[self._rise(first)]),
            crossing=crossing,
            end=int(self.step[last]),
            peak=float(np.max(self.loss[first : last + 1])),
            malignant=bool(malignant),
        )


def _note(transient: bool) -> str:
    return "transient" if transient else ""


def _nonfinite(finite: npt.NDArray[np.bool_]) -> tuple[int | None, bool]:
    """Index of the non-finite loss that does not come back (None without), and transient ones."""
    bad = np.flatnonzero(~finite)
    if bad.size == 0:
        return None, False
    total = int(np.count_nonzero(finite))
    finite_after = total - np.cumsum(finite)[bad]
    final = bad[finite_after <= 3]
    transient = bool(np.any(finite_after > 3))
    return (int(final[0]) if final.size else None), transient


def _windows(values: FloatArray, width: int) -> FloatArray:
    return np.lib.stride_tricks.sliding_window_view(values, width)


def _centred_median(values: FloatArray, width: int) -> FloatArray:
    if values.size == 0:
        return values
    half = width // 2
    return np.asarray(np.median(_windows(np.pad(values, half, mode="edge"), width), axis=-1))


def _trailing_median(values: FloatArray, width: int) -> FloatArray:
    padded = np.concatenate([np.full(width - 1, values[0]), values])
    return np.asarray(np.median(_windows(padded, width), axis=-1))


def _noise(loss: FloatArray, smooth: FloatArray) -> float:
    """Sigma of the second half's scatter around its 5-point median."""
    residual = (loss - smooth)[loss.size // 2 :]
    return float(1.4826 * np.median(np.abs(residual)))


def _band(loss: FloatArray, start: float, median5: FloatArray) -> _Band:
    count = loss.size
    middle, sigma, q90 = (np.full(count, np.nan) for _ in range(3))
    for index in range(HISTORY, min(WINDOW, count)):
        m, s, q = _window_statistics(loss[None, :index])
        middle[index], sigma[index], q90[index] = m[0], s[0], q[0]
    if count > WINDOW:
        rows = _windows(loss, WINDOW)[:-1]
        for first in range(0, rows.shape[0], 8192):
            part = slice(WINDOW + first, WINDOW + first + 8192)
            m, s, q = _window_statistics(rows[first : first + 8192])
            middle[part], sigma[part], q90[part] = m, s, q
    progress = start - np.minimum.accumulate(median5) if count else loss
    floor = np.maximum(0.03 * np.abs(middle), 0.03 * np.maximum(progress, 0.0))
    rise = np.fmax(np.maximum(SIGMAS * sigma, floor), 2 * q90)
    return _Band(middle, sigma, rise)


def band_of(window: FloatArray, progress: float) -> tuple[float, float, float]:
    """The band after a trailing window of losses.

    Args:
        window: (points,), at least `HISTORY`, the latest last.
        progress: Loss at the start less the best so far.

    Returns:
        Level, noise sigma, and the rise above the level that counts as an excursion.
    """
    middle, sigma, q90 = (float(v[0]) for v in _window_statistics(window[None]))
    floor = 0.03 * max(abs(middle), progress)
    return middle, sigma, max(SIGMAS * sigma, floor, 2 * q90)


def _window_statistics(rows: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Recent median, detrended MAD-sigma and 90th percentile of the residual, of (n, width)."""
    width = rows.shape[-1]
    middle = np.median(rows[:, -RECENT:], axis=-1)
    time = np.arange(width) - (width - 1) / 2
    slope = rows @ time / np.square(time).sum()
    residual = rows - slope[:, None] * time
    residual = residual - np.median(residual, axis=-1, keepdims=True)
    sigma = 1.4826 * np.median(np.abs(residual), axis=-1)
    return middle, sigma, np.quantile(residual, 0.9, axis=-1)


def _clusters(index: IntArray) -> list[tuple[int, int]]:
    if index.size == 0:
        return []
    breaks = np.flatnonzero(np.diff(index) > GAP)
    firsts = index[np.concatenate([[0], breaks + 1])]
    lasts = index[np.concatenate([breaks, [index.size - 1]])]
    return [(int(a), int(b)) for a, b in zip(firsts, lasts, strict=True)]


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    longest = current = 0
    for flag in flags:
        current = current + 1 if flag else 0
        longest = max(longest, current)
    return longest
