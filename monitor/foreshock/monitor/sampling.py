"""At which steps tensors are measured, and how much of them. Scalars do not ask here."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

__all__ = ["Cadence", "Sampling"]


@dataclass(frozen=True, slots=True)
class Cadence:
    """Tensor statistics at every n-th optimizer step.

    Attributes:
        tensor_every: n; step 0 is measured.

    Raises:
        ValueError: n is below 1.
    """

    tensor_every: int = 10

    def __post_init__(self) -> None:
        if self.tensor_every < 1:
            raise ValueError(f"tensor_every is {self.tensor_every}; allowed: 1 or more")

    def measures(self, step: int) -> bool:
        """Whether tensors are measured at a step."""
        return step % self.tensor_every == 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """A share of the tensors, and of the token rows of each.

    Every tensor and every row is as likely as any other, anew each time, so counts and sums of the
    sample are unbiased up to the share, and ratios and moments estimate those of the whole. A
    maximum over a sample is at most the maximum.

    Attributes:
        tensors: Probability with which a tensor is measured, above 0, at most 1.
        row_stride: One in so many token rows is read, from a random first one.

    Raises:
        ValueError: A value is not allowed.
    """

    tensors: float = 1.0
    row_stride: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.tensors <= 1:
            raise ValueError(f"tensors is {self.tensors}; allowed: above 0, at most 1")
        if self.row_stride < 1:
            raise ValueError(f"row_stride is {self.row_stride}; allowed: 1 or more")

    def of(self, x: torch.Tensor, generator: random.Random) -> torch.Tensor | None:
        """The rows of a tensor to measure, a view; None to leave it out."""
        if self.tensors < 1 and generator.random() >= self.tensors:
            return None
        if self.row_stride == 1 or x.ndim < 2 or x.shape[-2] < self.row_stride:
            return x
        return x[..., generator.randrange(self.row_stride) :: self.row_stride, :]
