"""The Llama 3 block: pre-norm, rotary positions, SwiGLU.

    h = x + W_o attention(RMSNorm(x));  y = h + W_down (silu(W_gate n) * W_up n),  n = RMSNorm(h)

Grouped key/value heads are left out: at these widths every head has its own.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.blocks.parts import Attention, Parts
from foreshock.trainer.config import ModelConfig

__all__ = ["LlamaBlock", "SwiGLU"]


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, parts: Parts, *, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = parts.linear(width, hidden)
        self.up = parts.linear(width, hidden)
        self.down = parts.linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class LlamaBlock(nn.Module):
    """One layer; the model adds the final norm."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = parts.norm(config.width)
        self.attention = Attention(
            parts,
            width=config.width,
            heads=config.heads,
            scale=(config.width // config.heads) ** -0.5,
            normalise_heads=False,
        )
        self.mlp_norm = parts.norm(config.width)
        self.mlp = SwiGLU(parts, width=config.width, hidden=config.gated_ffn_width)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        h = x + self.attention(self.attention_norm(x), turns)
        y: Tensor = h + self.mlp(self.mlp_norm(h))
        return y
