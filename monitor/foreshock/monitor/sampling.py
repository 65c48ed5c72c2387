"""At which steps tensors are measured. Scalars are measured at every step and do not ask here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cadence"]


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
