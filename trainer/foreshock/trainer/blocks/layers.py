"""One layer of a decoder: attention and a feed-forward on the residual stream.

Three ways to keep the stream in bounds: norms before the branches, norms after them, or none and
a small factor. What the branches are made of is decided in `architectures.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from foreshock.trainer.blocks.parts import Parts, Tap
from foreshock.trainer.config import ModelConfig

__all__ = ["Block", "PostNormBlock", "PreNormBlock", "ScaledBlock", "ScaledPostNormBlock"]


class Block(nn.Module):
    """One layer; `forward(x, turns)` takes and gives the residual stream (*lead, B, T, D)."""

    attention: nn.Module
    mlp: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.residual = Tap("residual")


class PreNormBlock(Block):
    """h = x + attention(norm(x)), y = h + mlp(norm(h)): Llama 3."""

    def __init__(
        self, parts: Parts, config: ModelConfig, *, attention: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.attention_norm = parts.norm(config.width)
        self.attention = attention
        self.mlp_norm = parts.norm(config.width)
        self.mlp = mlp

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        h = x + self.attention(self.attention_norm(x), turns)
        y: Tensor = self.residual(h + self.mlp(self.mlp_norm(h)))
        return y


class PostNormBlock(Block):
    """h = x + norm(attention(x)), y = h + norm(mlp(h)): OLMo 2."""

    def __init__(
        self, parts: Parts, config: ModelConfig, *, attention: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        gain = self.gain_of(config)
        self.attention = attention
        self.attention_norm = parts.norm(config.width, gain)
        self.mlp = mlp
        self.mlp_norm = parts.norm(config.width, gain)

    def gain_of(self, config: ModelConfig) -> float:
        """Gain of the norms at first."""
        return 1.0

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        h = x + self.attention_norm(self.attention(x, turns))
        y: Tensor = self.residual(h + self.mlp_norm(self.mlp(h)))
        return y


class ScaledPostNormBlock(PostNormBlock):
    """As OLMo 2's, with gains of 1/sqrt(L) at first: FOG.

    2 L branches of variance 1/L let a stream of variance 1 grow to 3, whatever the depth.
    """

    def gain_of(self, config: ModelConfig) -> float:
        """1/sqrt(L)."""
        return float(config.layers**-0.5)


class ScaledBlock(Block):
    """h = x + attention(x)/sqrt(L), y = h + mlp(h)/sqrt(L), without norms: OP."""

    def __init__(
        self, parts: Parts, config: ModelConfig, *, attention: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.branch_scale = float(config.layers**-0.5)
        self.attention = attention
        self.mlp = mlp

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        h = x + self.branch_scale * self.attention(x, turns)
        y: Tensor = self.residual(h + self.branch_scale * self.mlp(h))
        return y

    def extra_repr(self) -> str:
        """Factor of the branches, for the audit that `print(model)` is."""
        return f"branch_scale={self.branch_scale:.4g}"
