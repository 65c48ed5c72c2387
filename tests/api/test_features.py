"""Features: causal, relative to the run's own history, neutral when nothing moves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.api.features import FEATURES, FeatureExtractor, FeatureSettings, extract_run
from foreshock.api.signals import SIGNALS
from tests.api.synthetic import column, healthy_signals

FloatArray = npt.NDArray[np.float64]


def feature(rows: FloatArray, name: str) -> FloatArray:
    return rows[..., FEATURES.index(name)]


def run(count: int = 300, seed: int = 0) -> FloatArray:
    return healthy_signals(count, np.random.default_rng(seed))


def test_nothing_before_enough_history_and_then_always() -> None:
    rows = extract_run(np.arange(300), run())
    ready = np.asarray(np.isfinite(rows).any(axis=1))
    assert not ready[:47].any()
    assert ready[47:].all()
    extractor = FeatureExtractor()
    assert extractor.missing == "warming up: 0 of 48 records"


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 150), seed=st.integers(0, 99))
def test_features_depend_on_no_later_record(cut: int, seed: int) -> None:
    signals = run(150, seed)
    changed = signals.copy()
    changed[cut:] = np.random.default_rng(seed + 1).normal(size=changed[cut:].shape)
    before = extract_run(np.arange(150), signals)[:cut]
    np.testing.assert_array_equal(before, extract_run(np.arange(150), changed)[:cut])


def test_steps_and_levels_do_not_show() -> None:
    signals = run()
    shifted = signals.copy()
    flags = [column(n) for n in ("loss", "loss_nonfinite", "grad_norm_nonfinite")]
    others = np.setdiff1d(np.arange(len(SIGNALS)), [*flags, column("nonfinite_tensors")])
    shifted[:, others] += 5.0
    one = extract_run(np.arange(300), signals)
    other = extract_run(np.arange(300) * 7 + 10_000, shifted)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_the_unit_of_the_loss_does_not_show() -> None:
    signals = run()
    scaled = signals.copy()
    scaled[:, column("loss")] *= 16.0
    names = [n for n in FEATURES if n.startswith("loss.")]
    for name in names:
        one = feature(extract_run(np.arange(300), signals), name)
        other = feature(extract_run(np.arange(300), scaled), name)
        np.testing.assert_allclose(one, other, atol=2e-2)


def test_a_ramp_moves_its_own_feature_and_a_role() -> None:
    signals = run()
    at = column("input.kurtosis.max")
    signals[200:, at] += np.linspace(0, 3, 100)
    last = extract_run(np.arange(300), signals)[-1]
    assert feature(last, "input.kurtosis.max.medium") > 5
    assert feature(last, "input.strongest") > 5
    assert abs(feature(last, "weight.kurtosis.max.medium")) < 2


def test_one_outlier_is_not_a_new_normal() -> None:
    signals = run()
    wild = signals.copy()
    wild[200, column("grad_norm")] += 1000
    one, other = (extract_run(np.arange(300), s)[-1] for s in (signals, wild))
    assert abs(feature(one, "grad_norm.slow") - feature(other, "grad_norm.slow")) < 1


def test_a_planned_event_mutes_and_forgets_the_level() -> None:
    signals = run(400)
    signals[200:, column("loss")] += 4
    extractor = FeatureExtractor()
    rows = []
    for step in range(400):
        if step == 200:
            extractor.rebaseline()
        rows.append(extractor.update(step, signals[step]))
    assert rows[205] is None
    later = rows[250]
    assert later is not None
    assert abs(feature(later, "loss.medium")) < 3
    stubborn = extract_run(np.arange(400), signals)[250]
    assert feature(stubborn, "loss.medium") > 5


def test_a_rollback_starts_afresh() -> None:
    signals = run(200)
    extractor = FeatureExtractor()
    for step in range(100):
        extractor.update(step, signals[step])
    again = [extractor.update(step, signals[step]) for step in range(50, 130)]
    fresh = FeatureExtractor()
    expected = [fresh.update(step, signals[step]) for step in range(50, 130)]
    for one, other in zip(again, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


def test_tensor_features_are_carried_between_measurements_and_then_dropped() -> None:
    signals = run(260)
    signals[120:, 6:] = np.nan
    rows = extract_run(np.arange(260), signals)
    name = "input.kurtosis.max.medium"
    assert np.isfinite(feature(rows[119], name))
    assert feature(rows[121], name) == feature(rows[125], name)
    assert np.isnan(feature(rows[-1], name))


def test_a_log_without_tensors_or_gradients_still_has_loss_features() -> None:
    signals = np.full((100, len(SIGNALS)), np.nan)
    signals[:, 0] = run(100)[:, 0]
    signals[:, 1] = 0
    last = extract_run(np.arange(100), signals)[-1]
    known = {name for name, value in zip(FEATURES, last, strict=True) if np.isfinite(value)}
    assert known
    assert {name.split(".")[0] for name in known} <= {"loss", "grad_norm_nonfinite"}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 1))
def test_any_signals_give_finite_bounded_features(seed: int, missing: float) -> None:
    rng = np.random.default_rng(seed)
    signals = rng.standard_cauchy((120, len(SIGNALS))) * 10.0 ** rng.integers(-8, 9)
    signals[rng.random(signals.shape) < missing] = np.nan
    rows = extract_run(np.arange(120), signals)
    assert not np.isinf(rows).any()


def test_refuses_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="half_lives"):
        FeatureSettings(half_lives=(4.0, 2.0, 64.0, 256.0))
    with pytest.raises(ValueError, match="warmup"):
        FeatureSettings(warmup=0)


def test_a_loss_that_stops_falling_and_a_restless_gradient_show_in_the_dynamics() -> None:
    signals, stuck = run(600), run(600)
    loss, gradient = column("loss"), column("grad_norm")
    trend = 3.0 * np.exp(-np.arange(600) / 200)
    signals[:, loss] += trend
    stuck[:, loss] += np.maximum(trend, trend[300]) + np.linspace(0, 0.2, 600)
    rng = np.random.default_rng(5)
    stuck[400:, gradient] += np.repeat(rng.normal(0, 1.0, 20), 10) + np.linspace(0, 2, 200)
    falling, still = (extract_run(np.arange(600), s)[-1] for s in (signals, stuck))
    assert feature(falling, "loss.stall") < feature(still, "loss.stall") - 2
    assert feature(falling, "loss.drift") < feature(still, "loss.drift")
    assert feature(still, "grad_norm.jitter") > feature(falling, "grad_norm.jitter")
    assert feature(still, "grad_norm.memory") > feature(falling, "grad_norm.memory") + 0.3
    assert feature(still, "grad_norm.above_low") > feature(falling, "grad_norm.above_low")


def test_worst_layers_that_part_from_the_median_ones_show() -> None:
    signals = run()
    apart = signals.copy()
    apart[200:, column("weight.kurtosis.max")] += np.linspace(0, 4, 100)
    one, other = (extract_run(np.arange(300), s)[-1] for s in (signals, apart))
    assert feature(other, "weight.spread") > feature(one, "weight.spread") + 0.3
    assert feature(other, "weight.plain") > feature(one, "weight.plain") + 1
    assert abs(feature(other, "input.spread") - feature(one, "input.spread")) < 1e-9
    assert feature(other, "weight.agree") > 0


def test_planned_steps_of_a_whole_run_are_the_live_rebaselines() -> None:
    signals = run(200)
    extractor = FeatureExtractor()
    live = []
    for step in range(200):
        if step == 120:
            extractor.rebaseline()
        row = extractor.update(step, signals[step])
        live.append(np.full(len(FEATURES), np.nan) if row is None else row)
    np.testing.assert_array_equal(np.array(live), extract_run(np.arange(200), signals, None, [120]))
