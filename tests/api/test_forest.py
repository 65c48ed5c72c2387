"""Trees as arrays: the same numbers as scikit-learn's, and parts that add up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from foreshock.api.forest import Forest
from foreshock.api.live_model import LiveModel

FloatArray = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def data() -> FloatArray:
    return np.random.default_rng(0).normal(size=(2500, 6))


@pytest.fixture(scope="module")
def models(data: FloatArray) -> list[HistGradientBoostingClassifier]:
    truth = (data[:, 0] * data[:, 1] > 0) | (data[:, 2] > 1.5)
    return [
        HistGradientBoostingClassifier(max_iter=15, max_depth=5, random_state=seed).fit(
            data[seed::2], truth[seed::2]
        )
        for seed in (0, 1)
    ]


def test_scores_are_scikit_learns(
    data: FloatArray, models: list[HistGradientBoostingClassifier]
) -> None:
    expected = np.stack([model.decision_function(data) for model in models], axis=1)
    np.testing.assert_allclose(Forest.of(models).scores(data), expected, rtol=1e-9, atol=1e-9)
    assert Forest.of(models).scores(data[:0]).shape == (0, 2)


def test_one_row_gives_the_same_and_its_parts_add_up(
    data: FloatArray, models: list[HistGradientBoostingClassifier]
) -> None:
    forest = Forest.of(models)
    live = LiveModel([forest, forest], [1.0, 1.0], [0.0, -1.0], horizons=3, base_rate=1e-3)
    usual = forest.start + forest.mean[forest.roots].sum(axis=1)
    for row in data[:20]:
        scores = forest.scores(row[None])[0]
        middle, low, high, parts = live.explain(row)
        first = 1 / (1 + np.exp(-scores.mean()))
        second = 1 / (1 + np.exp(1 - scores.mean()))
        np.testing.assert_allclose(middle[:2], [first, 1 - (1 - first) * (1 - second)], rtol=1e-9)
        assert np.isnan(middle[2])
        assert np.all(low[:2] <= middle[:2])
        assert np.all(middle[:2] <= high[:2])
        assert parts.sum() == pytest.approx(float((scores - usual).mean()), abs=1e-9)
    assert abs(parts[5]) < np.abs(parts[:3]).max()


def test_arrays_are_the_whole_forest(
    data: FloatArray, models: list[HistGradientBoostingClassifier]
) -> None:
    forest = Forest.of(models)
    again = Forest(**forest.arrays())
    np.testing.assert_array_equal(again.scores(data), forest.scores(data))


def test_nothing_supported_says_nothing() -> None:
    middle, _, _, parts = LiveModel([], [], [], horizons=3, base_rate=0.0).explain(np.zeros(4))
    assert np.isnan(middle).all()
    assert parts.tolist() == [0.0] * 4
