"""AdamW with weight decay where it belongs, and clipping that tells the norm before it.

In float32 the update is torch's own; from FP8-LM's level O1 on it is `fp8lm.Fp8AdamW`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from foreshock.trainer.config import CommunicationConfig, OptimizerConfig, StatesConfig
from foreshock.trainer.fp8lm import Fp8AdamW, fp8_optimizer
from foreshock.trainer.master_adamw import MasterAdamW

__all__ = ["clip_gradients", "make_optimizer", "set_learning_rate"]


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    states: StatesConfig | None = None,
    communication: CommunicationConfig | None = None,
) -> torch.optim.AdamW | MasterAdamW | Fp8AdamW:
    """AdamW in two groups: tensors of two and more dimensions decay, gains and scalars do not.

    Args:
        model: From level O1 on its matrices are replaced by their codes; so this comes before any
            wrapper or watch.
        config: Settings.
        states: Formats; None is level O0 with float32 parameters, torch's AdamW.
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
    if states is not None and states.parameters == "bfloat16":
        betas = (config.beta1, config.beta2)
        given = [group for group in groups if group["params"]]
        return MasterAdamW(given, config.learning_rate, betas, config.eps, config.weight_decay)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if all(p.is_cuda for p in parameters) else None,
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
    if any(isinstance(g, DTensor) for g in gradients):
        norm = _norm_over_processes(gradients)
        if limit is not None:
            _scale_down(gradients, limit, norm)
        return norm
    # Of bfloat16 gradients the norm would be bfloat16 too.
    wide = [g.float() if g.dtype == torch.bfloat16 else g for g in gradients]
    norm = nn.utils.get_total_norm(wide)
    if limit is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def _norm_over_processes(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Global norm where some gradients are cut over processes, each perhaps in its own way."""
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    parts = [_own_share(g) for g in gradients if isinstance(g, DTensor)]
    total = torch.stack(parts).sum()
    dist.all_reduce(total)
    if plain:
        total = total + nn.utils.get_total_norm(plain).square()
    return total.sqrt()


def _own_share(gradient: DTensor) -> torch.Tensor:
    """Sum of squares of this process's piece, divided by the processes that hold the same piece."""
    mesh = gradient.device_mesh
    cuts = [mesh.size(axis) for axis, place in enumerate(gradient.placements) if place.is_shard()]
    replicas = dist.get_world_size() / math.prod(cuts)
    return gradient.to_local().square().sum() / replicas


def _scale_down(gradients: Sequence[torch.Tensor], limit: float, norm: torch.Tensor) -> None:
    # As clip_grads_with_norm_, on the pieces that this process holds.
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(local, factor)
