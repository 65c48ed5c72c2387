"""Labels: made-up losses whose truth is known, and properties that hold for any loss."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.api.labels import label_drift, label_run

FloatArray = npt.NDArray[np.float64]


def curve(count: int = 800, *, noise: float = 0.03, seed: int = 0) -> FloatArray:
    """A learning curve from 5.5 to about 2 with independent noise."""
    step = np.arange(count)
    values: FloatArray = 2 + 3.5 * np.exp(-step / 60) - 0.0002 * step
    return values + noise * np.random.default_rng(seed).standard_normal(count)


@pytest.mark.parametrize("seed", range(5))
def test_a_learning_curve_is_healthy(seed: int) -> None:
    label = label_run(np.arange(800), curve(seed=seed))
    assert label.kind == "healthy"
    assert not label.diverges


def test_a_slow_climb_is_a_divergence_whose_onset_is_its_foot() -> None:
    loss = curve()
    loss[400:] += np.linspace(0, 4, 400) ** 1.5
    label = label_run(np.arange(800), loss)
    assert label.kind == "diverged"
    assert label.onset is not None
    assert label.crossing is not None
    assert 395 <= label.onset <= 480
    assert label.onset <= label.crossing


def test_onset_of_a_jump_is_before_its_crossing() -> None:
    loss = curve()
    loss[500:520] += np.linspace(0, 3, 20)
    loss[520:] += 3
    label = label_run(np.arange(800), loss)
    assert (label.kind, label.note) == ("diverged", "jump")
    assert label.onset is not None
    assert 498 <= label.onset <= 508


def test_a_spike_that_returns_is_benign_and_no_divergence() -> None:
    loss = curve()
    loss[300:330] += 2
    label = label_run(np.arange(800), loss)
    assert label.kind == "spike"
    assert not label.diverges
    assert [event.malignant for event in label.events] == [False]
    assert abs(label.events[0].crossing - 300) <= 1


def test_a_spike_that_stays_for_1000_steps_is_malignant() -> None:
    loss = curve(4000)
    loss[1000:2500] += 2
    label = label_run(np.arange(4000), loss)
    assert label.kind == "spike"
    assert label.diverges
    assert label.onset is not None
    assert abs(label.onset - 1000) <= 3


def test_a_single_bad_batch_is_an_outlier_not_an_event() -> None:
    loss = curve()
    loss[300] += 3
    label = label_run(np.arange(800), loss)
    assert label.kind == "healthy"
    assert label.outlier_batches == (300,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_lost_for_good_is_nan_and_a_transient_one_is_not(value: float) -> None:
    loss = curve()
    loss[600:] = value
    label = label_run(np.arange(800), loss)
    assert (label.kind, label.onset) == ("nan", 600)
    loss = curve()
    loss[600] = value
    label = label_run(np.arange(800), loss)
    assert (label.kind, label.note, label.diverges) == ("spike", "transient", False)


def test_the_onset_of_nan_is_the_rise_into_it() -> None:
    loss = curve()
    loss[560:600] += np.linspace(0, 5, 40)
    loss[600:] = np.nan
    label = label_run(np.arange(800), loss)
    assert label.kind == "nan"
    assert label.onset is not None
    assert 555 <= label.onset <= 575


def test_a_flat_loss_is_stalled() -> None:
    assert label_run(np.arange(400), 5.5 + 0.01 * curve(400)).kind == "stalled"


def test_sparse_logs_are_read_in_steps() -> None:
    loss = curve(400)
    loss[200:] += 3
    label = label_run(np.arange(400) * 100, loss)
    assert label.kind == "diverged"
    assert label.onset == 20_000


@pytest.mark.parametrize("size", [0, 1, 2, 5, 11, 12, 13])
def test_short_logs_do_not_fail(size: int) -> None:
    assert label_run(np.arange(size), np.ones(size)).onset is None
    assert label_run(np.arange(size), np.full(size, np.nan)).kind == ("nan" if size else "healthy")


def test_refuses_steps_that_do_not_rise() -> None:
    with pytest.raises(ValueError, match="do not rise"):
        label_run([0, 1, 1], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="one loss per step"):
        label_run([0, 1], [1.0])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32), max_size=120),
    st.integers(1, 500),
)
def test_any_log_gets_a_label_with_its_steps_inside(loss: list[float], interval: int) -> None:
    steps = np.arange(len(loss)) * interval
    with np.errstate(all="ignore"):
        label = label_run(steps, loss)
    if label.onset is not None:
        assert label.crossing is not None
        assert 0 <= label.onset <= label.crossing <= steps[-1]
    assert (label.kind in ("diverged", "nan")) <= label.diverges


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 2**16))
def test_labels_do_not_depend_on_the_unit_of_the_loss(unit: float, seed: int) -> None:
    loss = curve(300, seed=seed)
    loss[200:] += 2
    one, other = label_run(np.arange(300), loss), label_run(np.arange(300), loss * unit)
    assert (one.kind, one.onset) == (other.kind, other.onset)


def test_a_run_that_leaves_its_twin_slowly_drifts_from_where_it_left() -> None:
    twin, steps = curve(seed=1), np.arange(800)
    left = twin + np.where(steps > 500, (steps - 500) * 0.0025, 0.0)
    label = label_drift(steps, left, twin)
    assert label is not None
    assert label.kind == "drift"
    assert 490 <= (label.onset or 0) <= 560
    assert (label.onset or 0) < (label.crossing or 0)


def test_other_noise_and_what_comes_back_is_no_drift() -> None:
    twin, steps = curve(seed=1), np.arange(800)
    assert label_drift(steps, curve(seed=2), twin) is None
    bump = twin + np.where((steps > 400) & (steps < 500), 1.0, 0.0)
    assert label_drift(steps, bump, twin) is None
    assert label_drift(steps[:100], twin[:100] + steps[:100], twin[:100]) is None
