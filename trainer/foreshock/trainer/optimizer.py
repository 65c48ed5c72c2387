"""AdamW with weight decay where it belongs, and clipping that tells the norm before it.

In float32 the update is torch's own; from FP8-LM's level O1 on it is `fp8lm.Fp8AdamW`.
"""

from __future__ import annotations

import torch
from torch import nn

from foreshock.trainer.config import CommunicationConfig, OptimizerConfig, StatesConfig
from foreshock.trainer.fp8lm import Fp8AdamW, fp8_optimizer

__all__ = ["clip_gradients", "make_optimizer", "set_learning_rate"]


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    states: StatesConfig | None = None,
    communication: CommunicationConfig | None = None,
) -> torch.optim.AdamW | Fp8AdamW:
    """AdamW in two groups: tensors of two and more dimensions decay, gains and scalars do not.

    Args:
        model: From level O1 on its matrices are replaced by their codes; so this comes before any
            wrapper or watch.
        config: Settings.
        states: Formats; None is level O0, torch's AdamW.
        communication: How FP8 gradients are reduced.
    """
    if states is not None and states.level != "O0":
        return fp8_optimizer(
            model,
            states,
            communication,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
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


def clip_gradients(
    model: nn.Module, limit: float | None, optimizer: torch.optim.Optimizer | None = None
) -> torch.Tensor:
    """Scale the gradients down to a global L2 norm of at most `limit`; None leaves them alone.

    Args:
        model: Whose gradients.
        limit: Largest norm.
        optimizer: Of the model; one that holds gradients itself reduces and clips them.

    Returns:
        The norm before clipping, 0-dim, on the gradients' device; NaN or infinite if they are.
    """
    if isinstance(optimizer, Fp8AdamW):
        return optimizer.clip_gradients(limit)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm
