"""Which parts each architecture is made of: the one place that tells them apart.

FOG (Hernandez-Cano et al., arXiv 2505.20524), outlier-guarded by design, per layer:

    q, k, v = W_qkv x                                     no norm before
    q, k    = bounded(q), bounded(k)                      per head, before the rotation
    h       = x + g1 * unit(W_out attention(q, k, v))
    y       = h + g2 * unit(W_down act(W_up h))           g1, g2 start at 1/sqrt(L)

Embeddings are multiplied by 1/sigma, there is no final norm. Llama 3 norms before its branches,
OLMo 2 (arXiv 2501.00656) after them, OP (He et al., arXiv 2405.19279) not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import nn

from foreshock.trainer.blocks.attention import Attention, bounded_scale, usual_scale
from foreshock.trainer.blocks.experts import Experts
from foreshock.trainer.blocks.heads import (
    FrozenHeadNorm,
    HeadTanh,
    LearnedHeadNorm,
    WholeNorm,
)
from foreshock.trainer.blocks.layers import (
    Block,
    PostNormBlock,
    PreNormBlock,
    ScaledBlock,
    ScaledPostNormBlock,
)
from foreshock.trainer.blocks.mlp import (
    ChannelSmoothSwiGLU,
    GeluMlp,
    SwiGLU,
    TokenSmoothSwiGLU,
    XieluMlp,
)
from foreshock.trainer.blocks.parts import Parts
from foreshock.trainer.config import Architecture, ModelConfig

__all__ = ["ARCHITECTURES", "Anatomy"]

Part = Callable[[Parts, ModelConfig], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What an architecture is made of.

    Attributes:
        layer: Where the norms stand.
        mlp: The feed-forward.
        heads: What keeps queries and keys in bounds; None leaves them as they are.
        scale: Factor of attention logits, of the head width.
        unit_embeddings: Embeddings are multiplied by 1/sigma, so that the stream starts at
            variance 1.
        final_norm: The last layer's output is normed.
    """

    layer: type[PreNormBlock] | type[PostNormBlock] | type[ScaledBlock]
    mlp: Part
    heads: Part | None = None
    scale: Callable[[int], float] = usual_scale
    unit_embeddings: bool = False
    final_norm: bool = False

    def block(self, parts: Parts, config: ModelConfig) -> Block:
        """Make one layer, its matrices not yet initialised."""
        regulariser = None if self.heads is None else self.heads(parts, config)
        scale = self.scale(config.head_width)
        attention = Attention(parts, config, scale=scale, regulariser=regulariser)
        return self.layer(parts, config, attention=attention, mlp=self.mlp(parts, config))


def _llama(mlp: Part) -> Anatomy:
    return Anatomy(layer=PreNormBlock, mlp=mlp, final_norm=True)


def _fog(mlp: Part, heads: Part = FrozenHeadNorm) -> Anatomy:
    return Anatomy(
        layer=ScaledPostNormBlock, mlp=mlp, heads=heads, scale=bounded_scale, unit_embeddings=True
    )


ARCHITECTURES: Final[dict[Architecture, Anatomy]] = {
    "llama3": _llama(SwiGLU),
    "llama3_smooth_swiglu": _llama(ChannelSmoothSwiGLU),
    "llama3_smooth_swiglu_token": _llama(TokenSmoothSwiGLU),
    "olmo2": Anatomy(layer=PostNormBlock, mlp=SwiGLU, heads=WholeNorm, final_norm=True),
    # The released code (bobby-he/simplified_transformers) norms the first layer's input; embeddings
    # of one variance times 1/sigma come to the same. Its final norm is GPT-2's.
    "op": Anatomy(
        layer=ScaledBlock,
        mlp=GeluMlp,
        heads=LearnedHeadNorm,
        unit_embeddings=True,
        final_norm=True,
    ),
    "fog_max": _fog(XieluMlp),
    "fog_opt": _fog(GeluMlp),
    "fog_flash": _fog(GeluMlp, HeadTanh),
    "fog_swiglu": _fog(SwiGLU),
    "fog_moe": _fog(Experts),
}
