"""Language model head and cross-entropy in one, where activations are bfloat16.

Logits of a large vocabulary would be the largest tensor of a step by far: rows are taken a piece at
a time, and gradients are made on the way forward, so that no logits are kept and no product is done
twice.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["HeadLoss"]

_LOGITS_AT_ONCE: Final = 2**29
"""Elements: 2 GiB in float32."""


class HeadLoss(nn.Module):
    """Mean cross-entropy of softmax(x W^T), products in bfloat16 and the softmax in float32."""

    def forward(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Nats per row, 0-dim float32.

        Args:
            x: bfloat16 (N, D).
            weight: float32 (vocabulary, D).
            targets: int64 (N,).
        """
        if not torch.is_grad_enabled():
            logits = functional.linear(x, weight.to(x.dtype)).float()
            return functional.cross_entropy(logits, targets)
        rows = max(1, _LOGITS_AT_ONCE // weight.shape[0])
        loss: Tensor = _HeadLoss.apply(x, weight, targets, rows, self.pieces)  # type: ignore[no-untyped-call]
        return loss

    def __init__(self) -> None:
        super().__init__()
        self.pieces = slope_of

    def compile_inside(self, backend: str = "inductor") -> None:
        """Fuse what is done with a piece's logits (torch.compile)."""
        self.pieces = torch.compile(slope_of, dynamic=False, backend=backend)


def slope_of(logits: Tensor, targets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of a piece's losses, and d mean / d logits in the logits' type.

    Args:
        logits: (rows, vocabulary).
        targets: int64 (rows,).
        count: Rows over all pieces.
    """
    wide = logits.float()
    total = torch.logsumexp(wide, -1, keepdim=True)
    hit = torch.arange(wide.shape[-1], device=wide.device) == targets[:, None]
    slope = ((wide - total).exp() - hit.float()) / count
    loss = total.sum() - torch.where(hit, wide, 0.0).sum()
    return loss, slope.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, pieces: Any
    ) -> Tensor:
        narrow = weight.to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_weight: Tensor | None = None
        loss = torch.zeros((), device=x.device)
        for start in range(0, len(x), rows):
            here = slice(start, start + rows)
            part, slope = pieces(x[here] @ narrow.t(), targets[here], len(x))
            loss += part
            grad_x[here] = slope @ narrow
            found = slope.t() @ x[here]
            grad_weight = found.float() if grad_weight is None else grad_weight.add_(found)
        assert grad_weight is not None
        ctx.save_for_backward(grad_x, grad_weight)
        return loss / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # In place: nobody else holds them, and they are as large as the head.
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None, None
