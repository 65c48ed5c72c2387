"""The FOG-max block (Hernandez-Cano et al., arXiv 2505.20524): outlier-guarded by design.

    q, k, v = W_qkv x                    no pre-norm
    q, k    = q / rms(q), k / rms(k)     per head, without gain, before the rotation
    h       = x + RMSNorm_g1(W_o attention(q, k, v))
    y       = h + RMSNorm_g2(W_down xIELU(W_up h)),    g1, g2 start at 1/sqrt(L)

The model multiplies embeddings by 1/sigma and has no final norm. Attention's own products stay
out of FP8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.blocks.fused import XIELU_BETA, xielu
from foreshock.trainer.blocks.parts import Attention, Parts
from foreshock.trainer.config import ModelConfig

__all__ = ["XIELU", "FogMaxBlock", "FogMlp", "softmax_scale"]

_INITIAL_ALPHA = 0.8


def softmax_scale(head_width: int) -> float:
    """FOG's scale of attention logits, for any head width K.

    FOG sets 0.125 at K = 128: sqrt(2) times the usual 1/sqrt(K), and logits of normalised q and k
    (|q k| <= K) stay within 16. sqrt(2/K) is that scale at 128 and bounds logits by sqrt(2 K), so
    by 16 for smaller heads; wider heads take 16/K, which keeps the bound.
    """
    return min(math.sqrt(2 / head_width), 16 / head_width)


class XIELU(nn.Module):
    """xIELU: a_p x^2 + x/2 above zero, a_n (expm1(x) - x) + x/2 below.

    a_p = softplus(p) and a_n = 1/2 + softplus(n), both 0.8 at first; p and n are learnable, one
    of each per layer (shape (*lead, 1)).
    """

    def __init__(self, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((*lead, 1), math.log(math.expm1(_INITIAL_ALPHA))))
        self.n = nn.Parameter(
            torch.full((*lead, 1), math.log(math.expm1(_INITIAL_ALPHA - XIELU_BETA)))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, features), kept."""
        a_p = functional.softplus(self.p)[..., None, None]
        a_n = XIELU_BETA + functional.softplus(self.n)[..., None, None]
        return xielu(x, a_p, a_n)


class FogMlp(nn.Module):
    """W_down xIELU(W_up x), without a gate."""

    def __init__(self, parts: Parts, *, width: int, hidden: int) -> None:
        super().__init__()
        self.up = parts.linear(width, hidden)
        self.activation = XIELU(parts.lead)
        self.down = parts.linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


class FogMaxBlock(nn.Module):
    """One layer."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        gain = config.layers**-0.5
        self.attention = Attention(
            parts,
            width=config.width,
            heads=config.heads,
            scale=softmax_scale(config.width // config.heads),
            normalise_heads=True,
        )
        self.attention_norm = parts.norm(config.width, gain)
        self.mlp = FogMlp(parts, width=config.width, hidden=config.gated_ffn_width * 3 // 2)
        self.mlp_norm = parts.norm(config.width, gain)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        h = x + self.attention_norm(self.attention(x, turns))
        y: Tensor = h + self.mlp_norm(self.mlp(h))
        return y
