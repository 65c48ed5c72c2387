"""Causal features of a run, relative to its own history only; constant memory and cost per record.

Time is counted in records. Nothing that identifies a run (step number, sizes, absolute loss or
learning rate) becomes a feature, and zero always means "as usual", so a missing signal is neutral.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from foreshock.api.dynamics import (
    DYNAMIC_GRADIENT,
    DYNAMIC_LOSS,
    DYNAMIC_PLAIN,
    DYNAMIC_SCALED,
    ScalarDynamics,
    role_dynamics,
)
from foreshock.api.signals import SIGNALS, TENSOR_SIGNALS

__all__ = [
    "DYNAMIC_FEATURES",
    "FEATURES",
    "GRADIENT_FEATURES",
    "LOSS_FEATURES",
    "MOVE_FEATURES",
    "SIGNAL_OF_FEATURE",
    "TENSOR_FEATURES",
    "FeatureExtractor",
    "FeatureSettings",
    "extract_run",
]

FloatArray = npt.NDArray[np.float64]

_SCALARS: Final = ("loss", "grad_norm", "update_ratio", "param_norm")
_TENSORS: Final = tuple(name for name in TENSOR_SIGNALS if name != "nonfinite_tensors")
_FLAGS: Final = ("loss_nonfinite", "grad_norm_nonfinite", "nonfinite_tensors")
_SCALAR_VIEWS: Final = ("short", "medium", "slow", "change", "now", "noise")
_TENSOR_VIEWS: Final = ("short", "medium", "slow", "change")
# Changes too small to matter, in the signal's unit (log2; decibels for sqnr): a signal without
# noise, such as a parameter norm, moves by many of its own sigmas in any healthy run. Ratios near
# zero stand on single elements.
_FLOORS: Final = {"sqnr_db": 0.2, "overflow_ratio": 0.2, "underflow_ratio": 0.1}
_SCALAR_FLOORS: Final = np.array([1e-6, 0.02, 0.02, 0.02])
_TENSOR_FLOORS: Final = np.array([_FLOORS.get(name.split(".")[1], 0.03) for name in _TENSORS])
_LOSS_FLOOR: Final = 2e-3
"""The loss's: a share of its level."""
_LOSS_EXTRA: Final = ("loss.above_best",)
_ROLES: Final = ("input", "weight", "grad_output")
_MOVES: Final = ("move", "strongest")

LOSS_FEATURES: Final = (*(f"loss.{view}" for view in _SCALAR_VIEWS), *_LOSS_EXTRA)
GRADIENT_FEATURES: Final = (
    *(f"{name}.{view}" for name in _SCALARS[1:] for view in _SCALAR_VIEWS),
    "grad_norm_nonfinite.recent",
)
MOVE_FEATURES: Final = (
    *(f"{role}.{move}" for role in _ROLES for move in _MOVES),
    "nonfinite_tensors.recent",
)
TENSOR_FEATURES: Final = (
    *(f"{name}.{view}" for name in _TENSORS for view in _TENSOR_VIEWS),
    *MOVE_FEATURES,
)
DYNAMIC_FEATURES: Final = (*DYNAMIC_LOSS, *DYNAMIC_GRADIENT, *DYNAMIC_PLAIN, *DYNAMIC_SCALED)
FEATURES: Final[tuple[str, ...]] = (
    *LOSS_FEATURES,
    *GRADIENT_FEATURES,
    *TENSOR_FEATURES,
    *DYNAMIC_FEATURES,
)
"""Names of the entries of a feature vector: `<signal>.<view>`.

Views: `now`, `short`, `medium` are the value and its means over about 6 and 23 records, less the
slow mean (about 92 records), in units of the signal's own noise; `slow` the slow mean less the very
slow one (about 370); `change` is `medium` in the signal's own unit (log2; for the loss a share);
`noise` log2 of recent over usual noise. `<role>.move` and `.strongest` are the root mean square and
the largest absolute `medium` of a role's signals. The rest is explained in `dynamics`.
"""
SIGNAL_OF_FEATURE: Final = {name: name.rsplit(".", 1)[0] for name in FEATURES}

