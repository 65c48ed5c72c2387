"""A model and its optimizer at one of FP8-LM's levels."""

from __future__ import annotations

import torch
from torch import nn

from foreshock.trainer.fp8lm.optimizer import Fp8AdamW
from foreshock.trainer.fp8lm.weights import scale_weights
from foreshock.trainer.states_config import CommunicationConfig, StatesConfig

__all__ = ["fp8_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: tensors of two and more dimensions decay, gains and scalars do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def fp8_optimizer(
    model: nn.Module,
    states: StatesConfig,
    communication: CommunicationConfig | None = None,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    group: torch.distributed.ProcessGroup | None = None,
) -> Fp8AdamW:
    """Put the model's matrices into the level's weight format, in place, and make their optimizer.

    Do so before the model is wrapped or watched. All processes of the group must hold the same
    model.

    Args:
        model: Its parameters are replaced.
        states: Level O1, O2 or O3, and formats.
        communication: How gradients are reduced.
        lr: Learning rate; AdamW's, like the next three.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Of matrices; gains and biases do not decay.
        group: Data-parallel processes; None takes the default group, or none.

    Raises:
        ValueError: As `Fp8AdamW`, or the master's format is not one that a weight can be kept in.
    """
    fp_format = "e4m3" if states.level == "O3" else states.master_format
    block = states.block if states.level == "O3" else 0
    before = {} if states.level == "O0" else scale_weights(model, fp_format, block=block)
    optimizer = Fp8AdamW(
        parameter_groups(model, weight_decay),
        lr,
        betas,
        eps,
        weight_decay,
        states=states,
        communication=communication,
        group=group,
    )
    named = model.named_parameters()
    optimizer.set_masters({p: before[name] for name, p in named if name in before})
    return optimizer
