"""Whose sums a row holds."""

from __future__ import annotations

from dataclasses import dataclass

from foreshock.monitor.placement import WHOLE, Part
from foreshock.monitor.record import TensorIdentity

__all__ = ["Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Whose sums stand in a row.

    Attributes:
        identity: The row in the record.
        micro_batch: 0-based, where the row belongs to one; None where it holds several.
        part: What this process holds of the tensor.
        source: How the row came about, None for statistics of the tensor's values.
        agreed: Whether data-parallel peers must hold the same scale.
    """

    identity: TensorIdentity
    micro_batch: int | None
    part: Part = WHOLE
    source: str | None = None
    agreed: bool = False