_SCALAR_COLUMNS: Final = np.array([SIGNALS.index(name) for name in _SCALARS])
_TENSOR_COLUMNS: Final = np.array([SIGNALS.index(name) for name in _TENSORS])
_FLAG_COLUMNS: Final = np.array([SIGNALS.index(name) for name in _FLAGS])
_ROLE_SLICES: Final = tuple(
    np.array([i for i, name in enumerate(_TENSORS) if name.startswith(f"{role}.")])
    for role in _ROLES
)
_PLAIN_STATISTICS: Final = ("kurtosis", "channel_kurtosis", "rms", "amax")
_ROLE_PLAIN: Final = tuple(
    np.array([k for k, i in enumerate(rows) if _TENSORS[i].split(".")[1] in _PLAIN_STATISTICS])
    for rows in _ROLE_SLICES
)
_ROLE_PAIRS: Final = tuple(plain.reshape(-1, 2) for plain in _ROLE_PLAIN)
_BASE: Final = len(FEATURES) - len(DYNAMIC_FEATURES)
_ROLE_DYNAMICS: Final = len(DYNAMIC_PLAIN) + len(DYNAMIC_SCALED)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSettings:
    """Spans and limits of the features; an artifact is bound to the ones it was fitted with.

    Attributes:
        half_lives: Of the short, medium, slow and very slow means, in records.
        warmup: Records with a loss before features are given.
        settle: Records that are muted after a planned event.
        tensor_warmup: Tensor records before tensor features are given.
        stale: Records for which the last tensor features are carried.
        limit: Features are clipped to so many noise units.
    """

    half_lives: tuple[float, float, float, float] = (4.0, 16.0, 64.0, 256.0)
    warmup: int = 48
    settle: int = 24
    tensor_warmup: int = 10
    stale: int = 64
    limit: float = 20.0

    def __post_init__(self) -> None:
        if any(h <= 0 for h in self.half_lives) or list(self.half_lives) != sorted(self.half_lives):
            raise ValueError(f"half_lives is {self.half_lives}; allowed: positive and rising")
        if min(self.warmup, self.settle, self.tensor_warmup, self.stale) < 1:
            raise ValueError("warmup, settle, tensor_warmup and stale count records; allowed: >= 1")


class _Trackers:
    """Exponential means and noise of some channels; missing values leave a channel as it is."""

    def __init__(self, floors: FloatArray, half_lives: tuple[float, ...]) -> None:
        channels = floors.size
        self._floors = floors
        # The last two rows track noise: recent (16 records) and usual (128).
        self._half_lives = np.array([*half_lives, 16.0, 128.0])[:, None]
        self._decay = np.exp2(-1.0 / self._half_lives)
        self._state = np.zeros((len(half_lives) + 2, channels))
        self._weight = np.zeros_like(self._state)
        self._levels = len(half_lives)
        self.count = np.zeros(channels)
        self.usual_noise: FloatArray = np.full(channels, 1e-6)

    @property
    def mean(self) -> FloatArray:
        """(half-lives, channels)."""
        return self._state[: self._levels]

    @property
    def noise(self) -> FloatArray:
        """(2, channels): mean absolute deviation from the short mean, recent and usual."""
        return self._state[self._levels :]

    def update(self, values: FloatArray, elapsed: int = 1) -> None:
        """Take in one record, `elapsed` records after the last one."""
        seen = np.isfinite(values)
        decay = self._decay if elapsed == 1 else np.exp2(-elapsed / self._half_lives)
        # A single outlier must not become the baseline; a new channel has no noise to judge by.
        bound = np.where(self.count > 8, 6.0 * self.usual_noise, np.inf)
        residual = values - self._state
        residual[self._levels :] = np.minimum(np.abs(residual[0]), bound) - self.noise
        slow = residual[2 : self._levels]
        np.minimum(slow, bound, out=slow)
        np.maximum(slow, -bound, out=slow)
        take = np.broadcast_to(seen, residual.shape).copy()
        take[self._levels :] &= self.count > 0
        fresh = 1.0 - decay
        self._weight += np.where(take, fresh * (1.0 - self._weight), 0.0)
        gain = fresh / np.maximum(self._weight, 1e-12)
        self._state += np.where(take, gain * residual, 0.0)
        self.count += seen
        # 1.25 turns a mean absolute deviation into a sigma.
        self.usual_noise = 1.25 * self.noise[1] + self._floors

    def rebaseline(self) -> None:
        """Forget the level, keep the noise."""
        self._weight[: self._levels] = 0.0
        self.mean[:] = 0.0
        self.count[:] = 0.0

    def ready(self, needed: int) -> npt.NDArray[np.bool_]:
        """Which channels have had so many values."""
        return np.asarray(self.count >= needed)


def _clip(values: FloatArray, limit: float) -> FloatArray:
    """As np.clip, at a fifth of its cost on small arrays."""
    return np.asarray(np.minimum(np.maximum(values, -limit), limit))


