"""FP8 gradients over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from foreshock.trainer.fp8lm.gradients import GradientStore, add_to_fp8
from foreshock.trainer.fp8lm.scaled import Scaled, encode


def _values(gradient: torch.Tensor | Scaled | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.values() if isinstance(gradient, Scaled) else gradient.float()


def snr_db(accumulate: str, batches: int) -> float:
    weight = nn.Parameter(torch.zeros(64, 64))
    store = GradientStore([weight], accumulate)  # type: ignore[arg-type]
    truth = torch.zeros(64, 64, dtype=torch.float64)
    for batch in range(batches):
        gradient = torch.randn(64, 64, generator=torch.Generator().manual_seed(batch))
        truth += gradient
        (weight * gradient).sum().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is None
    error = _values(store.local()[0]).double() - truth
    return float(10 * torch.log10(truth.square().sum() / error.square().sum()))


@pytest.mark.parametrize(
    ("accumulate", "one", "sixteen"), [("e4m3", 31, 21), ("bf16", 50, 45), ("fp32", 120, 120)]
)
def test_error_budget_over_micro_batches(accumulate: str, one: float, sixteen: float) -> None:
    """FP8 sums lose about 10 log10(n / 2) dB by n micro-batches; wide sums nearly nothing."""
    assert snr_db(accumulate, 1) > one
    assert snr_db(accumulate, 16) > sixteen


def test_adding_is_decode_add_cast() -> None:
    held = encode(torch.randn(500), "e4m3")
    for seed in range(10):
        x = torch.randn(500, generator=torch.Generator().manual_seed(seed))
        expected = encode(held.values() + x, "e4m3")
        held = add_to_fp8(held, x)
        assert torch.equal(held.codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert held.scale == expected.scale


def test_what_no_backward_reached_has_none() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    store = GradientStore([used, unused], "e4m3")
    used.sum().backward()  # type: ignore[no-untyped-call]
    first, second = store.local()
    assert torch.equal(_values(first), torch.ones(2, 2))
    assert second is None
    assert store.bytes == 4 + 8
    store.div_(4.0)
    assert torch.equal(_values(store.local()[0]), torch.full((2, 2), 0.25))
    store.clear()
    assert store.local() == [None, None]
    store.detach()
    used.sum().backward()  # type: ignore[no-untyped-call]
    assert used.grad is not None


def test_nan_of_one_micro_batch_stays() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    store = GradientStore([weight], "e4m3")
    for value in (1.0, math.inf, 1.0):
        (weight * value).sum().backward()  # type: ignore[no-untyped-call]
    assert _values(store.local()[0]).isnan().all()
