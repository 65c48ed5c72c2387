"""Detection on the loss: at once for a lost loss, soon for a risen one, quiet otherwise."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from foreshock.api.detection import LossDetector

FloatArray = npt.NDArray[np.float64]


def curve(count: int = 600, seed: int = 0) -> FloatArray:
    step = np.arange(count)
    noise = 0.05 * np.random.default_rng(seed).standard_normal(count)
    return np.asarray(2 + 3.5 * np.exp(-step / 60) + noise)


def detected(loss: FloatArray, interval: int = 1) -> list[int]:
    detector = LossDetector()
    return [i for i, v in enumerate(loss) if detector.update(i * interval, float(v)).detected]


@pytest.mark.parametrize("seed", range(8))
def test_a_learning_curve_is_quiet(seed: int) -> None:
    assert detected(curve(seed=seed)) == []


def test_a_jump_is_found_within_eight_steps_and_held() -> None:
    loss = curve()
    loss[400:] += 3
    found = detected(loss)
    assert 400 <= found[0] <= 407
    assert len(found) >= 150


def test_a_slow_drift_is_found() -> None:
    loss = curve(2000)
    loss[800:] += np.linspace(0, 3, 1200)
    found = detected(loss)
    assert found
    assert 800 < found[0] < 1400


def test_one_bad_batch_is_not_a_divergence() -> None:
    loss = curve()
    loss[300] += 5
    assert detected(loss) == []


def test_a_lost_loss_is_certain_at_once_even_on_the_first_record() -> None:
    for value in (math.nan, math.inf, -math.inf):
        first = LossDetector().update(0, value)
        assert first.detected
        assert first.certain


def test_records_without_a_loss_say_nothing() -> None:
    assert not LossDetector().update(0, None).detected


def test_sparse_logs_need_fewer_points() -> None:
    loss = curve(300)
    loss[200:] += 3
    assert detected(loss, interval=100)[0] == 200


def test_a_planned_event_makes_a_new_level_normal() -> None:
    loss = curve()
    loss[400:] += 3
    detector = LossDetector()
    found = []
    for step, value in enumerate(loss):
        if step == 400:
            detector.rebaseline()
        found.append(detector.update(step, float(value)).detected)
    assert not any(found)
