"""Detection: does the loss itself already show a divergence? Causal, robust, needs no model.

The same band as the labels use, but from records up to now only. It forecasts nothing: by the time
it speaks the loss has risen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from foreshock.api.labels import HISTORY, WINDOW, band_of

__all__ = ["Detection", "LossDetector"]

_FORGET: Final = 512
"""Records after which a level that stays becomes the new normal."""
_DRIFT_MEMORY: Final = 16
_DRIFT_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Detection:
    """What the loss shows at one record.

    Attributes:
        detected: It has left its band for long enough, drifted far, or is non-finite.
        suspected: It has left its band just now.
        certain: It is non-finite.
        reason: In words; empty when quiet.
    """

    detected: bool = False
    suspected: bool = False
    certain: bool = False
    reason: str = ""


_QUIET: Final = Detection()


class LossDetector:
    """Watches the loss of one run and attempt."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._calm: deque[float] = deque(maxlen=WINDOW)
        self._intervals: deque[int] = deque(maxlen=15)
        self._last_step: int | None = None
        self._first: list[float] = []
        self._best = math.inf
        self._recent: deque[float] = deque(maxlen=_DRIFT_MEMORY)
        self._level: float | None = None
        self._sigma = 0.0
        self._height = 0.0
        self._above: deque[bool] = deque(maxlen=4)
        self._excursion: deque[float] = deque(maxlen=_DRIFT_MEMORY)
        self._since = 0
        self._drifted = False

    def rebaseline(self) -> None:
        """A planned event: the level starts afresh."""
        last, intervals = self._last_step, self._intervals
        self._clear()
        self._last_step, self._intervals = last, intervals

    def update(self, step: int, loss: float | None) -> Detection:
        """Take in one record; None = no loss in it.

        A step at or below the last one starts the run afresh.
        """
        if self._last_step is not None and step <= self._last_step:
            self._clear()
        if loss is None:
            return _QUIET
        if self._last_step is not None:
            self._intervals.append(step - self._last_step)
        self._last_step = step
        if not math.isfinite(loss):
            return Detection(detected=True, certain=True, reason=f"loss is {loss}")
        self._track(loss)
        if self._level is not None:
            return self._follow(loss)
        return self._look(loss) or self._drift() or _QUIET

    def _track(self, loss: float) -> None:
        if len(self._first) < 3:
            self._first.append(loss)
        self._recent.append(loss)
        if len(self._recent) == _DRIFT_MEMORY:
            self._best = min(self._best, _median(self._recent))

    def _progress(self) -> float:
        return max(max(self._first) - self._best, 0.0) if math.isfinite(self._best) else 0.0

    def _look(self, loss: float) -> Detection | None:
        """Outside an excursion: is this the first point of one?"""
        calm = self._calm
        # Below a recent value it cannot be far above all of them; saves the medians.
        if len(calm) < HISTORY or loss <= max(list(calm)[-4:]):
            calm.append(loss)
            return None
        middle, sigma, rise = band_of(np.array(calm), self._progress())
        if loss - middle <= rise:
            calm.append(loss)
            return None
        self._level, self._sigma, self._since = middle, sigma, 0
        self._height = rise
        self._above.clear()
        self._excursion.clear()
        return self._follow(loss)

    def _follow(self, loss: float) -> Detection:
        assert self._level is not None
        self._since += 1
        self._excursion.append(loss)
        self._above.append(loss > self._level + self._height / 2)
        rise = loss - self._level
        if sum(self._above) >= self._needed(rise):
            reason = f"loss {loss:.4g} rose {rise:.3g} above its usual {self._level:.4g}"
            if self._since >= _FORGET:
                self._accept()
            return Detection(detected=True, reason=reason)
        if not any(self._above) or (self._since > 4 and sum(self._above) < 2):
            self._level = None
            # What came back is part of the normal scatter: a loss with two modes says so once.
            self._calm.extend(self._excursion)
            return _QUIET
        return Detection(suspected=True, reason="loss left its band")

    def _needed(self, rise: float) -> int:
        """Points above; a sparse log has few, so a high one is enough."""
        interval = _median(self._intervals) if self._intervals else 1.0
        if interval <= 1.5:
            return 4 if self._since <= 4 else 3
        if interval > 10 and rise >= 0.1 * self._progress() and self._height > 0:
            return 1
        return 2

    def _accept(self) -> None:
        """The level has stayed: take it for normal."""
        self._level = None
        self._calm.clear()
        self._best = math.inf

    def _drift(self) -> Detection | None:
        """Slow rises that no band catches: a quarter of the progress is lost."""
        if len(self._recent) < _DRIFT_MEMORY or len(self._calm) < WINDOW:
            return None
        now = _median(self._recent)
        lost = now - self._best
        if not self._has_drifted(now, lost):
            self._drifted = False
            return None
        self._drifted = True
        return Detection(
            detected=True, reason=f"loss {now:.4g} drifted up from its best, {self._best:.4g}"
        )

    def _has_drifted(self, now: float, lost: float) -> bool:
        if self._drifted:  # half of it must come back
            return lost > 0.5 * _DRIFT_SHARE * self._progress()
        if lost <= max(_DRIFT_SHARE * self._progress(), 0.03 * abs(self._best)):
            return False
        return lost > 4 * _scatter(self._recent)


def _scatter(values: Sequence[float]) -> float:
    """Sigma of the noise about a rising line through the values, or about their level.

    About the level a smooth rise would count as noise, the more the steeper it is. What does not
    rise any more is not given the benefit: a loss that wanders slowly is no divergence.
    """
    middle = (len(values) - 1) / 2
    slope = sum((i - middle) * v for i, v in enumerate(values)) / sum(
        (i - middle) ** 2 for i in range(len(values))
    )
    straight = [v - max(slope, 0.0) * i for i, v in enumerate(values)]
    level = _median(straight)
    return 1.4826 * _median([abs(v - level) for v in straight])


def _median(values: Iterable[float]) -> float:
    """Of a few numbers, ten times as fast as numpy's."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return (ordered[middle - 1] + ordered[middle]) / 2
