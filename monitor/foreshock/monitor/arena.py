"""Vectors on a device that keep their place.

Knows sizes, not what they mean.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["Arena"]

_SMALLEST: Final = 2**18


class Arena:
    """Many vectors in few buffers, so that zeroing and copying all of them are few launches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._copied: list[torch.Tensor] = []
        self._free = 0
        self._wanted = 0

    def reserve(self, size: int) -> None:
        """So much more will be taken."""
        self._wanted += size + size % 2

    def prepare(self) -> None:
        """Make what was reserved, once."""
        if not self._buffers and self._wanted:
            self._add(max(_SMALLEST, self._wanted))

    def _add(self, size: int) -> None:
        buffer = torch.zeros(size, dtype=torch.float64, device=self._device)
        self._buffers.append(buffer)
        self._free = len(buffer)

    def take(self, size: int) -> torch.Tensor:
        """Zeros that keep their place."""
        # 16 bytes: Triton has another kernel for addresses that are no multiple of it.
        size_taken = size + size % 2
        if size_taken > self._free:
            self._add(max(_SMALLEST, size_taken))
        start = len(self._buffers[-1]) - self._free
        self._free -= size_taken
        return self._buffers[-1][start : start + size]

    @property
    def bytes(self) -> int:
        """Memory of the buffers and of their last copies."""
        held = [*self._buffers, *self._copied]
        return sum(t.numel() * t.element_size() for t in held)

    def zero(self) -> None:
        """All vectors to zero, queued on the stream."""
        for buffer in self._buffers:
            buffer.zero_()

    def copy(self) -> None:
        """Copy all vectors, queued on the stream."""
        self._copied = [buffer.clone() for buffer in self._buffers]

    def copy_of(self, vector: torch.Tensor) -> torch.Tensor:
        """The copy of one vector."""
        storage = vector.untyped_storage().data_ptr()
        for buffer, copied in zip(self._buffers, self._copied, strict=True):
            if buffer.untyped_storage().data_ptr() == storage:
                start = vector.storage_offset()
                return copied[start : start + len(vector)]
        raise ValueError("the vector is of another arena")
