"""Trees as arrays: the same numbers as scikit-learn's, and parts that add up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from foreshock.api.forest import Forest

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


def test_parts_add_up_to_the_score(
    data: FloatArray, models: list[HistGradientBoostingClassifier]
) -> None:
    forest = Forest.of(models)
    usual = forest.start + forest.mean[forest.roots].sum(axis=1)
    for row in data[:20]:
        scores, parts = forest.explain(row)
        np.testing.assert_allclose(scores, forest.scores(row[None])[0], rtol=1e-9)
        assert parts.sum() == pytest.approx(float((scores - usual).mean()), abs=1e-9)
    assert abs(parts[5]) < np.abs(parts[:3]).max()


def test_arrays_are_the_whole_forest(models: list[HistGradientBoostingClassifier]) -> None:
    forest = Forest.of(models)
    again = Forest(**forest.arrays())
    row = np.zeros(6)
    np.testing.assert_array_equal(again.explain(row)[1], forest.explain(row)[1])
