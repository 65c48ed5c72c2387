"""Scales, casts, and tensors that are codes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreshock.monitor.formats import FORMATS
from foreshock.trainer.fp8lm.expansion import expand
from foreshock.trainer.fp8lm.scaled import (
    amax_of,
    cast,
    encode,
    encode_blocks,
    power_of_two_scale,
    saturated,
)

ONE = torch.ones(())
MAGNITUDES = st.floats(2.0**-100, 2.0**100, width=32)


@pytest.mark.parametrize(
    ("amax", "scale"), [(0.0, 1.0), (10.0, 32.0), (1e4, 2.0**-5), (448.0, 1.0), (448.01, 0.5)]
)
def test_scales_of_the_published_tests(amax: float, scale: float) -> None:
    assert power_of_two_scale(torch.tensor(amax), "e4m3", ONE) == scale


@given(MAGNITUDES, st.sampled_from(["e4m3", "e5m2", "fp16"]))
def test_a_scale_is_the_largest_power_of_two_that_fits(amax: float, fp_format: str) -> None:
    largest = FORMATS[fp_format].largest
    scale = float(power_of_two_scale(torch.tensor(amax), fp_format, ONE))
    assert math.frexp(scale)[0] == 0.5
    assert largest / 2 < scale * amax <= largest


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
def test_what_has_no_amax_keeps_the_scale(amax: float) -> None:
    assert power_of_two_scale(torch.tensor(amax), "e4m3", torch.tensor(8.0)) == 8.0


def test_casts_saturate_and_hide_no_infinity() -> None:
    x = torch.tensor([464.0, 480.0, 1e6, -1e6, math.inf, -math.inf, math.nan])
    e4m3 = cast(x, "e4m3").float()
    assert e4m3[:4].tolist() == [448.0, 448.0, 448.0, -448.0]
    assert e4m3[4:].isnan().all()
    e5m2 = cast(torch.tensor([61440.0, 1e9, math.inf]), "e5m2").float()
    assert e5m2.tolist() == [57344.0, 57344.0, math.inf]


def test_underflow_ties_go_to_zero() -> None:
    x = torch.tensor([2.0**-10, 2.0**-10 * 1.001])
    assert cast(x, "e4m3").float().tolist() == [0.0, 2.0**-9]


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    st.sampled_from([("e4m3", 2.0**-4, 2.0**-10), ("fp16", 2.0**-11, 2.0**-25)]),
)
def test_a_round_trip_errs_by_half_a_step(
    values: list[float], kind: tuple[str, float, float]
) -> None:
    fp_format, relative, absolute = kind
    x = torch.tensor(values)
    scaled = encode(x, fp_format)
    bound = (x.abs() * relative).clamp(min=absolute / float(scaled.scale))
    assert ((scaled.values() - x).abs() <= bound).all()


def test_products_touch_the_scale_alone() -> None:
    scaled = encode(torch.randn(64), "e4m3")
    codes, values = scaled.codes.clone(), scaled.values()
    scaled.mul_(0.3).div_(torch.tensor(7.0))
    assert torch.equal(scaled.codes.view(torch.uint8), codes.view(torch.uint8))
    torch.testing.assert_close(scaled.values(), values * 0.3 / 7, rtol=1e-6, atol=0)
    assert float(scaled.amax()) == pytest.approx(float(scaled.values().abs().max()))
    assert float(scaled.norm()) == pytest.approx(float(scaled.values().norm()))


def test_fp16_keeps_what_e4m3_keeps() -> None:
    scaled = encode(torch.full((3,), 2.0**-17), "fp16")
    assert torch.equal(encode(scaled.values(), "e4m3").values(), torch.full((3,), 2.0**-17))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_shows_in_the_amax_and_in_the_codes(bad: float) -> None:
    x = torch.ones(4, 4)
    x[2, 1] = bad
    scaled = encode(x, "e4m3")
    assert not torch.isfinite(amax_of(x))
    assert not torch.isfinite(scaled.amax())
    assert int(scaled.values().isnan().sum()) == 1


@given(st.integers(1, 100), st.sampled_from([1, 7, 16]))
def test_blocks_have_their_own_scales(size: int, block: int) -> None:
    x = torch.randn(size) * 10.0 ** torch.arange(size).div(10).floor()
    blocks = encode_blocks(x, "e4m3", block)
    assert blocks.scale_inv.numel() == -(-size // block)
    alone = torch.cat([encode(part, "e4m3").values() for part in x.split(block)])  # type: ignore[no-untyped-call]
    assert torch.equal(blocks.values(), alone)


def test_codes_of_the_largest_value_may_be_honest_ones() -> None:
    assert saturated(cast(torch.tensor([431.0, 433.0, -448.0, 448.1]), "e4m3")).tolist() == [
        False,
        True,
        True,
        True,
    ]


@given(st.integers(-80, 60), st.floats(1.0, 60.0), st.integers(2, 300))
def test_expansion_keeps_every_nonzero_and_the_sign(low: int, octaves: float, size: int) -> None:
    powers = torch.linspace(low, low + octaves, size)
    x = torch.exp2(powers) * torch.where(torch.arange(size) % 2 == 0, 1.0, -1.0)
    x = torch.cat([x, torch.zeros(3)])
    back = expand(x, 128).values()
    assert torch.equal(back.sign(), x.sign())


def test_expansion_has_the_published_exponent() -> None:
    x = torch.exp2(torch.linspace(-30.0, 0.0, 128))
    # log2(448^2 / 2) / 30 octaves = 0.5538, floored to sixteenths.
    assert float(expand(x, 128).exponent) == 8 / 16


def test_expansion_of_nothing_and_of_one_value() -> None:
    zeros = expand(torch.zeros(5), 128)
    assert torch.equal(zeros.values(), torch.zeros(5))
    alike = torch.full((10,), 3e-9)
    torch.testing.assert_close(expand(alike, 128).values(), alike, rtol=1e-2, atol=0)
