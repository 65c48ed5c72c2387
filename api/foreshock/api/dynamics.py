"""How a run's scalars and layers behave, beyond how far they moved: stalls, memory, disagreement.

Natural failures announce themselves slowly: the loss stops falling, the gradient norm leaves its
lowest level, neighbouring records become alike (critical slowing down, Scheffer et al. 2009), the
worst layers part from the median ones. Causal, constant memory, no absolute level but of noise.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "DYNAMIC_GRADIENT",
    "DYNAMIC_LOSS",
    "DYNAMIC_PLAIN",
    "DYNAMIC_SCALED",
    "ScalarDynamics",
    "role_dynamics",
]

FloatArray = npt.NDArray[np.float64]

_VIEWS: Final = ("drift", "above_low", "jitter", "memory", "bursts")
_WATCHED: Final = ("loss", "grad_norm", "update_ratio")
_ROLES: Final = ("input", "weight", "grad_output")

DYNAMIC_LOSS: Final = (*(f"loss.{view}" for view in _VIEWS), "loss.stall")
DYNAMIC_GRADIENT: Final = (
    *(f"{name}.{view}" for name in _WATCHED[1:] for view in _VIEWS),
    "grad_norm.with_loss",
    "param_norm.drift",
)
DYNAMIC_PLAIN: Final = tuple(f"{role}.{view}" for role in _ROLES for view in ("plain", "spread"))
DYNAMIC_SCALED: Final = tuple(f"{role}.{view}" for role in _ROLES for view in ("drift", "agree"))
"""In the order in which a feature vector holds them: loss, gradient, plain, scaled.

`drift` is the slow mean less the very slow one in the signal's own unit (of the loss: a share of
its progress), `above_low` how far the signal is above its lowest slow mean, `jitter` log2 of its
usual noise, `memory` the correlation of neighbouring residuals, `bursts` the mean of what passes 2
noise units; `stall` log2 of the records since the loss was at its best. Of a role: `plain` the root
mean square movement of what needs no scale (kurtosis, rms, amax), `spread` how far the worst layers
parted from the median ones (log2), `drift` as `move` but slow, `agree` the share of its signals
beyond 2 noise units.
"""

_KEEP: Final = math.exp2(-1.0 / 32.0)


class ScalarDynamics:
    """State of the scalar part; one update per record."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._before = [0.0] * 3
        self._variance = [1.0] * 3
        self._memory = [0.0] * 3
        self._bursts = [0.0] * 3
        self._low = [math.inf] * 3
        self._shared = 0.0
        self._since_best = 0

    rebaseline = clear

    def update(
        self, residuals: FloatArray, slow: FloatArray, *, settled: bool, new_best: bool
    ) -> None:
        """Take in one record.

        Args:
            residuals: (>= 3,) of loss, gradient norm and update ratio in noise units, NaN =
                missing.
            slow: (>= 3,) their slow means.
            settled: Whether the slow means have seen enough.
            new_best: Whether the loss is at its best.
        """
        fresh = 1.0 - _KEEP
        now = [min(max(v, -6.0), 6.0) if v == v else 0.0 for v in residuals[:3].tolist()]
        for index, value in enumerate(now):
            self._variance[index] += fresh * (value * value - self._variance[index])
            product = value * self._before[index]
            self._memory[index] += fresh * (product - self._memory[index])
            self._bursts[index] += fresh * (max(value - 2.0, 0.0) - self._bursts[index])
        self._shared += fresh * (now[0] * now[1] - self._shared)
        self._before = now
        if settled:
            self._low = [min(a, b) for a, b in zip(self._low, slow[:3].tolist(), strict=True)]
        self._since_best = 0 if new_best else self._since_best + 1

    def loss(self, means: FloatArray, noise: float, progress: float) -> list[float]:
        """`DYNAMIC_LOSS`.

        Args:
            means: (4,) of the loss, short to very slow.
            noise: Its usual noise.
            progress: Loss at the start less the best, positive.
        """
        return [
            _within((means[2] - means[3]) / progress, 2.0),
            _within((means[1] - self._low[0]) / progress, 2.0),
            _within(math.log2(max(noise, 1e-30) / progress), 20.0),
            *self._shape(0),
            math.log2(1.0 + self._since_best),
        ]

    def gradient(self, means: FloatArray, noise: FloatArray) -> list[float]:
        """`DYNAMIC_GRADIENT`.

        Args:
            means: (4, 4) short to very slow, of loss, gradient norm, update ratio, parameter norm.
            noise: (4,) usual noise.
        """
        values: list[float] = []
        for index in (1, 2):
            values += [
                _within(float(means[2, index] - means[3, index]), 10.0),
                _within(float(means[1, index]) - self._low[index], 10.0),
                math.log2(max(float(noise[index]), 1e-30)),
                *self._shape(index),
            ]
        scale = math.sqrt(max(self._variance[0] * self._variance[1], 1e-12))
        values.append(_within(self._shared / scale, 1.0))
        values.append(_within(float(means[2, 3] - means[3, 3]), 10.0))
        return values

    def _shape(self, index: int) -> tuple[float, float]:
        memory = self._memory[index] / max(self._variance[index], 1e-6)
        return _within(memory, 1.0), self._bursts[index]


def _within(value: float, limit: float) -> float:
    value = float(value)
    return min(max(value, -limit), limit) if math.isfinite(value) else math.nan


def role_dynamics(
    medium: FloatArray,
    slow: FloatArray,
    change: FloatArray,
    plain: npt.NDArray[np.intp],
    pairs: npt.NDArray[np.intp],
    limit: float = 10.0,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The dynamic features of one role.

    Args:
        medium: (signals,) movement in noise units, NaN = not measured.
        slow: (signals,) likewise, of the slow means.
        change: (signals,) movement in the signal's own unit.
        plain: Positions of the signals that need no scale.
        pairs: (n, 2) positions of extreme and median of the plain statistics.
        limit: Bound of the spread.

    Returns:
        (plain, spread) and (drift, agree).
    """
    known = ~np.isnan(medium)
    if not known.any():
        return (math.nan, math.nan), (math.nan, math.nan)
    apart = change[pairs[:, 0]] - change[pairs[:, 1]]
    apart = apart[~np.isnan(apart)]
    spread = min(float(np.sqrt(np.mean(apart * apart))), limit) if apart.size else math.nan
    agree = float(np.count_nonzero(np.abs(medium[known]) > 2.0)) / float(np.count_nonzero(known))
    return (_rms(medium[plain]), spread), (_rms(slow), agree)


def _rms(values: FloatArray) -> float:
    values = values[~np.isnan(values)]
    return float(np.sqrt(np.mean(values * values))) if values.size else math.nan
