"""The rounding that biases attention, and what mends it (arXiv:2510.04212)."""

from __future__ import annotations

import pytest
import torch
from benchmarks.literature import tied_rows
from hypothesis import given
from hypothesis import strategies as st

from foreshock.trainer.config import AttentionName, PrecisionConfig
from foreshock.trainer.precision.attention import attention_core
from foreshock.trainer.precision.biased_attention import BIASED, BiasedAttention, shifted_maximum


def _one_signed(kind: AttentionName, ties: int) -> float:
    q, k, v, gradient = tied_rows(ties, 64, 32, 1)
    core = BiasedAttention(kind, scale=1.0, lead=())
    core(q.requires_grad_(), k, v).backward(gradient)
    assert core.offset_error is not None
    total, magnitude = core.offset_error
    return float(total.abs() / magnitude) if magnitude > 0 else 0.0


def test_two_tied_logits_round_every_row_the_same_way() -> None:
    assert _one_signed("biased", 2) > 0.95
    assert _one_signed("biased_shifted", 2) < 0.4
    assert _one_signed("biased_wide", 2) == 0.0


@pytest.mark.parametrize("kind", BIASED)
def test_it_is_attention_up_to_the_rounding_of_bfloat16(kind: AttentionName) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    recipe = PrecisionConfig(backend="bf16", attention=kind)
    core = attention_core(scale=0.3, precision=[recipe])
    plain = attention_core(scale=0.3, precision=[PrecisionConfig(backend="bf16")])
    weight = torch.randn(2, 4, 9, 8)
    grads = []
    for attention in (core, plain):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mixed = attention(*leaves)
        (mixed * weight).sum().backward()
        grads.append([mixed.detach(), *(x.grad for x in leaves)])
    for low, high in zip(*grads, strict=True):
        assert low is not None and high is not None  # noqa: PT018
        assert (low - high).norm() < 0.02 * high.norm()
        assert not torch.equal(low, high)


@given(st.lists(st.integers(-40, 40), min_size=2, max_size=12))
def test_the_shifted_maximum_changes_no_probability(halves: list[int]) -> None:
    logits = torch.tensor(halves, dtype=torch.float64)[None] / 2
    moved = torch.exp(logits - shifted_maximum(logits))
    share = moved / moved.sum(-1, keepdim=True)
    torch.testing.assert_close(share, torch.softmax(logits, -1), rtol=1e-6, atol=1e-12)
    largest = logits.max()
    if (logits == largest).sum() > 1 and 0 < float(largest) < 12:
        assert float(moved.max()) < 1