class FeatureExtractor:
    """Turns the signal vectors of one run, one at a time and in order, into feature vectors."""

    def __init__(self, settings: FeatureSettings | None = None) -> None:
        self.settings = settings or FeatureSettings()
        self._clear()

    def _clear(self) -> None:
        half_lives = self.settings.half_lives
        self._scalars = _Trackers(_SCALAR_FLOORS, half_lives)
        self._tensors = _Trackers(_TENSOR_FLOORS, half_lives)
        self._last_step: int | None = None
        self._records = 0
        self._muted = 0
        self._tensor_age = 0
        self._flag_age = np.full(len(_FLAGS), np.inf)
        self._best = np.inf
        self._first = -np.inf
        self._tensor_features = np.full(len(TENSOR_FEATURES), np.nan)
        self._role_features = np.full(_ROLE_DYNAMICS, np.nan)
        self._dynamics = ScalarDynamics()
        self._tensor_seen = False

    @property
    def missing(self) -> str | None:
        """Why there are no features at the moment, None when there are."""
        needed = self.settings.warmup
        if self._records < needed:
            return f"warming up: {self._records} of {needed} records"
        if self._muted > 0:
            return f"settling after a planned event: {self._muted} more records"
        return None

    def rebaseline(self) -> None:
        """A planned event (data switch, restart, new learning rate): levels start afresh."""
        self._scalars.rebaseline()
        self._tensors.rebaseline()
        self._best = np.inf
        self._dynamics.rebaseline()
        self._tensor_features[:] = np.nan
        self._role_features[:] = np.nan
        self._tensor_seen = False
        self._muted = self.settings.settle

    def update(self, step: int, signals: FloatArray) -> FloatArray | None:
        """Take in one record.

        Args:
            step: A step at or below the last one starts the run afresh (rollback).
            signals: (len(SIGNALS),) as `summarise` gives them.

        Returns:
            float64 (len(FEATURES),), NaN = cannot say; None while there is too little history.
        """
        if self._last_step is not None and step <= self._last_step:
            self._clear()
        self._last_step = step
        self._records += 1
        self._muted = max(self._muted - 1, 0)
        self._flag_age += 1
        flags = signals[_FLAG_COLUMNS]
        self._flag_age[flags > 0] = 0
        scalars = signals[_SCALAR_COLUMNS]
        before = self._scalars.mean[2].copy()
        self._scalars.update(scalars)
        self._scalars.usual_noise[0] += _LOSS_FLOOR * abs(self._scalars.mean[2, 0])
        self._update_tensors(signals[_TENSOR_COLUMNS])
        new_best = self._track_best(scalars[0])
        self._dynamics.update(
            (scalars - before) / self._scalars.usual_noise,
            self._scalars.mean[2],
            settled=bool(self._scalars.count[0] >= self.settings.warmup),
            new_best=new_best,
        )
        if self.missing is not None:
            return None
        return self._assemble(scalars, before)

    def _track_best(self, loss: float) -> bool:
        if not np.isfinite(loss):
            return False
        if self._records <= 3:
            self._first = max(self._first, loss)
        medium = float(self._scalars.mean[1, 0])
        if medium < self._best and self._scalars.count[0] >= 8:
            self._best = medium
            return True
        return False

    def _update_tensors(self, values: FloatArray) -> None:
        self._tensor_age += 1
        if not np.isfinite(values).any():
            if self._tensor_seen and self._tensor_age > self.settings.stale:
                self._tensor_features[:] = np.nan
                self._role_features[:] = np.nan
                self._tensor_seen = False
            return
        self._tensors.update(values, min(self._tensor_age, self.settings.stale))
        self._tensor_age = 0
        ready = self._tensors.ready(self.settings.tensor_warmup)
        if not ready.any():
            return
        views = self._differences(self._tensors, len(_TENSOR_VIEWS))
        views[~ready] = np.nan
        self._tensor_features[: views.size] = views.ravel()
        self._tensor_features[views.size : -1] = _moves(views[:, 1])
        self._role_features = _role_dynamics(views)
        self._tensor_seen = True

    def _differences(self, trackers: _Trackers, views: int) -> FloatArray:
        """(channels, views) with short, medium, slow and change in the first four columns."""
        mean, limit = trackers.mean, self.settings.limit
        table = np.empty((mean.shape[1], views))
        change = mean[1] - mean[2]
        raw = np.array([mean[0] - mean[2], change, mean[2] - mean[3]]) / trackers.usual_noise
        table[:, :3] = _clip(raw, limit).T
        table[:, 3] = _clip(change, limit)
        return table

    def _assemble(self, scalars: FloatArray, before: FloatArray) -> FloatArray:
        trackers, count = self._scalars, len(_SCALAR_VIEWS)
        noise = trackers.usual_noise
        views = self._differences(trackers, count)
        share = views[0, 3] / (abs(trackers.mean[2, 0]) + 1e-30)
        views[0, 3] = min(max(share, -1.0), 4.0)
        views[:, 4] = _clip((scalars - before) / noise, self.settings.limit)
        deviation = trackers.noise + 1e-9
        views[:, 5] = np.log2(deviation[0] / deviation[1])
        views[~trackers.ready(self.settings.settle)] = np.nan
        flat = views.ravel()
        recent = np.exp2(-self._flag_age / 8.0)
        row = np.empty(len(FEATURES))
        row[:count] = flat[:count]
        row[count] = self._above_best(float(noise[0]))
        start = len(LOSS_FEATURES)
        row[start : start + flat.size - count] = flat[count:]
        row[start + flat.size - count] = recent[1]
        tensors = len(LOSS_FEATURES) + len(GRADIENT_FEATURES)
        row[tensors:_BASE] = self._tensor_features
        if self._tensor_seen:
            row[_BASE - 1] = recent[2]
        self._assemble_dynamics(row[_BASE:], noise)
        return row

    def _assemble_dynamics(self, part: FloatArray, noise: FloatArray) -> None:
        means, ready = self._scalars.mean, self._scalars.ready(self.settings.settle)
        part[:] = np.nan
        loss, gradient = len(DYNAMIC_LOSS), len(DYNAMIC_LOSS) + len(DYNAMIC_GRADIENT)
        if ready[0] and np.isfinite(self._best):
            progress = max(self._first - self._best, float(noise[0]), 1e-30)
            part[:loss] = self._dynamics.loss(means[:, 0], float(noise[0]), progress)
        if ready[1] or ready[2]:
            part[loss:gradient] = self._dynamics.gradient(means, noise)
            for index, each in ((1, slice(loss, loss + 5)), (2, slice(loss + 5, loss + 10))):
                if not ready[index]:
                    part[each] = np.nan
            if not (ready[0] and ready[1]):
                part[gradient - 2] = np.nan
            if not ready[3]:
                part[gradient - 1] = np.nan
        part[gradient:] = self._role_features

    def _above_best(self, noise: float) -> float:
        """How far above its best the loss is, as a share of the progress made."""
        if not np.isfinite(self._best):
            return np.nan
        above = float(self._scalars.mean[1, 0]) - self._best
        progress = max(self._first - self._best, noise, 1e-30)
        return min(max(above / progress, 0.0), 2.0)


