"""The automatic factor of FP8 gradient sums: halved when sums saturate, else slowly grown.

FP8-LM section 2.1, equations 3 to 6. Works on a vector with one number per tensor and waits for no
device. Every process sees the same sums, hence has the same factors without talking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foreshock.trainer.states_config import CommunicationConfig

__all__ = ["GradientFactor"]


class GradientFactor:
    """mu of each tensor.

    In small tensors one code is a larger share than the threshold, and a code of the largest value
    may be an honest one (magnitudes of 432 to 448 round to it): at least two must have it.

    Args:
        sizes: Elements of each tensor.
        ranks: N; mu starts at 1/sqrt(N), lies within [2^-24 / N, 1].
        config: Threshold and growth.
        device: Of the tensors.

    Attributes:
        value: float32, one per tensor.
        halvings: How often each was halved, int64.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        ranks: int,
        config: CommunicationConfig,
        device: torch.device | None = None,
    ) -> None:
        start = {"pre": 1 / ranks, "post": 1.0, "auto": 1 / math.sqrt(ranks)}[config.scaling]
        self._automatic = config.scaling == "auto"
        self._power_of_two = config.mu_power_of_two
        self._growth = 2 ** (1 / config.mu_doubling_steps)
        self._smallest = 2.0**-24 / ranks
        self.value = torch.full((len(sizes),), start, device=device)
        self.halvings = torch.zeros(len(sizes), dtype=torch.int64, device=device)
        limits = [max(config.mu_threshold * size, 1.0) for size in sizes]
        self._limit = torch.tensor(limits, device=device)

    def in_force(self) -> Tensor:
        """What this step's gradients are multiplied by."""
        if not (self._automatic and self._power_of_two):
            return self.value.clone()
        mantissa, _ = torch.frexp(self.value)
        return self.value / (2 * mantissa)

    def update(self, at_largest: Tensor, counts: Tensor | None = None) -> None:
        """Learn from a sum.

        Args:
            at_largest: Elements of each tensor whose sum has the largest code.
            counts: Whether the step counts, 0-dim bool: one with NaN says nothing about mu.
        """
        if not self._automatic:
            return
        halve = at_largest.to(self._limit.dtype) > self._limit
        value = torch.where(halve, self.value / 2, self.value * self._growth)
        value = value.clamp(self._smallest, 1.0)
        if counts is not None:
            value = torch.where(counts, value, self.value)
            halve = halve & counts
        self.value.copy_(value)
        self.halvings.add_(halve)

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"value": self.value, "halvings": self.halvings}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.value.copy_(state["value"])
        self.halvings.copy_(state["halvings"])
