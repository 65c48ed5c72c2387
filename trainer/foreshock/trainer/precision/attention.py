"""The two products of causal attention, q k^T and P v, behind one kind of module.

Projections, head norms and rotary positions stay with the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.config import PrecisionConfig

__all__ = ["AttentionCore", "PlainAttention", "attention_core"]


def attention_core(
    *, scale: float, precision: Sequence[PrecisionConfig], lead: tuple[int, ...] = ()
) -> AttentionCore:
    """Make the attention that the recipes ask for.

    Args:
        scale: Factor of q k^T before the softmax.
        precision: The recipe, or one per model of a stack.
        lead: () for one model, (E,) for a stack.
    """
    return PlainAttention(scale=scale, lead=lead)


class AttentionCore(nn.Module, ABC):
    """softmax(scale q k^T + causal mask) v, per head.

    Args:
        scale: Factor of q k^T before the softmax.
        lead: () for one model, (E,) for a stack whose E models are folded into the batch.
    """

    def __init__(self, *, scale: float, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.scale, self.lead = scale, lead

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values.

        Args:
            q: Shape (prod(lead) B, H, T, K).
            k: The same, or with fewer heads that divide H: grouped queries, query head h attends
                to key head h // (H / key heads).
            v: Shape of k.

        Returns:
            Shape of q.
        """

    def extra_repr(self) -> str:
        """Scale, for the audit that `print(model)` is."""
        return f"scale={self.scale:.6g}"


class PlainAttention(AttentionCore):
    """torch's own, in the type of its inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `AttentionCore.forward`."""
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )
