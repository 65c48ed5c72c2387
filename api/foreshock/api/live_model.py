"""A fitted forecaster made fast for one row at a time: every tree of every interval in one walk.

Gives the same numbers as `DivergenceForecaster`, which does batches. It learns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from foreshock.api.forest import Forest

__all__ = ["LiveModel", "RowAnswer"]

FloatArray = npt.NDArray[np.float64]

RowAnswer = tuple[FloatArray, FloatArray, FloatArray, FloatArray]
"""Probability, low and high (horizons,), and contributions (features,)."""


class LiveModel:
    """The trees of all intervals, walked together.

    Args:
        forests: One per supported interval; equally many models and trees in each.
        slopes: Calibration per interval.
        shifts: Calibration per interval.
        horizons: Number of horizons asked for, supported or not.
        base_rate: Onsets per step that the model was fitted to.
    """

    def __init__(
        self,
        forests: Sequence[Forest],
        slopes: Sequence[float],
        shifts: Sequence[float],
        *,
        horizons: int,
        base_rate: float,
    ) -> None:
        self._slopes, self._shifts = list(slopes), list(shifts)
        self._horizons, self._base_rate = horizons, base_rate
        offsets = np.cumsum([0, *(len(f.feature) for f in forests)])
        pairs = list(zip(forests, offsets, strict=False))

        def joined(name: str, *, moved: bool) -> npt.NDArray[np.intp]:
            arrays = [getattr(f, name) + (at if moved else 0) for f, at in pairs]
            return np.concatenate([np.zeros(0), *map(np.ravel, arrays)]).astype(np.intp)

        self._roots = joined("roots", moved=True)
        self._left, self._right = joined("left", moved=True), joined("right", moved=True)
        self._feature = joined("feature", moved=False)
        self._threshold = np.concatenate([f.threshold for f in forests] or [np.zeros(0)])
        self._mean = np.concatenate([f.mean for f in forests] or [np.zeros(0)])
        self._start = np.array([f.start for f in forests])
        self._shape = (len(forests), *forests[0].roots.shape) if forests else (0, 0, 0)
        self._depth = max((f.depth for f in forests), default=0)

    def explain(self, row: FloatArray, *, prior: float | None = None) -> RowAnswer:
        """Probability and band per horizon, and what each feature adds.

        Args:
            row: (features,); NaN = missing = as usual.
            prior: Expected onsets per step here; None keeps the training rate.

        Returns:
            Probability, low, high: (horizons,), NaN where not supported. Contributions (features,):
            log-odds added to the hazard of the second interval (the first, if it is alone).
        """
        middle, low, high = (np.full(self._horizons, np.nan) for _ in range(3))
        intervals, models, trees = self._shape
        if not intervals:
            return middle, low, high, np.zeros(row.size)
        told = min(1, intervals - 1)
        part = slice(told * models * trees, (told + 1) * models * trees)
        leaves, parts = self._walk(np.where(np.isnan(row), 0.0, row), part)
        scores = (self._start + leaves.reshape(self._shape).sum(axis=-1)).tolist()
        moved = 0.0 if prior is None or self._base_rate <= 0 else math.log(prior / self._base_rate)
        ends = [1.0, 1.0, 1.0]
        for index, values in enumerate(scores):
            slope, shift = self._slopes[index], self._shifts[index]
            log_odds = [slope * value + shift for value in values]
            centre = sum(log_odds) / models
            variance = sum((value - centre) ** 2 for value in log_odds) / models
            spread = 1.96 * math.sqrt((models - 1) * variance)
            for place, offset in enumerate((0.0, -spread, spread)):
                ends[place] *= _complement(centre + moved + offset)
            middle[index], low[index], high[index] = (1.0 - end for end in ends)
        return middle, low, high, self._slopes[told] * parts / models

    def _walk(self, row: FloatArray, part: slice) -> tuple[FloatArray, FloatArray]:
        """Leaf values (trees,), and what each feature adds on the way in the trees of `part`."""
        node = self._roots
        features, gains = [], []
        before = self._mean.take(node[part])
        for _ in range(self._depth):
            feature = self._feature.take(node)
            goes_left = row.take(feature) <= self._threshold.take(node)
            node = np.where(goes_left, self._left.take(node), self._right.take(node))
            after = self._mean.take(node[part])
            features.append(feature[part])
            gains.append(after - before)
            before = after
        parts = np.bincount(
            np.concatenate(features), weights=np.concatenate(gains), minlength=row.size
        )
        return self._mean.take(node), np.asarray(parts, dtype=np.float64)


def _complement(log_odds: float) -> float:
    """1 - probability."""
    return 1.0 / (1.0 + math.exp(min(max(log_odds, -60.0), 60.0)))
