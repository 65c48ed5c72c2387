"""What rank 0 decided, on all ranks; nothing to do in a job of one process."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any, Final, Self, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Agreement"]

T = TypeVar("T")
_PATIENCE: Final = timedelta(minutes=30)


class Agreement:
    """Sends decisions from rank 0 over a group of its own (gloo).

    One message of eight bytes per step, and a second one at the rare step that has a decision.
    """

    def __init__(self, group: Any | None) -> None:
        self._group = group
        self.decides = group is None or dist.get_rank() == 0

    @classmethod
    def join(cls) -> Self:
        """Meet the other processes, which must all make one; alone, meet nobody."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls(None)
        return cls(dist.new_group(backend="gloo", timeout=_PATIENCE))

    def all(self, value: bool) -> bool:
        """Whether it is true in every process."""
        if self._group is None:
            return value
        least = torch.tensor([int(value)])
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        return bool(least)

    def share(self, value: T) -> T:
        """The value of rank 0; those of the others are ignored."""
        if self._group is None:
            return value
        body = pickle.dumps(value) if self.decides and value else b""
        size = torch.tensor([len(body)])
        dist.broadcast(size, src=0, group=self._group)
        if not int(size):
            return value
        sent = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else None
        received = sent if sent is not None else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(received, src=0, group=self._group)
        found: T = pickle.loads(received.numpy().tobytes())  # noqa: S301 - from rank 0 of this job
        return found
