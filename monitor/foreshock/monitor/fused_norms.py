"""L2 norms of many tensors on a CUDA device by one launch for each type.

`torch._foreach_norm` gives a tensor for each norm, and the host makes them one after the other;
here they all lie in one. Tensors that lie where they lay at the last call need no new table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from foreshock.monitor.launches import start
from foreshock.monitor.tables import Tables
from foreshock.monitor.triton_norms import FIELDS, norms_kernel

__all__ = ["FusedNorms"]

_KINDS: Final = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
_TILE, _TILES = 4096, 16
_ADDRESS: Final = 2


@dataclass(slots=True)
class _Group:
    """Tensors of one type: of which rows of the table, how many programs, with what constants."""

    first: int
    members: int
    programs: int
    constants: dict[str, Any]
    compiled: Any = None


class FusedNorms:
    """Norms of tensors that come again and again.

    Args:
        device: A CUDA device; a CPU where Triton interprets.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._current_stream: Callable[[int], int] = (
            torch._C._cuda_getCurrentRawStream if self._on_cuda else _no_stream
        )
        self._shapes: list[tuple[torch.dtype, torch.Size]] = []
        self._addresses: list[int] = []
        self._groups: list[_Group] = []
        self._entries = np.zeros((0, FIELDS), dtype=np.int64)
        self._order = np.zeros(0, dtype=np.int64)
        self._tables: Tables | None = None
        self._table = (torch.empty(0), 0)
        self._partials = self._counter = torch.empty(0)

    def norms(self, tensors: list[torch.Tensor]) -> torch.Tensor | None:
        """Their norms, float64 of shape (tensors,), on the device; sums of squares in float32.

        Returns:
            None for tensors of other types than bf16, fp16 and fp32, without elements, not
            contiguous, or not at addresses that are multiples of 16; and while a graph is captured.
        """
        capturing = self._on_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or not all(x.is_contiguous() for x in tensors):
            return None
        shapes = [(x.dtype, x.shape) for x in tensors]
        addresses = [x.data_ptr() for x in tensors]
        if shapes != self._shapes and not self._lay_out(tensors, shapes):
            return None
        if addresses != self._addresses:
            if any(address % 16 for address in addresses):
                return None
            self._fill(addresses)
        return self._launch(len(tensors))

    def _lay_out(
        self, tensors: list[torch.Tensor], shapes: list[tuple[torch.dtype, torch.Size]]
    ) -> bool:
        """Work out the tables but for addresses; False where it cannot be done."""
        if any(x.dtype not in _KINDS or not x.numel() for x in tensors):
            return False
        self._shapes, self._addresses = shapes, []
        kinds = [(x.dtype, x.numel() % 16 == 0) for x in tensors]
        self._order = np.array(sorted(range(len(kinds)), key=lambda i: str(kinds[i])))
        entries = np.zeros((len(kinds), FIELDS), dtype=np.int64)
        elements = np.array([x.numel() for x in tensors])[self._order]
        entries[:, 1] = -(-elements // (_TILE * _TILES))
        entries[:, 3] = elements
        entries[:, 4] = self._order
        self._groups = []
        for kind in sorted(set(kinds), key=str):
            own = np.array([i for i, at in enumerate(self._order) if kinds[at] == kind])
            ends = np.cumsum(entries[own, 1])
            entries[own, 0] = ends - entries[own, 1]
            constants = {
                "KIND": _KINDS[kind[0]],
                "ALIGNED": kind[1],
                "TILE": _TILE,
                "TILES": _TILES,
                "FIELDS": FIELDS,
                "MEMBERS": max(triton.next_power_of_2(len(own)), 64),
            }
            self._groups.append(_Group(int(own[0]), len(own), int(ends[-1]), constants))
        self._entries = entries
        programs = max(group.programs for group in self._groups)
        self._partials = torch.empty(programs, dtype=torch.float64, device=self._device)
        self._counter = torch.zeros(len(kinds), dtype=torch.int32, device=self._device)
        self._tables = Tables(self._device, len(kinds), FIELDS)
        return True

    def _fill(self, addresses: list[int]) -> None:
        assert self._tables is not None
        place = self._tables.take()
        if place is None:
            # Rather new memory than to wait for the device.
            self._tables = Tables(self._device, len(addresses), FIELDS)
            place = self._tables.take()
            assert place is not None
        table = self._tables.array(place)
        table[:] = self._entries
        table[:, _ADDRESS] = np.array(addresses)[self._order]
        self._table = self._tables.copy(place)
        self._addresses = addresses

    def _launch(self, count: int) -> torch.Tensor:
        norms = torch.empty(count, dtype=torch.float64, device=self._device)
        there, address = self._table
        for group in self._groups:
            grid = (group.programs, 1, 1)
            if group.compiled is None:
                group.compiled = norms_kernel[grid](
                    there[group.first :],
                    self._partials,
                    self._counter,
                    norms,
                    group.members,
                    **group.constants,
                    num_warps=8,
                )
                continue
            start(
                group.compiled,
                grid,
                self._current_stream(self._device.index or 0),
                (
                    address + group.first * FIELDS * 8,
                    self._partials.data_ptr(),
                    self._counter.data_ptr(),
                    norms.data_ptr(),
                ),
                (group.members, *group.constants.values()),
            )
        return norms


def _no_stream(device: int) -> int:
    """On a CPU there is one order of things."""
    return 0
