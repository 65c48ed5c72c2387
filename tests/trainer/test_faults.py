"""What each fault does at a step, and which settings it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.faults import BadBatch, LearningRateRamp, OutlierRamp, ScaleFault
from foreshock.trainer.precision import LayerFaults, gemm_linear


def test_ramp_stays_finite_however_long_the_run() -> None:
    assert LearningRateRamp(start=0, factor=10.0, limit=1e4).multiplier(10**9) == 1e4


def test_scale_fault_freezes_grows_and_shrinks() -> None:
    assert ScaleFault(start=5).scale_factor(4) is None
    assert ScaleFault(start=5).scale_factor(500) == 1.0
    assert ScaleFault(start=5, growth=1.5).scale_factor(6) == pytest.approx(2.25)
    assert ScaleFault(start=5, growth=0.5).scale_factor(7) == pytest.approx(0.125)
    for growth in (0.5, 2.0):
        factor = ScaleFault(start=5, growth=growth).scale_factor(10**6)
        assert factor is not None
        assert abs(math.log2(factor)) == 60


def test_scale_fault_hits_what_it_names() -> None:
    fault = ScaleFault(start=0, roles=("weight",), layers="blocks.1.")
    assert fault.hits("blocks.1.mlp.down", "weight")
    assert not fault.hits("blocks.1.mlp.down", "input")
    assert not fault.hits("blocks.11.mlp.down", "weight")
    assert ScaleFault(start=0).hits("anything", "grad_output")


def test_outlier_is_there_once_a_period_and_shortens_the_history() -> None:
    fault = OutlierRamp(start=10, layer="blocks.0.mlp.up", growth=2.0, limit=100.0, period=3)
    factors = [fault.channel_factor(s) for s in range(9, 17)]
    assert factors == [1.0, 2.0, 1.0, 1.0, 16.0, 1.0, 1.0, 100.0]
    assert fault.history_at(9, 16) == 16
    assert fault.history_at(10, 16) == 1


def test_bad_batch_gain_stands_for_its_duration() -> None:
    fault = BadBatch(start=2, duration=2, gain=30.0)
    assert [fault.loss_gain(s) for s in range(5)] == [1.0, 1.0, 30.0, 30.0, 1.0]


def test_senseless_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="factor is 0"):
        LearningRateRamp(start=0, factor=0.0)
    with pytest.raises(ValueError, match="growth is nan"):
        ScaleFault(start=0, growth=math.nan)
    with pytest.raises(ValueError, match="allowed: some of input, weight, grad_output"):
        ScaleFault(start=0, roles=("output",))
    with pytest.raises(ValueError, match="period"):
        OutlierRamp(start=0, layer="x", period=0)
    with pytest.raises(ValueError, match="allowed: noise, constant, shuffled"):
        BadBatch(start=0, kind="nose")  # type: ignore[arg-type]


def test_outlier_hits_the_layers_that_it_names() -> None:
    assert OutlierRamp(start=0, layer="").hits("blocks.0.mlp.up")
    assert OutlierRamp(start=0, layer="mlp.down").hits("blocks.3.mlp.down")
    assert not OutlierRamp(start=0, layer="mlp.down").hits("blocks.3.mlp.up")


@pytest.mark.parametrize(("stale", "factor"), [(False, 1.0), (True, 0.25)])
def test_stale_inverse_leaves_the_product_as_wrong_as_the_scale(stale: bool, factor: float) -> None:
    torch.manual_seed(0)
    recipe = PrecisionConfig(backend="emulated", scaling="delayed", history=4)
    layer = gemm_linear(16, 8, precision=(recipe,))
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 5, 16)
    for _ in range(3):
        layer(x)
    whole = layer(x)
    fault = ScaleFault(start=0, growth=0.25, roles=("input",), stale_inverse=stale)
    LayerFaults({"up": layer}, (fault,)).begin_step(0)
    # A quarter of the scale costs a few values their last bit, no more.
    torch.testing.assert_close(layer(x), whole * factor, rtol=0.05, atol=0.05)
