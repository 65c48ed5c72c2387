"""Norms of many tensors in one launch, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.devices import DEVICE

pytest.importorskip("triton")
from foreshock.monitor.fused_norms import FusedNorms

pytestmark = pytest.mark.gpu


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((64,), (3, 5), (70, 1024), (16,), (1,), (256, 32))
    made = [torch.randn(shape, generator=generator) * 10**at for at, shape in enumerate(shapes)]
    kinds = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float16)
    return [x.to(kinds[at % 5]).to(DEVICE) for at, x in enumerate(made)]


def test_they_are_the_norms_in_the_order_given_step_after_step() -> None:
    fused = FusedNorms(DEVICE)
    kept = tensors(0)
    for given in (kept, kept, tensors(1), tensors(2)[::-1], kept):
        found = fused.norms(given)
        assert found is not None
        wanted = torch.stack([x.double().norm() for x in given])
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        again = fused.norms(given)
        assert again is not None
        assert torch.equal(found, again)


def test_what_is_not_finite_shows() -> None:
    fused = FusedNorms(DEVICE)
    given = [torch.ones(64, device=DEVICE) for _ in range(3)]
    given[0][3], given[2][0] = float("inf"), float("nan")
    found = fused.norms(given)
    assert found is not None
    assert found.tolist()[:2] == [float("inf"), 8.0]
    assert found[2].isnan()


def test_what_it_does_not_take_is_left_to_others() -> None:
    fused = FusedNorms(DEVICE)
    for x in (
        torch.ones(4, 4, device=DEVICE).t()[:, :2],
        torch.ones(0, device=DEVICE),
        torch.ones(4, dtype=torch.float64, device=DEVICE),
        torch.ones(64, device=DEVICE)[1:33],
    ):
        assert fused.norms([torch.ones(4, device=DEVICE), x]) is None
