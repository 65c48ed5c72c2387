"""AdamW with weight decay where it belongs, and clipping that tells the norm before it.

The update is torch's own; this trainer deliberately does not write its own AdamW for one model.
"""

from __future__ import annotations

import torch
from torch import nn

from foreshock.trainer.config import OptimizerConfig

__all__ = ["clip_gradients", "make_optimizer", "set_learning_rate"]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW in two groups: tensors of two and more dimensions decay, gains and scalars do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(model: nn.Module, limit: float | None) -> torch.Tensor:
    """Scale the gradients down to a global L2 norm of at most `limit`; None leaves them alone.

    Returns:
        The norm before clipping, 0-dim, on the gradients' device; NaN or infinite if they are.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
