"""The model sizes that FOG's paper trains (arXiv 2505.20524; launch script of its released code).

Configurations and their parameter counts; nothing here makes a model that takes memory.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch

from foreshock.trainer.config import Architecture, ModelConfig, PrecisionConfig
from foreshock.trainer.model import Decoder

__all__ = ["Size", "parameter_count", "published"]

Size = Literal["390m", "1.5b", "8b"]

# Width, layers, heads, key heads, gated feed-forward, tied. Heads are 128 wide everywhere.
_SIZES: Final[dict[str, tuple[int, int, int, int, int, bool]]] = {
    "390m": (1024, 16, 8, 4, 4096, True),
    "1.5b": (2048, 16, 16, 8, 8192, False),
    "8b": (4096, 32, 32, 8, 14336, False),
}
_VOCABULARY: Final = 131_072


def published(size: Size, architecture: Architecture = "llama3") -> ModelConfig:
    """The paper's model of a size: 385.9, 1,543.6 or 8,053 million parameters.

    Args:
        size: 390m, 1.5b or 8b.
        architecture: Which blocks; a feed-forward without a gate is 3/2 as wide as one with it.

    Raises:
        ValueError: Another size.
    """
    if size not in _SIZES:
        raise ValueError(f"size is {size!r}; allowed: {', '.join(get_args(Size))}")
    width, layers, heads, kv_heads, ffn_width, tied = _SIZES[size]
    return ModelConfig(
        architecture=architecture,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn_width=ffn_width,
        tied=tied,
        vocabulary=_VOCABULARY,
    )


def parameter_count(config: ModelConfig) -> int:
    """Number of learnable values of a model, a tied matrix counted once; allocates nothing."""
    with torch.device("meta"):
        model = Decoder(config, PrecisionConfig(backend="bf16"))
    return sum(p.numel() for p in model.parameters())
