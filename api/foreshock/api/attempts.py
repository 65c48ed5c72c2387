"""Which attempt each record of a batch belongs to: pure, from the order of steps and sequences.

An attempt is one stretch of training without going back. A launch starts one; a step at or below
the last one, in the order the launch wrote its records, starts the next (an *epoch* of the launch).
Knows no database: the caller finds the neighbours and numbers the epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["StreamPoint", "assign_epochs"]

Steps = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class StreamPoint:
    """What a stored batch tells about its place in a launch's stream.

    Attributes:
        sequence: Its number in the stream.
        first_epoch: Epoch of its first record.
        last_epoch: Epoch of its last record.
        last_step: Step of its last record; -1 for none yet.
    """

    sequence: int
    first_epoch: int
    last_epoch: int
    last_step: int


def assign_epochs(steps: Steps, before: StreamPoint | None, after: StreamPoint | None) -> Steps:
    """Epochs of a batch's records.

    Args:
        steps: (records,) in the order of the batch.
        before: The stored batch with the next lower sequence, if any.
        after: The one with the next higher sequence: set for a late batch, whose records then
            never belong to a later epoch than that one's first.

    Returns:
        (records,) epochs, counted from 0 within the launch.
    """
    start = before.last_epoch if before else 0
    last = before.last_step if before else -1
    previous = np.concatenate([np.array([last], np.int64), steps[:-1]])
    epochs = start + np.cumsum(steps <= previous)
    return epochs if after is None else np.minimum(epochs, max(after.first_epoch, start))
