"""What blocks are made of: hand-written gradients and first values; whole models elsewhere."""

import math

import pytest
import torch
from torch import Tensor

from foreshock.trainer.blocks.attention import bounded_scale
from foreshock.trainer.blocks.fused import cross_entropy, rms_norm, unit_rms, xielu
from foreshock.trainer.blocks.mlp import XIELU


def test_xielu_starts_where_the_paper_starts() -> None:
    # a_p = a_n = 0.8: 0.8 + 0.5 at 1, 0.8 (exp(-1) - 1 + 1) - 0.5 at -1.
    ones = XIELU(())(torch.tensor([1.0, -1.0]).view(1, 1, 2)).flatten().tolist()
    assert ones == pytest.approx([1.3, 0.8 * math.exp(-1) - 0.5])


@pytest.mark.parametrize("head_width", [8, 16, 128, 256])
def test_fog_logits_cannot_leave_their_bound(head_width: int) -> None:
    assert bounded_scale(128) == pytest.approx(0.125)
    # Normalised q and k are at most sqrt(K) long each.
    assert bounded_scale(head_width) * head_width <= 16 + 1e-12


def test_hand_written_gradients() -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(unit_rms, (random(2, 3, 4),))
    assert torch.autograd.gradcheck(rms_norm, (random(2, 1, 3, 4), random(2, 4)))
    alphas = random(2, 1, 1, 1), random(2, 1, 1, 1)
    assert torch.autograd.gradcheck(xielu, (random(2, 1, 3, 4), *alphas))
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (random(3, 5),))


def test_cross_entropy_is_torchs() -> None:
    logits, targets = 30 * torch.randn(7, 5), torch.arange(7) % 5
    logits[3, 0] = torch.inf
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, targets), expected, equal_nan=True)
