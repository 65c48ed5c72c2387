"""One packed copy from the device to the host per step, without waiting for it.

Knows names and sizes, not what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Packed", "pack"]

HostArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Packed:
    """Named float64 arrays on their way to the host."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    vector: torch.Tensor | None
    ready: torch.cuda.Event | None

    def arrays(self) -> dict[str, HostArray]:
        """Wait for the copy (in the worker thread) and split it."""
        if self.ready is not None:
            self.ready.synchronize()
        if self.vector is None:
            return {name: np.zeros(0) for name in self.names}
        parts = np.split(self.vector.numpy(), np.cumsum(self.sizes)[:-1])
        return dict(zip(self.names, parts, strict=True))


def pack(groups: Mapping[str, Sequence[torch.Tensor]], device: torch.device) -> Packed:
    """Begin to copy groups of tensors, flattened and as float64.

    From CUDA into pinned memory, so that neither the host nor the stream waits.

    Args:
        groups: Tensors by name of their group.
        device: Where nearly all of them are; others are brought there first.
    """
    parts = [_flat(group, device) for group in groups.values() if group]
    sizes = tuple(sum(tensor.numel() for tensor in group) for group in groups.values())
    if not parts:
        return Packed(tuple(groups), sizes, None, None)
    vector = torch.cat(parts)
    if vector.device.type == "cpu":
        return Packed(tuple(groups), sizes, vector, None)
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    host.copy_(vector, non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record(torch.cuda.current_stream(vector.device))
    return Packed(tuple(groups), sizes, host, ready)


def _flat(group: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    tensors = [t if t.device == device else t.to(device, non_blocking=True) for t in group]
    if len(tensors) == 1:
        return tensors[0].reshape(-1).double()
    shape = tensors[0].shape
    # Both promote mixed types. Stacking scalars costs one operation, flattening them one each.
    if all(tensor.shape == shape for tensor in tensors):
        return torch.stack(tensors).reshape(-1).double()
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double()
