"""When to raise an alarm and when to take it back: a pure state machine with hysteresis.

Delivers nothing. Forecasts need several records above a threshold; a detection (the loss itself
shows it) brings its own persistence and fires at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from foreshock.monitor.record import AlertState, RiskKind

__all__ = ["PLANNED_EVENTS", "AlertMachine", "AlertSettings", "alarm_starts"]

PLANNED_EVENTS = frozenset({"data_switch", "restart", "lr_change", "rollback"})
"""Events after which levels start afresh instead of alarming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertSettings:
    """Hysteresis.

    Attributes:
        need: Records above the threshold, out of the last `of`, that fire.
        of: See `need`.
        release: A record is calm below this share of the threshold.
        calm: Calm records in a row that resolve, and after which resolved becomes ok.
    """

    need: int = 3
    of: int = 5
    release: float = 0.5
    calm: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.need <= self.of:
            raise ValueError(f"need is {self.need} of {self.of}; allowed: 1 to {self.of}")
        if not 0 < self.release <= 1 or self.calm < 1:
            raise ValueError("allowed: release in (0, 1], calm >= 1")


class AlertMachine:
    """The alert of one run and attempt.

    Args:
        threshold: Forecast probability that counts as high; None never fires on a forecast.
        settings: Hysteresis.
    """

    def __init__(self, threshold: float | None, settings: AlertSettings | None = None) -> None:
        self.settings = settings or AlertSettings()
        self.threshold = threshold
        self.state: AlertState = "ok"
        self.kind: RiskKind | None = None
        self._high: deque[bool] = deque(maxlen=self.settings.of)
        self._calm = 0

    def rebaseline(self) -> None:
        """A planned event: what was high before it does not count any more."""
        self._high.clear()

    def update(self, probability: float | None, *, detected: bool, suspected: bool) -> AlertState:
        """Take in one record.

        Args:
            probability: The forecast that the threshold is for; None = no forecast.
            detected: The loss itself shows a divergence.
            suspected: The loss may show one, not for long enough yet.
        """
        high = (
            probability is not None and self.threshold is not None and probability >= self.threshold
        )
        self._high.append(high)
        quiet = not detected and not suspected and self._below(probability)
        self._calm = self._calm + 1 if quiet else 0
        # Once the loss has left its band, whether it diverges is for detection to say: an alarm
        # that begins then is no forecast.
        alarm = detected or (sum(self._high) >= self.settings.need and not suspected)
        began = alarm and self.state != "firing"
        if self.state == "firing":
            if self._calm >= self.settings.calm:
                self.state, self._calm = "resolved", 0
                self._high.clear()
        elif alarm:
            self.state = "firing"
        elif any(self._high) or suspected:
            self.state = "pending"
        elif self.state != "resolved" or self._calm >= self.settings.calm:
            self.state = "ok"
        self._set_kind(detected=detected, suspected=suspected, began=began)
        return self.state

    def _below(self, probability: float | None) -> bool:
        if probability is None or self.threshold is None:
            return True
        return probability < self.settings.release * self.threshold

    def _set_kind(self, *, detected: bool, suspected: bool, began: bool) -> None:
        if self.state in ("ok", "resolved"):
            self.kind = None
        elif detected or (suspected and self.state == "pending"):
            self.kind = "detection"
        elif began or self.state == "pending":
            self.kind = "forecast"


def alarm_starts(
    scores: npt.NDArray[np.float64], threshold: float, settings: AlertSettings | None = None
) -> list[int]:
    """Positions at which a machine with this threshold begins to fire on forecasts alone.

    The same as running `AlertMachine` over the scores, without running it: thresholds are searched
    over hundreds of thousands of records.

    Args:
        scores: (T,), NaN = no forecast.
        threshold: Scores from it on are high.
        settings: Hysteresis; `calm` is at least `of`.

    Raises:
        ValueError: `calm` is below `of`.
    """
    settings = settings or AlertSettings()
    if settings.calm < settings.of:
        raise ValueError(f"calm is {settings.calm}; allowed here: {settings.of} or more")
    with np.errstate(invalid="ignore"):
        high = scores >= threshold
        low = ~(scores >= settings.release * threshold)
    if not high.any():
        return []
    sums = np.cumsum(high)
    recent = sums - np.concatenate([np.zeros(settings.of, np.intp), sums])[: len(sums)]
    fires = np.flatnonzero(high & (recent >= settings.need))
    position = np.arange(len(scores))
    last_loud = np.maximum.accumulate(np.where(low, -1, position))
    quiet = np.flatnonzero(position - last_loud >= settings.calm)
    starts: list[int] = []
    free = 0
    while (at := int(np.searchsorted(fires, free))) < len(fires):
        starts.append(int(fires[at]))
        calm = int(np.searchsorted(quiet, starts[-1]))
        if calm == len(quiet):
            break
        free = int(quiet[calm]) + 1
    return starts
