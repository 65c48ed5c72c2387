"""Sums of many small tensors at a time.

Measuring a small tensor costs dozens of operations that each do next to nothing. Tensors of one
shape are copied side by side as they pass by and measured as one stack; large ones are measured at
once. Holds no reference to a tensor of the training and changes no definition.
"""

from __future__ import annotations

from typing import Final

import torch

from foreshock.monitor.operands import Operand
from foreshock.monitor.statistics import packed_sums, scaled_per_tensor

__all__ = ["BatchedSums", "Sums"]

Sums = tuple[torch.Tensor, torch.Tensor]
"""Packed sums, shape (fields,), and channel sums, shape (features,)."""

_LARGEST_IN_STACK: Final = 2**18
_STACK_ELEMENTS: Final = 2**20
_STACK_TENSORS: Final = 32


class _Stack:
    """Tensors of one shape waiting to be measured."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        slots = max(1, min(_STACK_TENSORS, _STACK_ELEMENTS // max(shape.numel(), 1)))
        self.values = torch.empty(slots, *shape, device=device, dtype=torch.float32)
        self.tickets: list[int] = []
        self.scales: list[torch.Tensor] = []

    @property
    def full(self) -> bool:
        return len(self.tickets) == len(self.values)


class BatchedSums:
    """Collects tensors and gives their sums back in the order in which they came."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[torch.Size, torch.device, str, bool], _Stack] = {}
        self._results: list[Sums | None] = []

    @property
    def bytes(self) -> int:
        """Memory of the stacks that wait."""
        return sum(s.values.numel() * s.values.element_size() for s in self._stacks.values())

    def add(self, x: torch.Tensor, operand: Operand) -> None:
        """Take a tensor; its value now is what counts.

        Raises:
            ValueError: As `packed_sums`.
        """
        scaled_per_tensor(operand.format)
        if x.dtype == torch.float64 or x.numel() > _LARGEST_IN_STACK or not x.is_floating_point():
            sums = packed_sums(x, format=operand.format, scale=operand.scale)
            self._results.append(sums)
            return
        # Stacks live for one step: shapes may change, and idle memory is the training's.
        key = (x.shape, x.device, operand.format, operand.scale is None)
        stack = self._stacks.get(key)
        if stack is None:
            stack = self._stacks[key] = _Stack(x.shape, x.device)
        stack.values[len(stack.tickets)].copy_(x.detach())
        if operand.scale is not None:
            stack.scales.append(operand.scale.detach().reshape(()).float())
        stack.tickets.append(len(self._results))
        self._results.append(None)
        if stack.full:
            self._measure(operand.format, self._stacks.pop(key))

    def take(self) -> list[Sums]:
        """Measure what is left; the sums of every tensor since the last call."""
        try:
            for (_, _, format, _), stack in self._stacks.items():
                self._measure(format, stack)
            return [sums for sums in self._results if sums is not None]
        finally:
            self._results, self._stacks = [], {}

    def _measure(self, format: str, stack: _Stack) -> None:
        count = len(stack.tickets)
        scale = torch.stack(stack.scales) if stack.scales else None
        packed, channels = packed_sums(stack.values[:count], format=format, scale=scale, lead=1)
        pairs = zip(stack.tickets, packed.unbind(1), channels.unbind(0), strict=True)
        for ticket, sums, of_channels in pairs:
            self._results[ticket] = (sums, of_channels)
