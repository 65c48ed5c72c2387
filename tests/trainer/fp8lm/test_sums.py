"""FP8 sums, and what is lost in them: the golden numbers of msamp.md, c.5."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreshock.trainer.fp8lm.scaled import cast, power_of_two_scale
from foreshock.trainer.fp8lm.sums import add_codes, running_sum, saturating_add


def codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("a", "b", "total"), [(0x4A, 0x50, 0x55), (0x58, 0x5C, 0x62), (0x7E, 0x59, 0x7E)]
)
def test_golden_sums(a: int, b: int, total: int) -> None:
    """5 + 8 = 13, 16 + 24 = 40, and 448 + 18, which must not be NaN."""
    found, over = saturating_add(codes(a), codes(b))
    assert found.view(torch.uint8).tolist() == [total]
    assert over.tolist() == [total == 0x7E]


def test_nan_stays() -> None:
    found, over = running_sum([codes(0x7F), codes(0x38), codes(0x38)])
    assert found.float().isnan().all()
    assert not over.any()


@given(st.lists(st.integers(0, 255), min_size=2, max_size=6))
def test_sums_of_numbers_are_numbers(values: list[int]) -> None:
    total, over = running_sum([codes(v) for v in values])
    finite = all((v & 0x7F) != 0x7F for v in values)
    assert bool(total.float().isfinite().all()) == finite
    assert not over.any() or finite or len(values) > 2


def snr(ranks: int, correlation: float, mu: float) -> tuple[float, float]:
    """dB of the running sum and of the float32 sum of codes, gaussian gradients."""
    torch.manual_seed(0)
    size = 2**14
    x = correlation**0.5 * torch.randn(size) + (1 - correlation) ** 0.5 * torch.randn(ranks, size)
    scale = power_of_two_scale(x.abs().amax(), "e4m3", torch.ones(())) * mu
    coded = list(cast(x * scale, "e4m3").unbind(0))
    truth = x.double().sum(0)
    inverse = [scale.reciprocal()] * ranks
    running = running_sum(coded)[0].double() / scale.double()

    def db(found: torch.Tensor) -> float:
        return float(10 * torch.log10(truth.square().sum() / (found - truth).square().sum()))

    return db(running), db(add_codes(coded, inverse).double())


@pytest.mark.parametrize(
    ("ranks", "running", "wide"), [(2, 28.1, 31.6), (8, 23.8, 31.6), (64, 16.2, 31.5)]
)
def test_running_sums_lose_with_every_rank(ranks: int, running: float, wide: float) -> None:
    found = snr(ranks, 0.0, 1 / ranks**0.5 if ranks != 2 else 0.5)
    assert found == pytest.approx((running, wide), abs=0.6)


def test_post_scaling_saturates() -> None:
    """At 64 processes half of the sums; with gradients that agree already at 8."""
    assert snr(64, 0.0, 1.0)[0] < 8
    assert snr(8, 0.95, 1.0)[0] < 12
    assert snr(8, 0.95, 1 / 8)[0] > 24
