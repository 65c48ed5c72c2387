"""What blocks are made of: linear layers, norms, and attention's two products.

Shape letters: lead = () for one model or (E,) for a stack of E models, B sequences, T tokens,
D residual width, H query heads, G key heads, K head width. Activations between GEMMs are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foreshock.trainer.blocks.fused import rms_norm
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision import (
    AttentionCore,
    GemmLinear,
    HeadSizes,
    attention_core,
    gemm_linear,
)

__all__ = ["Parts", "RMSNorm", "Tap", "open_taps"]


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

    def attention_core(self, *, scale: float, heads: HeadSizes) -> AttentionCore:
        """Attention's two products, after the rotation; grouped key and value heads allowed.

        Args:
            scale: Factor of q k^T before the softmax.
            heads: Their numbers and width.
        """
        return attention_core(scale=scale, precision=self.precision, lead=self.lead, heads=heads)

    def norm(self, width: int, initial_gain: float = 1.0) -> RMSNorm:
        """An RMSNorm with a learnable gain per feature."""
        return RMSNorm(width, lead=self.lead, initial_gain=initial_gain)

    def learned(self, *shape: int, value: float) -> nn.Parameter:
        """A learnable tensor of one value, shape (*lead, *shape)."""
        return nn.Parameter(torch.full((*self.lead, *shape), value))


class RMSNorm(nn.Module):
    """g z / sqrt(mean(z^2) + 1e-5) over features; g of shape (*lead, D) is learnable."""

    def __init__(self, width: int, *, lead: tuple[int, ...], initial_gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((*lead, width), initial_gain))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        return rms_norm(x, self.gain)

    def extra_repr(self) -> str:
        """Width, for the audit that `print(model)` is."""
        return f"{self.gain.shape[-1]}"


class Tap(nn.Module):
    """Hands a tensor on unchanged: where a monitor may look at what no GEMM takes.

    Closed at first, since every tensor that is measured takes time.

    Args:
        role: What the tensor is, as records name it: residual, query, key.
    """

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role
        self.tapped_role: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        return x

    def extra_repr(self) -> str:
        """Whether it is open, for the audit that `print(model)` is."""
        return "closed" if self.tapped_role is None else "open"


def open_taps(model: nn.Module) -> None:
    """Let a monitor that is attached afterwards see what passes through the model's taps."""
    for module in model.modules():
        if isinstance(module, Tap):
            module.tapped_role = module.role
