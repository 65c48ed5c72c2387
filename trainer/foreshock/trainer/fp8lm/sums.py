"""How FP8 gradients add up, without any process group: what reductions and simulations share.

Codes are E4M3 with one common scale per tensor; sums are codes under the same scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from foreshock.monitor.formats import FORMATS
from foreshock.trainer.fp8lm.scaled import cast

__all__ = ["add_codes", "cut", "running_sum", "saturating_add"]

_LARGEST: Final = FORMATS["e4m3"].largest


def saturating_add(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One addition of a running FP8 sum: exact in float32, rounded, saturated at 448; NaN stays.

    Returns:
        E4M3 codes, and which sums were larger than 448 before they were rounded, bool.
    """
    exact = a.float() + b.float()
    return cast(exact, "e4m3"), exact.abs() > _LARGEST


def running_sum(codes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of E4M3 codes that is E4M3 after every addition, in order, as a ring makes it.

    Returns:
        E4M3 codes, and where any addition saturated, bool; both of the tensors' shape.
    """
    total = codes[0]
    over = torch.zeros(total.shape, dtype=torch.bool, device=total.device)
    for other in codes[1:]:
        total, larger = saturating_add(total, other)
        over |= larger
    return total, over


def add_codes(codes: Sequence[Tensor], scale_inv: Sequence[Tensor]) -> Tensor:
    """float32 sum of codes x scale_inv, added in the order given: the same on every process."""
    total = codes[0].float() * scale_inv[0]
    for each, inverse in zip(codes[1:], scale_inv[1:], strict=True):
        total = total + each.float() * inverse
    return total


def cut(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Consecutive parts of a flat tensor, views of these sizes."""
    parts: tuple[Tensor, ...] = flat.split(list(sizes)) if sizes else ()  # type: ignore[no-untyped-call]
    return parts
