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
        detail_every: On a device, the least distance from one measured step at which the casts'
            errors and the channels are taken too to the next.

    Raises:
        ValueError: One of them is below 1.
    """

    tensor_every: int = 10
    detail_every: int = 10

    def __post_init__(self) -> None:
        for name in ("tensor_every", "detail_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers, 1 or more")

    def measures(self, step: int) -> bool:
        """Whether tensors are measured at a step."""
        return step % self.tensor_every == 0

    def details(self, step: int) -> bool:
        """Whether a step is measured in detail: every so many measured steps."""
        return step % (self.tensor_every * -(-self.detail_every // self.tensor_every)) == 0


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

    @property
    def whole(self) -> bool:
        """Whether every tensor is measured in full."""
        return self.row_stride == 1 and self.tensors == 1

    def of(self, x: torch.Tensor, generator: random.Random) -> torch.Tensor | None:
        """The rows of a tensor to measure, a view; None to leave it out."""
        if self.tensors < 1 and generator.random() >= self.tensors:
            return None
        if self.row_stride == 1 or x.ndim < 2 or x.shape[-2] < self.row_stride:
            return x
        return x[..., generator.randrange(self.row_stride) :: self.row_stride, :]
