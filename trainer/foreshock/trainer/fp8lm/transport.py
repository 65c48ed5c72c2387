"""Collectives on codes and scales, with the bytes that they put on the wire.

Codes travel as uint8, which every backend moves; only `sum_codes` asks a backend to add FP8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from foreshock.trainer.fp8lm.sums import running_sum

__all__ = ["Transport"]

_NATIVE_NCCL: Final = (2, 24)
_NATIVE_CAPABILITY: Final = (9, 0)


class Transport:
    """Collectives over one process group; alone, everything is the identity.

    Args:
        group: None takes the default group, or a single process where there is none.

    Attributes:
        ranks, rank: Of the group.
        bytes_sent: What this process has sent, by the volume of ring and pairwise algorithms:
            2 (N-1)/N of the payload for a sum, (N-1) of a process's own part for a gather.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        here = dist.is_available() and dist.is_initialized()
        self.group = group
        self.ranks = dist.get_world_size(group) if here else 1
        self.rank = dist.get_rank(group) if here else 0
        self.bytes_sent = 0

    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise maximum over the processes, in place."""
        if self.ranks > 1:
            self._count_sum(values)
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, in place."""
        if self.ranks > 1:
            self._count_sum(values)
            dist.all_reduce(values, dist.ReduceOp.SUM, self.group)
        return values

    def sum_codes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Running FP8 sum of every process's E4M3 codes, the same on all of them.

        NCCL from 2.24 on, on devices of compute capability 9.0 and above, adds FP8 itself; it says
        nothing of what saturated. Elsewhere pieces go to one process each, are added in rank order
        and gathered: the volume of a ring's sum.

        Args:
            codes: Flat float8_e4m3fn.

        Returns:
            E4M3 codes, and which elements saturated, bool; with NCCL's own sum, which have the
            largest code.
        """
        if self.ranks == 1:
            return codes, torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
        if self._adds_fp8(codes):
            self._count_sum(codes)
            dist.all_reduce(codes, dist.ReduceOp.SUM, self.group)
            return codes, (codes.view(torch.uint8) & 0x7F) == 0x7E
        size = codes.numel()
        padded = torch.nn.functional.pad(codes.view(torch.uint8), (0, -size % self.ranks))
        mine = self.exchange(padded, [padded.numel() // self.ranks] * self.ranks)
        total, over = running_sum([piece.view(torch.float8_e4m3fn) for piece in mine])
        # A NaN's sign bit is free in E4M3 sums; saturation goes along as a bitmap of its own.
        summed = self.gather(total.view(torch.uint8))
        flags = self.gather(_packed_bits(over))
        return (
            torch.cat(summed)[:size].view(torch.float8_e4m3fn),
            torch.cat([_unpacked_bits(each, total.numel()) for each in flags])[:size],
        )

    def exchange(self, flat: Tensor, splits: Sequence[int]) -> list[Tensor]:
        """Send the r-th split to process r.

        Returns:
            What each process sent to this one, in rank order; all of splits[rank] elements.
        """
        if self.ranks == 1:
            return [flat]
        own = splits[self.rank]
        received = flat.new_empty(own * self.ranks)
        dist.all_to_all_single(received, flat, [own] * self.ranks, list(splits), group=self.group)
        self.bytes_sent += (flat.numel() - own) * flat.element_size()
        return list(received.view(self.ranks, own).unbind(0))

    def gather(self, flat: Tensor, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """Every process's tensor, in rank order.

        Args:
            flat: This process's part.
            sizes: Elements of each process's part; None where they are alike.
        """
        if self.ranks == 1:
            return [flat]
        lengths = [flat.numel()] * self.ranks if sizes is None else list(sizes)
        longest = max(lengths)
        padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        parts = [flat.new_empty(longest) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        self.bytes_sent += (self.ranks - 1) * longest * flat.element_size()
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def _count_sum(self, values: Tensor) -> None:
        payload = values.numel() * values.element_size()
        self.bytes_sent += 2 * (self.ranks - 1) * payload // self.ranks

    def _adds_fp8(self, codes: Tensor) -> bool:
        if not codes.is_cuda or dist.get_backend(self.group) != "nccl":
            return False
        capable = torch.cuda.get_device_capability(codes.device) >= _NATIVE_CAPABILITY
        return capable and torch.cuda.nccl.version() >= _NATIVE_NCCL  # type: ignore[no-untyped-call]


def _packed_bits(flags: Tensor) -> Tensor:
    """Eight bools a byte, the first in the lowest bit."""
    eights = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=flags.device)
    return (eights * weights).sum(1, dtype=torch.uint8)


def _unpacked_bits(packed: Tensor, size: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).bool().view(-1)[:size]
