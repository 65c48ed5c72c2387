"""Scales and largest magnitudes that Transformer Engine keeps itself, as rows of sums.

Where no tensor can be measured, they are what there is: largest magnitude, scale in force and
headroom. Copied on the device when they are in force, one operation a layer; made into rows for
all layers at once at the end of the backward pass. The host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.autograd import Variable

from foreshock.monitor.formats import format_named
from foreshock.monitor.layers.adapter import HookContext
from foreshock.monitor.record import FIELD_REDUCTIONS, TensorIdentity

__all__ = ["History", "history_rows"]

_FIELDS: Final = tuple(FIELD_REDUCTIONS)
_NEUTRAL: Final = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}
# Forward passes in training mode that no backward pass follows must not pile up.
_MOST_WAITING: Final = 4096


def history_rows(kept: torch.Tensor, largest: torch.Tensor, neutral: torch.Tensor) -> torch.Tensor:
    """Rows of sums of tensors of which only extremes are known.

    Args:
        kept: Largest magnitude and scale in force, shape (tensors, 2).
        largest: M of each tensor's format, shape (tensors,).
        neutral: The row of a tensor without elements, seen once; shape (fields,).
    """
    amax, scale = kept.double().unbind(1)
    scale_log2 = scale.log2()
    rows = neutral.repeat(len(amax), 1)
    rows[:, _FIELDS.index("amax")] = amax
    rows[:, _FIELDS.index("scale_log2")] = scale_log2
    rows[:, _FIELDS.index("scale_log2_max")] = scale_log2
    rows[:, _FIELDS.index("headroom_log2")] = (largest / (amax * scale)).log2()
    return rows


class History:
    """What waits to become rows, for all layers of one watch."""

    def __init__(self, context: HookContext) -> None:
        self._context = context
        self._flush = context.hook(self.flush)
        self._waiting: list[tuple[Sequence[TensorIdentity], torch.Tensor]] = []
        # Identities and values that stay as they are until the collector's flush.
        self._lasting: tuple[list[TensorIdentity], list[torch.Tensor]] = ([], [])
        context.collector.on_flush = self.copy_lasting
        self._count = 0
        self._scheduled = False
        self._constants: tuple[tuple[str, ...], torch.Tensor, torch.Tensor] | None = None

    def add(
        self,
        identities: Sequence[TensorIdentity],
        amax_and_scale: list[torch.Tensor],
        *,
        lasting: bool = False,
    ) -> None:
        """Copy what is in force now.

        Args:
            identities: One per tensor.
            amax_and_scale: Of each tensor in turn; 0-dim, on the device.
            lasting: Whether they stay as they are until the collector's flush.
        """
        if torch._C._current_graph_task_id() == -1:
            self._scheduled = False
        if self._count >= _MOST_WAITING:
            return
        self._count += len(identities)
        if lasting:
            self._lasting[0].extend(identities)
            self._lasting[1].extend(amax_and_scale)
        else:
            self._waiting.append((identities, torch.stack(amax_and_scale)))

    def copy_lasting(self) -> None:
        """Copy what is about to change."""
        identities, values = self._lasting
        if identities:
            self._waiting.append((identities, torch.stack(values)))
            self._lasting = ([], [])

    def schedule(self) -> None:
        """Make the rows once the backward pass that is running has ended."""
        if not self._scheduled:
            self._scheduled = True
            engine = Variable._execution_engine
            engine.queue_callback(self._flush)

    def flush(self) -> None:
        """Hand the rows to the collector."""
        self.copy_lasting()
        waiting, self._waiting = self._waiting, []
        self._count, self._scheduled = 0, False
        if not waiting:
            return
        identities = [identity for group, _ in waiting for identity in group]
        kept = torch.cat([values for _, values in waiting]).view(-1, 2)
        formats = tuple(identity.format for identity in identities)
        rows = history_rows(kept, *self._of_formats(formats, kept.device))
        for identity, row in zip(identities, rows.unbind(0), strict=True):
            self._context.collector.observe_row(identity, row, source="history")

    def _of_formats(
        self, formats: tuple[str, ...], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Copied to the device once; a run's set of tensors rarely changes.
        if self._constants is None or self._constants[0] != formats:
            largest = [format_named(format).largest for format in formats]
            neutral = [_NEUTRAL[how] for how in FIELD_REDUCTIONS.values()]
            neutral[_FIELDS.index("observations")] = 1.0
            self._constants = (
                formats,
                torch.tensor(largest, dtype=torch.float64, device=device),
                torch.tensor(neutral, dtype=torch.float64, device=device),
            )
        return self._constants[1:]
