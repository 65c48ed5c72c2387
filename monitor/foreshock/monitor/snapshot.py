"""What the training thread hands to the worker after a step.

Holds no tensor but the packed copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from foreshock.monitor.record import Event, TensorIdentity
from foreshock.monitor.transfer import Packed

__all__ = ["Snapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One step as the training thread hands it over.

    Attributes:
        step: 0-based optimizer step.
        time: When the step ended.
        scalars: What was known on the host.
        names: Names of the values in the packed groups scalars, gradients and parameters.
        observations: Identity and micro-batch of every tensor that passed by, in order.
        measured: Whether the observations are full sums, or one plain sum each.
        channels: Identity and width of the channel sums.
        packed: Groups scalars, losses (one per micro-batch), gradients and parameters (norms),
            observations, channels.
        events: Planned events and the monitor's own.
    """

    step: int
    time: datetime
    scalars: Mapping[str, float]
    names: Mapping[str, tuple[str, ...]]
    observations: tuple[tuple[TensorIdentity, int], ...]
    measured: bool
    channels: tuple[tuple[TensorIdentity, int], ...]
    packed: Packed
    events: tuple[Event, ...]
