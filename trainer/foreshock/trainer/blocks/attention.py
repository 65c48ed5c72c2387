"""Causal self-attention: projections, grouped heads, rotary positions.

The two products themselves, and their precision, are the core's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from foreshock.trainer.blocks.heads import GainedHeads
from foreshock.trainer.blocks.parts import Parts, Tap
from foreshock.trainer.config import ModelConfig
from foreshock.trainer.precision import HeadSizes

__all__ = ["Attention", "bounded_scale", "rotary_turns", "usual_scale"]

ROTARY_BASE = 500_000.0


def usual_scale(head_width: int) -> float:
    """Factor of attention logits that keeps the variance of random q and k: 1/sqrt(K)."""
    return float(head_width**-0.5)


def bounded_scale(head_width: int) -> float:
    """FOG's factor of attention logits, for any head width K.

    FOG sets 0.125 at K = 128: sqrt(2) times the usual 1/sqrt(K), and logits of normalised q and k
    (|q k| <= K) stay within 16. sqrt(2/K) is that scale at 128 and bounds logits by sqrt(2 K), so
    by 16 for smaller heads; wider heads take 16/K, which keeps the bound.
    """
    return min(math.sqrt(2 / head_width), 16 / head_width)


def rotary_turns(length: int, head_width: int, device: torch.device) -> Tensor:
    """Rotary positions as complex numbers exp(i position base^(-2j/K)), shape (T, 1, K/2).

    Base 500,000, as Llama 3. Llama 3.1's stretching of low frequencies for long contexts is left
    out: sequences here are short.
    """
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = positions[:, None] * ROTARY_BASE**-exponents
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (x_2j, x_2j+1) by their angle; x (B, T, H, K).

    Args:
        x: Heads.
        turns: Complex (T, 1, K/2), or its real and imaginary parts (T, 1, K/2, 2): torch.compile
            makes no kernels of complex numbers.
    """
    if not turns.is_complex():
        cosine, sine = turns.unbind(-1)
        first, second = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
        turned = (first * cosine - second * sine, first * sine + second * cosine)
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Attention(nn.Module):
    """W_out softmax(scale q k^T + causal) v without bias; query head h reads key head h G // H.

    Args:
        parts: Makes the two linear layers, `qkv` and `out`, and what is between them, `core`.
        config: Sizes.
        scale: Factor of q k^T before the softmax.
        regulariser: Keeps queries and keys in bounds (`heads.py`); None leaves them as they are.
    """

    def __init__(
        self, parts: Parts, config: ModelConfig, *, scale: float, regulariser: nn.Module | None
    ) -> None:
        super().__init__()
        self.heads, self.key_heads = config.heads, config.key_heads
        self.head_width = config.head_width
        every_head = self.heads + 2 * self.key_heads
        self.qkv = parts.linear(config.width, every_head * self.head_width)
        self.regulariser = regulariser
        self.query, self.key = Tap("query"), Tap("key")
        heads = HeadSizes(self.heads, self.key_heads, self.head_width)
        self.core = parts.attention_core(scale=scale, heads=heads)
        self.out = parts.linear(config.width, config.width)

    def keep_heads(self, ranks: int) -> None:
        """Compute one of `ranks` equal parts of the heads; the layers are cut by the caller."""
        self.heads, self.key_heads = self.heads // ranks, self.key_heads // ranks
        if isinstance(self.regulariser, GainedHeads):
            self.regulariser.keep_heads(ranks)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        # (lead B, T, H + 2 G, K), q then k then v: the stack folds into the batch.
        qkv = self.qkv(x).view(-1, x.shape[-2], self.heads + 2 * self.key_heads, self.head_width)
        qk, v = torch.split(qkv, [self.heads + self.key_heads, self.key_heads], dim=2)
        if self.regulariser is not None:
            qk = self.regulariser(qk)
        # As FOG's released code sees them: bounded, not yet turned.
        self.query(qk[:, :, : self.heads])
        self.key(qk[:, :, self.heads :])
        if turns.is_complex():
            rotated = rotate(qk, turns).transpose(1, 2)
            q, k = torch.split(rotated, [self.heads, self.key_heads], dim=1)
        else:
            # Apart, so that both are whole tensors: fused attention would copy slices.
            parts = torch.split(qk, [self.heads, self.key_heads], dim=2)
            q, k = (rotate(part, turns).transpose(1, 2) for part in parts)
        mixed = self.core(q, k, v.transpose(1, 2))
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(*x.shape[:-1], self.out.in_features))
        return y
