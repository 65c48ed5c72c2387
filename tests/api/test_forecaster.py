"""The hazard forecaster: meaningful probabilities, unknowable horizons, scikit-learn manners."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import estimator_checks_generator

from foreshock.api.artifact import Artifact, Head, load, save
from foreshock.api.features import FEATURES
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.proportional import CoxForecaster, partial_likelihood
from foreshock.api.trees import BoostedForecaster, ForestForecaster

FloatArray = npt.NDArray[np.float64]


# All but the check of other array libraries, which scikit-learn skips unless SCIPY_ARRAY_API is
# set before scipy is imported.
CHECKS = [
    (estimator, check)
    for kind in (DivergenceForecaster, CoxForecaster, BoostedForecaster, ForestForecaster)
    for estimator, check in estimator_checks_generator(kind())
    if "array_api" not in str(check)
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_scikit_learn_conventions(estimator: object, check: object) -> None:
    assert callable(check)
    check(estimator)


def made_up(
    runs: int = 80, count: int = 200, seed: int = 0
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]:
    """Half of the runs diverge at the end; feature 0 tells 60 steps ahead, the other is noise."""
    rng = np.random.default_rng(seed)
    features, times, groups = [], [], []
    for run in range(runs):
        left = np.arange(count, 0, -1).astype(float)
        signal = rng.normal(0, 1, count)
        fails = run % 2 == 0
        if fails:
            signal += 4 * np.clip(1 - left / 60, 0, 1)
        features.append(np.stack([signal, rng.normal(size=count)], axis=1))
        times.append(np.stack([left if fails else np.full(count, np.inf), left], axis=1))
        groups.append(np.full(count, run))
    return np.concatenate(features), np.concatenate(times), np.concatenate(groups)


@pytest.fixture(scope="module")
def fitted() -> DivergenceForecaster:
    x, y, groups = made_up()
    return DivergenceForecaster().fit(x, y, groups=groups)


def test_risk_rises_with_the_signal_and_never_falls_with_the_horizon(
    fitted: DivergenceForecaster,
) -> None:
    risk = fitted.predict_cumulative([[0.0, 0.0], [2.0, 0.0], [5.0, 0.0]])
    assert np.all(np.diff(risk[:, :2], axis=0) > 0)
    assert np.all(np.diff(risk[:, :2], axis=1) >= 0)


def test_probabilities_are_calibrated_on_new_runs(fitted: DivergenceForecaster) -> None:
    x, y, _ = made_up(seed=1)
    known = (y[:, 0] > 1) & ((y[:, 0] <= 101) | (y[:, 1] >= 101))
    risk = fitted.predict_cumulative(x[known])[:, 1]
    event = y[known, 0] <= 101
    assert abs(risk.mean() - event.mean()) < 0.05
    for part in np.array_split(np.argsort(risk), 4):
        assert abs(risk[part].mean() - event[part].mean()) < 0.15


def test_a_horizon_that_no_run_reaches_is_not_supported(fitted: DivergenceForecaster) -> None:
    assert fitted.supported_.tolist() == [True, True, False]
    assert "training runs" in fitted.reasons_[1000]
    assert np.isnan(fitted.predict_cumulative([[0.0, 0.0]])[0, 2])


def test_too_few_events_support_nothing() -> None:
    x, y, groups = made_up(runs=8)
    forecaster = DivergenceForecaster().fit(x, y, groups=groups)
    assert not forecaster.supported_.any()
    assert np.isnan(forecaster.predict_cumulative(x[:3])).all()


def test_missing_features_are_neutral(fitted: DivergenceForecaster) -> None:
    missing = fitted.predict_cumulative([[np.nan, np.nan]])
    np.testing.assert_array_equal(missing, fitted.predict_cumulative([[0.0, 0.0]]))
    x, y, groups = made_up()
    x[:, 1] = np.nan
    risk = DivergenceForecaster().fit(x, y, groups=groups).predict_cumulative(x[:5])
    assert np.isfinite(risk[:, :2]).all()


def test_the_prior_shifts_every_probability() -> None:
    x, y, groups = made_up()
    usual = DivergenceForecaster().fit(x, y, groups=groups)
    rare = DivergenceForecaster(prior=1e-5).fit(x, y, groups=groups)
    assert rare.base_rate_ == usual.base_rate_ > 1e-4
    assert np.all(rare.predict_cumulative(x)[:, :2] < usual.predict_cumulative(x)[:, :2])
    row = x[0]
    np.testing.assert_allclose(usual.explain(row, prior=1e-5)[0], rare.explain(row)[0])


def test_one_row_is_explained_as_a_batch_is_predicted(fitted: DivergenceForecaster) -> None:
    row = np.array([3.0, -1.0])
    middle, low, high, parts = fitted.explain(row)
    expected = fitted.predict_with_band(row[None])
    for one, other in zip((middle, low, high), expected, strict=True):
        np.testing.assert_allclose(one, other[0], rtol=1e-9)
    assert parts[0] > abs(parts[1])
    assert np.all((low <= middle)[:2])
    assert np.all((middle <= high)[:2])


def test_rows_before_the_gap_are_not_learned_from() -> None:
    x, y, groups = made_up()
    spoiled = x.copy()
    spoiled[y[:, 0] <= 1] = 1e6
    one = DivergenceForecaster(horizons=(10,)).fit(x, y, groups=groups)
    other = DivergenceForecaster(horizons=(10,)).fit(spoiled, y, groups=groups)
    np.testing.assert_allclose(one.base_rate_, other.base_rate_)


def test_held_out_scores_come_from_a_model_that_has_not_seen_the_group(
    fitted: DivergenceForecaster,
) -> None:
    x, _, groups = made_up()
    rows = x[groups == 3]
    risk = fitted.held_out_cumulative(rows, 3)
    assert risk.shape == (200, 3)
    assert not np.allclose(risk[:, 0], fitted.predict_cumulative(rows)[:, 0])
    with pytest.raises(KeyError):
        fitted.held_out_cumulative(rows, "unseen")


def test_refuses_what_cannot_be() -> None:
    x, y, _ = made_up(runs=4)
    with pytest.raises(ValueError, match="horizons"):
        DivergenceForecaster(horizons=(100, 10)).fit(x, y)
    with pytest.raises(ValueError, match="prior"):
        DivergenceForecaster(prior=2.0).fit(x, y)
    with pytest.raises(ValueError, match="one per row"):
        DivergenceForecaster().fit(x, y[:-1])
    with pytest.raises(NotFittedError):
        clone(DivergenceForecaster()).predict_cumulative(x)


@pytest.mark.parametrize(
    "prototype",
    [
        CoxForecaster(horizons=(10, 100), folds=3),
        BoostedForecaster(horizons=(10, 100), folds=3, rounds=15),
        ForestForecaster(horizons=(10, 100), folds=3, trees=10),
    ],
    ids=lambda p: type(p).__name__,
)
def test_other_models_are_calibrated_explained_and_kept_as_arrays(
    prototype: DivergenceForecaster, tmp_path: Path
) -> None:
    x, y, groups = made_up(runs=40)
    x = np.column_stack([x, np.full(len(x), np.nan)])
    forecaster = clone(prototype).fit(x, y, groups=groups)
    new, truth, _ = made_up(runs=40, seed=1)
    new = np.column_stack([new, np.full(len(new), np.nan)])
    known = (truth[:, 0] > 1) & ((truth[:, 0] <= 101) | (truth[:, 1] >= 101))
    risk = forecaster.predict_cumulative(new)
    assert abs(risk[known, 1].mean() - (truth[known, 0] <= 101).mean()) < 0.05
    assert np.all(np.diff(risk, axis=1) >= 0)
    head = Head(forecaster, {"1": 0.5}, {}, 100, tuple(FEATURES[:3]))
    save(
        Artifact(heads={"loss": head}, version="x", budget="1", fingerprints=frozenset()), tmp_path
    )
    again = load(tmp_path).heads["loss"].forecaster
    np.testing.assert_allclose(again.predict_cumulative(new[:400]), risk[:400], rtol=1e-9)
    row = np.array([4.0, 0.1, np.nan])
    middle, low, high, parts = again.explain(row)
    np.testing.assert_allclose(middle, again.predict_cumulative(row[None])[0], rtol=1e-9)
    assert np.all((low <= middle) & (middle <= high))
    assert parts[0] > abs(parts[1])
    assert parts[2] == 0


def test_the_partial_likelihood_is_cox_s() -> None:
    """Against the definition, risk set by risk set, with ties, weights and censoring."""
    rng = np.random.default_rng(3)
    basis, weight = rng.normal(size=(30, 2)), rng.uniform(0.5, 2, 30)
    time, event = -np.sort(-rng.integers(1, 9, 30)).astype(float), rng.random(30) < 0.5
    beta = np.array([0.3, -0.7])
    expected = 0.0
    for i in np.flatnonzero(event):
        risk = np.sum((weight * np.exp(basis @ beta))[time >= time[i]])
        expected -= weight[i] * (basis[i] @ beta - np.log(risk))
    expected /= np.sum(weight[event])
    value, gradient = partial_likelihood(beta, basis, time, event, weight)
    # The value is taken after a shift of the linear predictor, which cancels.
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for k in range(2):
        step = np.eye(2)[k] * 1e-6
        ahead = partial_likelihood(beta + step, basis, time, event, weight)[0]
        back = partial_likelihood(beta - step, basis, time, event, weight)[0]
        np.testing.assert_allclose(gradient[k], (ahead - back) / 2e-6, rtol=1e-5)
