"""Scales and largest magnitudes that Transformer Engine keeps itself, one row of a record each.

Where no tensor can be measured, they are what there is: largest magnitude, scale in force and
headroom. Copied on the device when they are in force, many by one operation; what they say is
worked out by the worker (`foreshock.monitor.table.extremes_only`). The host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.autograd import Variable

from foreshock.monitor.entry import Entry
from foreshock.monitor.layers.adapter import HookContext

__all__ = ["History"]

# Forward passes in training mode that no backward pass follows must not pile up.
_MOST_WAITING: Final = 4096


class History:
    """What waits for the end of the backward pass, for all layers of one watch."""

    def __init__(self, context: HookContext) -> None:
        self._context = context
        self._flush = context.hook(self.flush)
        self._entries: list[Entry] = []
        self._copies: list[torch.Tensor] = []
        # Of tensors that stay as they are until the collector's flush.
        self._lasting: list[Entry] = []
        self._held: list[torch.Tensor] = []
        context.collector.on_flush = self.copy_lasting
        self._scheduled = False

    def add(
        self,
        entries: Sequence[Entry],
        amax_and_scale: Sequence[torch.Tensor],
        *,
        lasting: bool = False,
    ) -> None:
        """Copy what is in force now.

        Args:
            entries: One per tensor.
            amax_and_scale: Of each tensor in turn; one element each, on the device.
            lasting: Whether they stay as they are until the collector's flush.
        """
        if torch._C._current_graph_task_id() == -1:
            self._scheduled = False
        if len(self._entries) + len(self._lasting) >= _MOST_WAITING:
            return
        if lasting:
            self._lasting += entries
            self._held += amax_and_scale
        else:
            self._entries += entries
            self._copies.append(torch.cat(list(amax_and_scale)))

    def copy_lasting(self) -> None:
        """Copy what is about to change."""
        if self._lasting:
            self._entries += self._lasting
            self._copies.append(torch.cat(self._held))
            self._lasting, self._held = [], []

    def schedule(self) -> None:
        """Hand over what there is once the backward pass that is running has ended."""
        if not self._scheduled:
            self._scheduled = True
            engine = Variable._execution_engine
            engine.queue_callback(self._flush)

    def flush(self) -> None:
        """Hand over what there is to the collector."""
        self.copy_lasting()
        self._scheduled = False
        if self._entries:
            entries, copies = self._entries, self._copies
            self._entries, self._copies = [], []
            self._context.collector.observe_history(
                entries, copies[0] if len(copies) == 1 else torch.cat(copies)
            )
