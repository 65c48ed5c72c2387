"""What blocks are made of: linear layers, norms, rotary positions, causal attention.

Shape letters: lead = () for one model or (E,) for a stack of E models, B sequences, T tokens,
D residual width, H heads, K head width. Activations between GEMMs are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreshock.trainer.blocks.fused import rms_norm, unit_rms
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision import AttentionCore, GemmLinear, attention_core, gemm_linear

__all__ = ["Attention", "Parts", "RMSNorm", "rotary_turns"]

ROTARY_BASE = 500_000.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Makes the parts of a block for one model or for a stack.

    Attributes:
        precision: Recipe of the GEMMs, one per model of the stack.
        lead: () or (E,).
    """

    precision: tuple[PrecisionConfig, ...]
    lead: tuple[int, ...] = ()

    def linear(self, in_features: int, out_features: int) -> GemmLinear:
        """A linear layer without bias, its weight not yet initialised."""
        return gemm_linear(in_features, out_features, precision=self.precision, lead=self.lead)

    def attention_core(self, *, scale: float) -> AttentionCore:
        """Attention's two products, after the rotation; grouped key and value heads allowed.

        Args:
            scale: Factor of q k^T before the softmax.
        """
        return attention_core(scale=scale, precision=self.precision, lead=self.lead)

    def norm(self, width: int, initial_gain: float = 1.0) -> RMSNorm:
        """An RMSNorm with a learnable gain per feature."""
        return RMSNorm(width, lead=self.lead, initial_gain=initial_gain)


class RMSNorm(nn.Module):
    """g z / sqrt(mean(z^2) + 1e-5) over features; g of shape (*lead, D) is learnable."""

    def __init__(self, width: int, *, lead: tuple[int, ...], initial_gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((*lead, width), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        return rms_norm(x, self.gain)


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
    """Turn the pairs (x_2j, x_2j+1) by their angle; x (B, T, H, K)."""
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention over all heads, without bias.

    Args:
        parts: Makes the two linear layers, `qkv` and `out`, and what is between them, `core`.
        width: D.
        heads: H.
        scale: Factor of q k^T before the softmax.
        normalise_heads: Divide q and k by their RMS per head before the rotation, without a gain.
    """

    def __init__(
        self, parts: Parts, *, width: int, heads: int, scale: float, normalise_heads: bool
    ) -> None:
        super().__init__()
        self.heads, self.normalise_heads = heads, normalise_heads
        self.qkv = parts.linear(width, 3 * width)
        self.core = parts.attention_core(scale=scale)
        self.out = parts.linear(width, width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        tokens, width = x.shape[-2:]
        # (lead B, T, 3 H, K), q then k then v: the stack folds into the batch.
        qkv = self.qkv(x).view(-1, tokens, 3 * self.heads, width // self.heads)
        qk, v = qkv.split((2 * self.heads, self.heads), dim=2)
        if self.normalise_heads:
            qk = unit_rms(qk)
        q, k = rotate(qk, turns).transpose(1, 2).chunk(2, dim=1)
        mixed = self.core(q, k, v.transpose(1, 2))
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return y
