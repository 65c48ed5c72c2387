"""One AdamW update on float32 tensors: pure, with step counts on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Hyper", "updated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """Settings of a parameter group; lr may be a 0-dim tensor.

    Raises:
        ValueError: One is out of its range.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        checks = {
            "lr": isinstance(self.lr, Tensor) or self.lr >= 0,
            "beta1": 0 <= self.beta1 < 1,
            "beta2": 0 <= self.beta2 < 1,
            "eps": self.eps >= 0,
            "weight_decay": self.weight_decay >= 0,
        }
        for name, good in checks.items():
            if not good:
                allowed = "[0, 1)" if name.startswith("beta") else "0 or more"
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {allowed}")

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Self:
        """From a torch parameter group."""
        beta1, beta2 = group["betas"]
        return cls(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )


def updated(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    hyper: Hyper,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after a step (Loshchilov and Hutter, "Decoupled Weight Decay", alg. 2).

    In torch's order: decay first, eps added to sqrt(v) / sqrt(1 - beta2^t).

    Args:
        weight: float32, any shape; the next three are alike.
        gradient: g.
        exp_avg: m.
        exp_avg_sq: v.
        step: t, 1 in the first step, 0-dim.
        hyper: Settings.

    Returns:
        New tensors.
    """
    first = 1 - hyper.beta1 ** step.double()
    second = 1 - hyper.beta2 ** step.double()
    exp_avg = torch.lerp(exp_avg, gradient, 1 - hyper.beta1)
    exp_avg_sq = (exp_avg_sq * hyper.beta2).addcmul_(gradient, gradient, value=1 - hyper.beta2)
    denominator = (exp_avg_sq.sqrt() / second.sqrt().float()).add_(hyper.eps)
    weight = weight * (1 - hyper.lr * hyper.weight_decay)
    rate = (hyper.lr / first).float()
    return weight.sub_((exp_avg / denominator).mul_(rate)), exp_avg, exp_avg_sq
