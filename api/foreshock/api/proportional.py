"""A survival model: proportional hazards over landmarks, by regularised partial likelihood.

Every row is a landmark (van Houwelingen 2007): its features are fixed, its time is the steps to the
onset, censored where the run ended. One linear predictor serves all horizons; the level of each
interval's hazard is calibrated on held-out groups.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from foreshock.api.forecaster import DivergenceForecaster, calibrate

__all__ = ["CoxForecaster", "partial_likelihood"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
BoolArray = npt.NDArray[np.bool_]


def partial_likelihood(
    coefficients: FloatArray,
    basis: FloatArray,
    time: FloatArray,
    event: BoolArray,
    weight: FloatArray,
) -> tuple[float, FloatArray]:
    """Negative log partial likelihood per weighted event (Cox 1972, ties by Breslow 1974).

    Args:
        coefficients: (features,).
        basis: (rows, features).
        time: (rows,) to the event or to censoring, falling.
        event: (rows,) whether it was seen.
        weight: (rows,).

    Returns:
        Value and gradient (features,).
    """
    linear = basis @ coefficients
    linear = linear - linear.max()
    share = weight * np.exp(linear)
    # Everyone with a time at least as long is at risk: rows up to the last of a tie.
    last = np.searchsorted(-time, -time, side="right") - 1
    risk = np.cumsum(share)[last]
    hits = weight * event
    value = -float(np.sum(hits * (linear - np.log(np.maximum(risk, 1e-300)))))
    # Each row's share of all the risk sets it stands in.
    spent = np.bincount(last, weights=hits / np.maximum(risk, 1e-300), minlength=len(time))
    stands = np.cumsum(spent[::-1])[::-1]
    gradient = basis.T @ (share * stands - hits)
    total = max(float(hits.sum()), 1e-12)
    return value / total, gradient / total


class CoxForecaster(DivergenceForecaster):
    """Proportional hazards; parameters, folds, calibration and band of `DivergenceForecaster`."""

    def _fit_interval(
        self,
        basis: FloatArray,
        at_risk: BoolArray,
        event: BoolArray,
        weight: FloatArray,
        fold: IntArray,
        time: FloatArray,
        observed: FloatArray,
    ) -> dict[str, FloatArray]:
        reach = float(self.horizons[-1]) + self.gap
        seen = np.isfinite(time) & (time <= observed) & (time <= reach) & (time > self.gap)
        until = np.where(seen, time, np.minimum(observed, reach))
        known = until > self.gap
        coefficients = []
        score = np.full(len(basis), np.nan)
        for part in range(self.folds):
            train = np.flatnonzero(known & (fold != part))
            train = train[np.argsort(-until[train], kind="stable")]
            coefficients.append(
                self._maximise(basis[train], until[train], seen[train], weight[train])
            )
            held_out = fold == part
            score[held_out] = basis[held_out] @ coefficients[-1]
        slope, shift = calibrate(score[at_risk], event[at_risk], weight[at_risk])
        return {
            "coefficients": slope * np.array(coefficients),
            "intercepts": np.full(self.folds, shift),
        }

    def _maximise(
        self, basis: FloatArray, time: FloatArray, event: BoolArray, weight: FloatArray
    ) -> FloatArray:
        penalty = 1.0 / (self.strength * max(float(np.sum(event)), 1.0))

        def objective(coefficients: FloatArray) -> tuple[float, FloatArray]:
            value, gradient = partial_likelihood(coefficients, basis, time, event, weight)
            value += 0.5 * penalty * float(coefficients @ coefficients)
            return value, gradient + penalty * coefficients

        found = minimize(
            objective,
            np.zeros(basis.shape[1]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 100},
        )
        return np.asarray(found.x, dtype=np.float64)
