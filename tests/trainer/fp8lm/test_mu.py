"""The automatic factor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreshock.trainer.fp8lm.mu import GradientFactor
from foreshock.trainer.fp8lm.scaled import cast, power_of_two_scale, saturated
from foreshock.trainer.fp8lm.sums import running_sum
from foreshock.trainer.states_config import CommunicationConfig

AUTO = CommunicationConfig()


def test_it_doubles_over_a_thousand_quiet_steps() -> None:
    factor = GradientFactor([10**6], 64, AUTO)
    for _ in range(1000):
        factor.update(torch.zeros(1))
    assert float(factor.value) == pytest.approx(2 / 8, rel=1e-4)


def test_it_is_halved_above_the_threshold_and_for_that_tensor_only() -> None:
    factor = GradientFactor([10**6, 10**6], 4, AUTO)
    factor.update(torch.tensor([11, 10]))
    assert factor.value.tolist() == pytest.approx([0.25, 0.5 * 2**0.001])
    assert factor.halvings.tolist() == [1, 0]


def test_one_code_of_a_small_tensor_is_no_evidence() -> None:
    factor = GradientFactor([100], 4, AUTO)
    factor.update(torch.tensor([1]))
    assert int(factor.halvings) == 0
    factor.update(torch.tensor([2]))
    assert int(factor.halvings) == 1


def test_a_step_with_nan_teaches_nothing() -> None:
    factor = GradientFactor([10**6], 4, AUTO)
    factor.update(torch.tensor([10**6]), torch.tensor(False))
    assert float(factor.value) == 0.5
    assert int(factor.halvings) == 0


@pytest.mark.parametrize(("scaling", "value"), [("pre", 1 / 8), ("post", 1.0)])
def test_fixed_factors_stay(scaling: str, value: float) -> None:
    factor = GradientFactor([100], 8, CommunicationConfig(scaling=scaling))  # type: ignore[arg-type]
    factor.update(torch.tensor([100]))
    assert float(factor.value) == value


@given(st.lists(st.integers(0, 100), max_size=60), st.integers(1, 64))
def test_it_stays_within_its_bounds(counts: list[int], ranks: int) -> None:
    factor = GradientFactor([1000], ranks, AUTO)
    for count in counts:
        factor.update(torch.tensor([count]))
        assert 0 < float(factor.value) <= 1
        used = float(factor.in_force())
        assert math.frexp(used)[0] == 0.5
        assert used <= float(factor.value) < 2 * used


def test_a_factor_below_one_lowers_the_scale_also_of_large_gradients() -> None:
    """MS-AMP's pull request 140 inverts the factor with the scale where amax > 448."""
    for amax in (1.0, 1e4):
        scale = power_of_two_scale(torch.tensor(amax), "e4m3", torch.ones(()))
        factor = GradientFactor([10], 4, AUTO)
        assert float(scale * factor.in_force()) == float(scale) / 2


def simulated(ranks: int, correlation: float, steps: int) -> tuple[float, int]:
    """Mean of mu over the second half, and halvings in it; gaussian gradients."""
    torch.manual_seed(0)
    size = 2**12
    factor = GradientFactor([size], ranks, CommunicationConfig(mu_doubling_steps=50))
    values, halvings = [], 0
    for step in range(steps):
        common = torch.randn(size)
        own = torch.randn(ranks, size)
        x = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
        scale = power_of_two_scale(x.abs().amax(), "e4m3", torch.ones(()))
        codes = cast(x * scale * factor.in_force(), "e4m3")
        total, _ = running_sum(list(codes.unbind(0)))
        before = int(factor.halvings)
        factor.update(saturated(total).sum()[None])
        if step >= steps // 2:
            values.append(float(factor.value))
            halvings += int(factor.halvings) - before
    return sum(values) / len(values), halvings


def test_sawtooth_and_agreement() -> None:
    """About one halving per doubling time; gradients that agree drive mu towards 1/N."""
    loose, halvings = simulated(8, 0.0, 400)
    assert 2 <= halvings <= 8
    tight, _ = simulated(8, 0.95, 400)
    assert 0.08 < tight < 0.25
    assert loose > 1.5 * tight


def test_it_is_saved_and_restored() -> None:
    factor = GradientFactor([10, 10], 4, AUTO)
    factor.update(torch.tensor([10, 0]))
    other = GradientFactor([10, 10], 2, AUTO)
    other.load_state_dict({k: v.clone() for k, v in factor.state_dict().items()})
    assert torch.equal(other.value, factor.value)
    assert torch.equal(other.halvings, factor.halvings)
