"""Baselines: causal, quiet where they know nothing, loud where their signal is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from foreshock.api.baselines import BASELINES, SHIPPED_RULES, TimeOnlyHazard
from foreshock.api.signals import SIGNALS
from tests.api.synthetic import column, healthy_signals

FloatArray = npt.NDArray[np.float64]

SIGNAL_OF = {
    "robust z, loss": "loss",
    "robust z, gradient norm": "grad_norm",
    "OLMo 6 sigma": "grad_norm",
    "ZClip": "grad_norm",
    "Megatron 10x": "grad_norm",
    "kurtosis slope": "input.kurtosis.max",
    "update ratio growth": "update_ratio",
    "headroom": "weight.headroom_log2.min",
    "overflow": "input.overflow_ratio.max",
    "loss above its best": "loss",
}


def signals(seed: int = 0) -> FloatArray:
    return healthy_signals(400, np.random.default_rng(seed))


@pytest.mark.parametrize("name", sorted({**BASELINES, **SHIPPED_RULES}))
def test_scores_depend_on_no_later_record(name: str) -> None:
    whole, changed = signals(), signals()
    changed[300:] = signals(1)[300:]
    score = {**BASELINES, **SHIPPED_RULES}[name]
    np.testing.assert_allclose(score(whole)[:300], score(changed)[:300], rtol=1e-9)


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_each_is_loud_where_its_signal_rises(name: str) -> None:
    spoiled = signals()
    sign = -1 if "headroom" in name else 1
    spoiled[350:, column(SIGNAL_OF[name])] += sign * np.linspace(0, 8, 50)
    score = BASELINES[name](spoiled)
    assert score[-1] > np.nanmax(score[200:340])


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_missing_signals_give_no_score(name: str) -> None:
    score = BASELINES[name](np.full((200, len(SIGNALS)), np.nan))
    assert score.shape == (200,)
    assert np.isnan(score).all()


def test_the_clock_knows_when_and_nothing_else() -> None:
    clock = TimeOnlyHazard(width=50)
    steps = [np.arange(200.0)] * 4
    clock.fit(steps, [(s >= 100) & (s < 150) for s in steps])
    risk = clock.predict(np.array([10.0, 120.0, 180.0, 9999.0]))
    assert risk[1] > 0.8
    assert risk[[0, 2, 3]].max() < 0.2


def test_peers_rules_fire_where_their_makers_say_and_on_improving_loss() -> None:
    falling, spiked = signals(), signals()
    falling[:, column("loss")] = 8.0 * (1 + np.arange(400.0)) ** -0.3
    spiked[350:, column("loss")] *= 20
    assert np.nanmax(SHIPPED_RULES["trainscope CUSUM, as shipped"](falling)) >= 1
    assert np.nanmax(SHIPPED_RULES["losslint, as shipped"](falling)) < 1
    assert np.nanmax(SHIPPED_RULES["losslint, as shipped"](spiked)) >= 1
    for name, at, change in (
        ("overflow > 0", "input.overflow_ratio.max", 8.0),
        ("headroom < 0", "weight.headroom_log2.min", -20.0),
    ):
        spoiled = signals()
        for role in ("input", "weight", "grad_output"):
            spoiled[:, column(f"{role}.overflow_ratio.max")] = np.log2(1e-6)
            spoiled[:, column(f"{role}.headroom_log2.min")] = 1.0
        assert SHIPPED_RULES[name](spoiled)[-1] == 0
        spoiled[390:, column(at)] += change
        assert SHIPPED_RULES[name](spoiled)[-1] == 1
