"""Attention whose 16-bit output is rounded one way, and two mends: a known failure, for study.

A fused kernel sums unnormalised probabilities exp(S - max S) times values and keeps bfloat16
results. Where several logits tie at the maximum their probabilities are exactly 1, so the sum of
as many values has more bits than bfloat16 keeps, and values of one sign are rounded one way. In
backward, D = rowsum(dO O) takes the error along, one-signed, into the gradient of every logit
(arXiv:2510.04212).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreshock.trainer.config import AttentionName
from foreshock.trainer.precision.attention import AttentionCore

__all__ = ["BIASED", "BiasedAttention", "shifted_maximum"]

BIASED: Final[tuple[AttentionName, ...]] = ("biased", "biased_shifted", "biased_wide")
"""As the failing kernel, with the shifted maximum, with a float32 output for D."""
_BETA: Final = 7.0


def shifted_maximum(logits: Tensor, beta: float = _BETA) -> Tensor:
    """What is subtracted from each row's logits so that no probability of a tied row is 1.

    The row's maximum m, where only one logit has it; else beta m where m > 0, and 0 where m < 0.
    The softmax is the same; exp(S - m') of the tied logits is below 1 and keeps its bits.

    Args:
        logits: (..., rows, columns), masked ones -inf.
        beta: Above 1; the paper takes 2 to 8.

    Returns:
        (..., rows, 1).
    """
    m = logits.amax(-1, keepdim=True)
    tied = (logits == m).sum(-1, keepdim=True) > 1
    moved = torch.where(m > 0, beta * m, torch.zeros_like(m))
    # exp(S - m') must not vanish wholly: beyond exp(-80) the row keeps its maximum.
    return torch.where(tied & ((moved - m) < 80.0), moved, m)


class BiasedAttention(AttentionCore):
    """softmax(scale q k^T + causal mask) v with bfloat16 operands and bfloat16 output.

    Logits and sums are float32. Forward: P~ = bf16(exp(S - m)), O~ = bf16(P~ v), O = bf16(O~ / l)
    with l the row sums of exp(S - m) in float32. Backward: dS = P (dO v^T - D), D = rowsum(dO O).

    Args:
        kind: One of `BIASED`.
        scale: Factor of q k^T.
        lead: As for any core.

    Attributes:
        offset_error: Sum over rows of D's deviation from D of a float32 output, and of its
            magnitude, in the latest backward; 0-dim tensors (None before).
    """

    def __init__(self, kind: AttentionName, *, scale: float, lead: tuple[int, ...]) -> None:
        super().__init__(scale=scale, lead=lead)
        self.kind = kind
        self.offset_error: tuple[Tensor, Tensor] | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `AttentionCore.forward`."""
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        mixed: Tensor = _Attention.apply(q, k, v, self)  # type: ignore[no-untyped-call]
        return mixed

    def extra_repr(self) -> str:
        """Scale and kind."""
        return f"{super().extra_repr()}, {self.kind}"


def _bf16(x: Tensor) -> Tensor:
    """Rounded to bfloat16, kept in float32: products of such numbers add up as in a GEMM."""
    return x.bfloat16().float()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, core: BiasedAttention) -> Tensor:
        q, k, v = _bf16(q), _bf16(k), _bf16(v)
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        logits = (q @ k.transpose(-1, -2) * core.scale).masked_fill(future, -torch.inf)
        if core.kind == "biased_shifted":
            raw = torch.exp(logits - shifted_maximum(logits))
        else:
            raw = torch.exp(logits - logits.amax(-1, keepdim=True))
        total = raw.sum(-1, keepdim=True)
        unnormalised = _bf16(raw) @ v
        wide = unnormalised / total
        mixed = _bf16(_bf16(unnormalised) / total)
        ctx.save_for_backward(q, k, v, raw / total, mixed, wide)
        ctx.core = core
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, probabilities, mixed, wide = ctx.saved_tensors
        core: BiasedAttention = ctx.core
        grad = _bf16(gradient)
        exact = (grad * wide).sum(-1, keepdim=True)
        offset = exact if core.kind == "biased_wide" else (grad * mixed).sum(-1, keepdim=True)
        error = offset - exact
        core.offset_error = (error.sum(), error.abs().sum())
        grad_v = _bf16(probabilities).transpose(-1, -2) @ grad
        slope = _bf16(probabilities * (grad @ v.transpose(-1, -2) - offset))
        grad_q = slope @ k * core.scale
        grad_k = slope.transpose(-1, -2) @ q * core.scale
        return grad_q, grad_k, grad_v, None
