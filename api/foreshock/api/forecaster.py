"""The forecaster: a discrete-time hazard over the horizons, one classifier per interval.

Fits on rows of features with their time to onset; calibrated on held-out groups. Knows no runs, no
store and no alarm: thresholds are chosen elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

__all__ = ["DivergenceForecaster", "NotEnoughDataError", "calibrate", "complement"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]


class NotEnoughDataError(ValueError):
    """The model cannot say anything: no horizon is supported by the data it was fitted on."""


@dataclass(frozen=True, slots=True)
class _Interval:
    """(lower, upper] in steps after the row."""

    lower: float
    upper: float


class DivergenceForecaster(BaseEstimator):  # type: ignore[misc]
    """P(the loss starts to diverge within h steps), for several h at once.

    With gap g and horizons h1 < h2 < ..., one logistic model per interval (g, g + h1],
    (g + h1, g + h2], ... gives the hazard of an onset there among rows that are still at risk. Rows
    whose run ended inside an interval without an onset say nothing about it and are dropped. The
    cumulative probability 1 - prod(1 - hazard) never decreases with the horizon.

    Features are expected to be zero when nothing moves, so a missing one (NaN) counts as zero; each
    enters as signed log and as its magnitude. Every interval is fitted on k folds of groups; the
    folds' models are averaged, their out-of-fold scores calibrate the average, and their spread
    (delete-a-group jackknife) gives the band.

    Args:
        horizons: Rising, in steps.
        gap: Steps between a row and the first step the forecast speaks of.
        strength: Inverse regularisation (C of `LogisticRegression`).
        folds: Folds of groups.
        min_runs: An interval with fewer runs that have an onset in it, or fewer that pass through
            it, is not supported.
        prior: Expected onsets per step where the model is used; None keeps the training rate.
        random_state: Seed of the folds.

    Attributes:
        supported_: (horizons,) bool.
        reasons_: Horizon to the reason why it is not supported.
        fold_of_group_: Group to the fold it was held out in.
        base_rate_: Onsets per step at risk in the training rows.
        n_features_in_: Number of features.
    """

    def __init__(
        self,
        *,
        horizons: Sequence[int] = (10, 100, 1000),
        gap: int = 1,
        strength: float = 0.01,
        folds: int = 5,
        min_runs: int = 10,
        prior: float | None = None,
        random_state: int = 0,
    ) -> None:
        self.horizons = horizons
        self.gap = gap
        self.strength = strength
        self.folds = folds
        self.min_runs = min_runs
        self.prior = prior
        self.random_state = random_state

    def fit(
        self,
        X: npt.ArrayLike,
        y: npt.ArrayLike,
        *,
        groups: npt.ArrayLike | None = None,
        runs: npt.ArrayLike | None = None,
        sample_weight: npt.ArrayLike | None = None,
    ) -> Self:
        """Fit one calibrated hazard per interval.

        Args:
            X: (rows, features), NaN = missing.
            y: (rows,) steps to the onset, inf = none was seen; or (rows, 2), where the second
                column says for how many steps after the row the run was observed.
            groups: (rows,) families of runs that must not be split; None: every row.
            runs: (rows,) runs, for counting whether an interval is supported; None: the groups.
            sample_weight: (rows,) how many rows each stands for.

        Raises:
            ValueError: Shapes differ, or a parameter is out of range.
        """
        self._check_parameters()
        data = np.asarray(
            validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=True)
        )
        time, observed = _times(y, len(data))
        rows = len(data)
        label = np.arange(rows) if groups is None else np.asarray(groups)
        weight = np.ones(rows) if sample_weight is None else np.asarray(sample_weight, np.float64)
        run = label if runs is None else np.asarray(runs)
        if not label.shape == run.shape == weight.shape == (rows,):
            raise ValueError(f"groups, runs, sample_weight: give {rows} entries, one per row")
        if not np.sum(weight) > 0 or np.any(weight < 0):
            raise ValueError("sample_weight: allowed are weights from 0 on that are not all zero")
        basis = self._prepare(data, weight)
        fold = _fold_of(label, self.folds, self.random_state)
        self.fold_of_group_ = dict(zip(label.tolist(), fold.tolist(), strict=True))
        self.reasons_: dict[int, str] = {}
        self._models: list[dict[str, Any]] = []
        for index, interval in enumerate(self._intervals()):
            at_risk, event = _outcome(interval, time, observed)
            reason = self._unsupported(run[at_risk], event[at_risk], fold[at_risk], interval)
            if reason is not None:
                for horizon in self.horizons[index:]:
                    self.reasons_[int(horizon)] = reason
                break
            self._models.append(
                self._fit_interval(basis, at_risk, event, weight, fold, time, observed)
            )
        count = len(self._models)
        self.supported_ = np.arange(len(self.horizons)) < count
        self.base_rate_ = _base_rate(time, observed, weight, self._reach())
        return self

    def __sklearn_tags__(self) -> Tags:
        """Missing features are allowed."""
        tags: Tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _check_parameters(self) -> None:
        horizons = list(self.horizons)
        if not horizons or horizons != sorted(set(horizons)) or horizons[0] <= 0:
            raise ValueError(f"horizons is {self.horizons}; allowed: positive and rising")
        if self.gap < 0 or self.folds < 2 or self.min_runs < 2 or self.strength <= 0:
            raise ValueError("allowed: gap >= 0, folds >= 2, min_runs >= 2, strength > 0")
        if self.prior is not None and not 0 < self.prior < 1:
            raise ValueError(f"prior is {self.prior}; allowed: onsets per step, in (0, 1), or None")

    def _intervals(self) -> Iterator[_Interval]:
        lower = float(self.gap)
        for horizon in self.horizons:
            yield _Interval(lower, float(self.gap + horizon))
            lower = float(self.gap + horizon)

    def _reach(self) -> float:
        count = max(len(self._models), 1)
        return float(self.horizons[count - 1])

    def _unsupported(
        self, label: npt.NDArray[Any], event: BoolArray, fold: IntArray, interval: _Interval
    ) -> str | None:
        events = len(np.unique(label[event]))
        others = len(np.unique(label[~event]))
        name = f"({interval.lower:.0f}, {interval.upper:.0f}] steps ahead"
        if events < self.min_runs:
            return f"only {events} training runs start to diverge {name}; {self.min_runs} needed"
        if others < self.min_runs:
            return f"only {others} training runs were seen to pass {name}; {self.min_runs} needed"
        for part in range(self.folds):
            if not event[fold != part].any() or event[fold != part].all():
                return f"a fold of the training runs has only one outcome {name}"
        return None

    def _prepare(self, data: FloatArray, weight: FloatArray) -> FloatArray:
        """What the models are fitted on: the basis in units of its own size."""
        basis = _basis(data)
        self._scale = np.maximum(np.sqrt(np.average(basis**2, axis=0, weights=weight)), 0.05)
        return np.asarray(basis / self._scale)

    def _fit_interval(
        self,
        basis: FloatArray,
        at_risk: BoolArray,
        event: BoolArray,
        weight: FloatArray,
        fold: IntArray,
        time: FloatArray,
        observed: FloatArray,
    ) -> dict[str, Any]:
        """Models of the folds for one interval, calibrated."""
        del time, observed  # for models that look at the times themselves
        coefficients, intercepts = [], []
        score = np.full(len(basis), np.nan)
        for part in range(self.folds):
            train = at_risk & (fold != part)
            model = LogisticRegression(C=self.strength, solver="newton-cholesky", max_iter=200)
            # Weights of mean 1, so that `strength` means the same whatever the sampling.
            share = weight[train] / weight[train].mean()
            model.fit(basis[train], event[train], sample_weight=share)
            coefficients.append(model.coef_[0])
            intercepts.append(float(model.intercept_[0]))
            held_out = fold == part
            score[held_out] = basis[held_out] @ coefficients[-1] + intercepts[-1]
        slope, shift = calibrate(score[at_risk], event[at_risk], weight[at_risk])
        return {
            "coefficients": slope * np.array(coefficients),
            "intercepts": slope * np.array(intercepts) + shift,
        }

    def decision_function(self, X: npt.ArrayLike) -> FloatArray:
        """Calibrated log-odds of the hazards: (rows, supported intervals, folds)."""
        check_is_fitted(self, "supported_")
        data = np.asarray(
            validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        )
        return self._scores(data)

    def _scores(self, data: FloatArray, part: int | None = None) -> FloatArray:
        """(rows, supported intervals, folds), or of one fold only."""
        chosen = slice(None) if part is None else slice(part, part + 1)
        if not self._models:
            return np.empty((len(data), 0, self.folds if part is None else 1))
        basis = _basis(data) / self._scale
        parts = [
            basis @ m["coefficients"][chosen].T + m["intercepts"][chosen] for m in self._models
        ]
        return np.stack(parts, axis=1) + self._prior_shift()

    def _prior_shift(self, prior: float | None = None) -> float:
        """Log-odds that turn the training rate into the prior."""
        wanted = prior if prior is not None else self.prior
        if wanted is None or self.base_rate_ <= 0:
            return 0.0
        return float(np.log(wanted / self.base_rate_))

    def held_out_cumulative(self, X: npt.ArrayLike, group: object) -> FloatArray:
        """As `predict_cumulative`, from the one model that has not seen the group.

        Raises:
            KeyError: The group was not among the training groups.
        """
        check_is_fitted(self, "supported_")
        scores = self._scores(np.asarray(X, dtype=np.float64), self.fold_of_group_[group])
        result = np.full((len(scores), len(self.horizons)), np.nan)
        hazard = _sigmoid(scores[:, :, 0])
        result[:, : hazard.shape[1]] = 1.0 - np.cumprod(1.0 - hazard, axis=-1)
        return result

    def predict_cumulative(self, X: npt.ArrayLike) -> FloatArray:
        """P(onset within each horizon), (rows, horizons); NaN where not supported."""
        return self.predict_with_band(X)[0]

    def predict_with_band(self, X: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Probability, lower and upper end of its band, each (rows, horizons); NaN unsupported."""
        return self._with_band(self.decision_function(X))

    def _with_band(self, scores: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        rows, count, folds = scores.shape
        result = np.full((3, rows, len(self.horizons)), np.nan)
        if count:
            centre = scores.mean(axis=-1)
            spread = np.sqrt((folds - 1) * scores.var(axis=-1))
            for index, offset in enumerate((0.0, -1.96, 1.96)):
                hazard = _sigmoid(centre + offset * spread)
                result[index, :, :count] = 1.0 - np.cumprod(1.0 - hazard, axis=-1)
        return result[0], result[1], result[2]

    def explain(
        self, row: FloatArray, *, prior: float | None = None
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """One row, for the live path: probability, band and what each feature adds.

        Args:
            row: (features,) as fitted; not validated.
            prior: Expected onsets per step here, in place of the estimator's own.

        Returns:
            Probability, low and high per horizon, and contributions (features,): log-odds added to
            the hazard of the longest supported interval of at most 100 steps.
        """
        count = row.size
        horizons = len(self.horizons)
        middle, low, high = (np.full(horizons, np.nan) for _ in range(3))
        if not self._models:
            return middle, low, high, np.zeros(count)
        basis = _basis(row) / self._scale
        shift = self._prior_shift(prior)
        ends = [1.0, 1.0, 1.0]
        for index, model in enumerate(self._models):
            scores = (model["coefficients"] @ basis + model["intercepts"]).tolist()
            centre = sum(scores) / len(scores)
            variance = sum((s - centre) ** 2 for s in scores) / len(scores)
            spread = 1.96 * math.sqrt((len(scores) - 1) * variance)
            for place, offset in enumerate((0.0, -spread, spread)):
                ends[place] *= complement(centre + shift + offset)
            middle[index], low[index], high[index] = (1.0 - end for end in ends)
        weights = self._models[min(1, len(self._models) - 1)]["coefficients"].mean(axis=0)
        product = weights * basis
        return middle, low, high, product[:count] + product[count:]


def complement(log_odds: float) -> float:
    """1 - probability."""
    return 1.0 / (1.0 + math.exp(min(max(log_odds, -60.0), 60.0)))


def _times(y: npt.ArrayLike, rows: int) -> tuple[FloatArray, FloatArray]:
    values = np.asarray(y, dtype=np.float64)
    if values.shape == (rows,):
        return values, np.full(rows, np.inf)
    if values.shape == (rows, 2):
        return values[:, 0], values[:, 1]
    raise ValueError(f"y has shape {values.shape}; allowed: ({rows},) or ({rows}, 2), one per row")


def _basis(data: FloatArray) -> FloatArray:
    """Signed log of each feature and its magnitude; missing = 0 = as usual."""
    signed = np.sign(data) * np.log1p(np.abs(data))
    signed = np.where(np.isnan(signed), 0.0, signed)
    return np.concatenate([signed, np.abs(signed)], axis=-1)


def _outcome(
    interval: _Interval, time: FloatArray, observed: FloatArray
) -> tuple[BoolArray, BoolArray]:
    """Rows at risk and observed through the interval, and those with their onset in it."""
    event = (time > interval.lower) & (time <= interval.upper)
    passed = (time > interval.upper) & (observed >= interval.upper)
    return event | passed, event


def _fold_of(label: npt.NDArray[Any], folds: int, seed: int) -> IntArray:
    names, index = np.unique(label, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    return np.asarray(order[index] % folds, dtype=np.intp)


def _sigmoid(value: FloatArray) -> FloatArray:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(value, -60.0, 60.0))))


def calibrate(score: FloatArray, event: BoolArray, weight: FloatArray) -> tuple[float, float]:
    """Platt's slope and shift on held-out scores; a slope is never negative."""
    share = weight / weight.mean()
    model = LogisticRegression(C=1.0, solver="newton-cholesky", max_iter=200)
    spread = max(float(np.std(score)), 1e-12)
    model.fit((score / spread)[:, None], event, sample_weight=share)
    slope = max(float(model.coef_[0, 0]) / spread, 0.0)
    if slope > 0:
        return slope, float(model.intercept_[0])
    rate = float(np.average(event, weights=weight))
    return 0.0, float(np.log(rate / (1 - rate)))


def _base_rate(time: FloatArray, observed: FloatArray, weight: FloatArray, reach: float) -> float:
    """Onsets per step at risk: rows within `reach` of an onset, over the steps they look at."""
    looked = np.minimum(np.minimum(time, observed), reach)
    usable = looked > 0
    events = usable & (time <= reach) & (time <= observed)
    exposure = float(np.sum(weight[usable] * looked[usable]))
    return float(np.sum(weight[events])) / exposure if exposure > 0 else 0.0
