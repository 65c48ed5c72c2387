"""What happens at which step of the real run; apart from it, for it loads torch."""

from __future__ import annotations

from typing import Final

__all__ = ["CHECKPOINTS", "DROPPED", "LAST", "NAME", "PAUSES", "TENSOR_EVERY"]

NAME: Final = "runaway"
LAST: Final = 109
PAUSES: Final = (38, 108)
CHECKPOINTS: Final = (20, 90)
DROPPED: Final = 106
TENSOR_EVERY: Final = 8
