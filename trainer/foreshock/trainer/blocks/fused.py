"""RMSNorm, xIELU and cross-entropy with hand-written gradients.

Their equations in plain torch operations cost two to three times as much on a CPU, where each
intermediate is a pass through memory. No low precision here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["cross_entropy", "rms_norm", "unit_rms", "xielu"]

NORM_EPS = 1e-5
XIELU_BETA = 0.5


def unit_rms(x: Tensor) -> Tensor:
    """Z / sqrt(mean(z^2) + 1e-5) over the last axis, without a gain."""
    if torch.compiler.is_compiling() or x.dtype == torch.bfloat16:
        # Compiled, plain operations fuse better than what is written by hand here.
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + NORM_EPS)).to(x.dtype)
    y: Tensor = _UnitRms.apply(x)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """G z / sqrt(mean(z^2) + 1e-5) over the last axis; x (*lead, B, T, D), gain (*lead, D)."""
    return (unit_rms(x) * gain[..., None, None, :]).to(x.dtype)


def xielu(x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
    """XIELU with b = 1/2: a_p x^2 + b x above zero, a_n (expm1(x) - x) + b x below.

    The published code takes expm1 of min(x, -1e-6); without it values differ by at most 1e-6 a_n.

    Args:
        x: Any shape.
        a_p: Broadcasts against x.
        a_n: Broadcasts against x.
    """
    if torch.compiler.is_compiling() or x.dtype == torch.bfloat16:
        wide = x.float()
        above = a_p * wide.square()
        # exp - 1 is off by 6e-8, far below bfloat16, and several times faster than expm1.
        negative = wide.clamp(max=0.0)
        grown = torch.exp(negative) - 1.0 if x.dtype == torch.bfloat16 else torch.expm1(negative)
        below = a_n * (grown - wide)
        return (torch.where(wide > 0, above, below) + XIELU_BETA * wide).to(x.dtype)
    y: Tensor = _Xielu.apply(x, a_p, a_n)  # type: ignore[no-untyped-call]
    return y


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each row; logits (N, vocabulary), targets int64 (N,)."""
    if torch.compiler.is_compiling():
        return functional.cross_entropy(logits, targets, reduction="none")
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _UnitRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(NORM_EPS).rsqrt_()
        y: Tensor = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        projection = (grad * y).mean(-1, keepdim=True)
        result: Tensor = torch.addcmul(grad, y, projection, value=-1).mul_(inverse)
        return result


class _Xielu(torch.autograd.Function):
    # Two clamps instead of a mask: masks are the slowest operations of torch on a CPU.
    @staticmethod
    def forward(ctx: Any, x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
        positive, negative = x.clamp(min=0.0), x.clamp(max=0.0)
        exponential = torch.expm1(negative)
        ctx.save_for_backward(x, exponential, a_p, a_n)
        below = torch.sub(exponential, negative, out=negative).mul_(a_n)
        return positive.square_().mul_(a_p).add_(below).add_(x, alpha=XIELU_BETA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, exponential, a_p, a_n = ctx.saved_tensors
        positive = x.clamp(min=0.0)
        below = (exponential - x).add_(positive).mul_(grad)
        slope = (exponential * a_n).add_(XIELU_BETA).add_((2 * a_p) * positive).mul_(grad)
        above = positive.square_().mul_(grad)
        return slope, above.sum_to_size(a_p.shape), below.sum_to_size(a_n.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, -1)
        ctx.save_for_backward(log_probabilities, targets)
        return -log_probabilities.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_probabilities, targets = ctx.saved_tensors
        slope = log_probabilities.exp()
        rows = torch.arange(len(targets), device=targets.device)
        slope[rows, targets] -= 1.0
        return slope.mul_(grad[:, None]), None