def _moves(medium: FloatArray) -> FloatArray:
    parts = []
    for rows in _ROLE_SLICES:
        values = medium[rows]
        values = values[~np.isnan(values)]
        if values.size:
            parts += [np.sqrt(np.mean(np.square(values))), np.max(np.abs(values))]
        else:
            parts += [np.nan, np.nan]
    return np.array(parts)


def _role_dynamics(views: FloatArray) -> FloatArray:
    plain: list[float] = []
    scaled: list[float] = []
    for rows, needs_none, pairs in zip(_ROLE_SLICES, _ROLE_PLAIN, _ROLE_PAIRS, strict=True):
        first, second = role_dynamics(
            views[rows, 1], views[rows, 2], views[rows, 3], needs_none, pairs
        )
        plain += first
        scaled += second
    return np.array([*plain, *scaled])


def extract_run(
    steps: npt.ArrayLike,
    signals: FloatArray,
    settings: FeatureSettings | None = None,
    planned: Collection[int] = (),
) -> FloatArray:
    """Features of a whole run by the same incremental code.

    Args:
        steps: (T,) steps in the order of logging.
        signals: (T, len(SIGNALS)).
        settings: As the live extractor's.
        planned: Steps with a planned event: levels start afresh there.

    Returns:
        (T, len(FEATURES)); rows of NaN where there is too little history.
    """
    extractor = FeatureExtractor(settings)
    rows = np.full((len(signals), len(FEATURES)), np.nan)
    ahead = sorted(planned, reverse=True)
    for index, step in enumerate(np.asarray(steps)):
        while ahead and ahead[-1] <= step:
            ahead.pop()
            extractor.rebaseline()
        features = extractor.update(int(step), signals[index])
        if features is not None:
            rows[index] = features
    return rows
