"""What keeps queries and keys in bounds: applied to their heads before the rotation.

All take and give shape (lead B, T, H + G, K): H query heads, then G key heads. In one tensor, since
on a CPU every operation more is a pass through memory more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foreshock.trainer.blocks.fused import unit_rms
from foreshock.trainer.blocks.parts import Parts
from foreshock.trainer.config import ModelConfig

__all__ = ["FrozenHeadNorm", "GainedHeads", "HeadTanh", "LearnedHeadNorm", "WholeNorm"]


class FrozenHeadNorm(nn.Module):
    """z / rms(z) per head, without a gain: FOG-max and FOG-opt."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, qk: Tensor) -> Tensor:
        """Shape (lead B, T, H + G, K), kept."""
        return unit_rms(qk)


class GainedHeads(nn.Module):
    """Holds what is learned for queries and for keys, and lays it out over the heads."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        self.lead, self.heads, self.key_heads = parts.lead, config.heads, config.key_heads

    def keep_heads(self, ranks: int) -> None:
        """Lay it out over one of `ranks` equal parts of the heads."""
        self.heads, self.key_heads = self.heads // ranks, self.key_heads // ranks

    def over_heads(self, query: Tensor, key: Tensor) -> Tensor:
        """(*lead, F) for queries and for keys to (*lead, 1, 1, H + G, F)."""
        query = query[..., None, :].expand(*query.shape[:-1], self.heads, -1)
        key = key[..., None, :].expand(*key.shape[:-1], self.key_heads, -1)
        return torch.cat((query, key), -2)[..., None, None, :, :]

    def scaled(self, qk: Tensor, factor: Tensor) -> Tensor:
        """Multiply each model's part of the batch by its own factor."""
        gained = qk.view(*self.lead, -1, *qk.shape[1:]) * factor
        return gained.view(qk.shape).to(qk.dtype)


class LearnedHeadNorm(GainedHeads):
    """g z / rms(z) per head, g of shape (*lead, K) for queries and for keys: OP."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__(parts, config)
        self.query_gain = parts.learned(config.head_width, value=1.0)
        self.key_gain = parts.learned(config.head_width, value=1.0)

    def forward(self, qk: Tensor) -> Tensor:
        """Shape (lead B, T, H + G, K), kept."""
        return self.scaled(unit_rms(qk), self.over_heads(self.query_gain, self.key_gain))


class HeadTanh(GainedHeads):
    """tanh(alpha z), alpha one learnable number for queries and one for keys, first 1: FOG-flash.

    No reduction over the head, so cheaper than a norm; |q k| <= K holds all the same.
    """

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__(parts, config)
        self.query_alpha = parts.learned(1, value=1.0)
        self.key_alpha = parts.learned(1, value=1.0)

    def forward(self, qk: Tensor) -> Tensor:
        """Shape (lead B, T, H + G, K), kept."""
        return self.scaled(qk, self.over_heads(self.query_alpha, self.key_alpha)).tanh()


class WholeNorm(nn.Module):
    """RMSNorm over all query heads together and over all key heads together, with gains: OLMo 2."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        self.lead = parts.lead
        self.widths = config.heads * config.head_width, config.key_heads * config.head_width
        self.query_norm, self.key_norm = (parts.norm(width) for width in self.widths)

    def forward(self, qk: Tensor) -> Tensor:
        """Shape (lead B, T, H + G, K), kept."""
        flat = qk.reshape(*self.lead, -1, qk.shape[1], sum(self.widths))
        q, k = torch.split(flat, list(self.widths), -1)
        return torch.cat((self.query_norm(q), self.key_norm(k)), -1).view(qk.shape)
