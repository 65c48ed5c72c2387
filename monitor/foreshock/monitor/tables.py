"""Tables of numbers that the host fills and a kernel reads, copied without a wait."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

__all__ = ["Tables"]

_TABLES: Final = 64


class Tables:
    """Places for tables of 64-bit numbers on both sides, taken in turn.

    The device may be behind the host, which must not write what is still to be copied.

    Args:
        device: Where the tables go.
        rows, fields: Of each.
    """

    def __init__(self, device: torch.device, rows: int, fields: int) -> None:
        self._device = device
        shape = (_TABLES, rows, fields)
        on_cuda = device.type == "cuda"
        self._host = torch.empty(shape, dtype=torch.int64, pin_memory=on_cuda)
        self._there = torch.empty(shape, dtype=torch.int64, device=device)
        self._pairs = list(zip(self._host.unbind(0), self._there.unbind(0), strict=True))
        self._arrays = [host.numpy() for host, _ in self._pairs]
        self._addresses = [there.data_ptr() for _, there in self._pairs]
        self._next = 0
        # Recorded half a round ago.
        self._half: torch.cuda.Event | None = None

    def take(self) -> int | None:
        """The number of a place; None if the device is half a round behind."""
        at = self._next
        if self._device.type == "cuda" and at % (_TABLES // 2) == 0:
            if self._half is not None and not self._half.query():  # type: ignore[no-untyped-call]
                return None
            self._half = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._half.record()
        self._next = (at + 1) % _TABLES
        return at

    def array(self, at: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """To be filled."""
        return self._arrays[at]

    def copy(self, at: int) -> tuple[torch.Tensor, int]:
        """Queue its copy; the table on the device and its address."""
        host, there = self._pairs[at]
        there.copy_(host, non_blocking=True)
        return there, self._addresses[at]

    @property
    def bytes(self) -> int:
        """Memory on the device."""
        return self._there.numel() * 8
