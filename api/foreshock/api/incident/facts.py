"""What an incident file says: plain values, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from foreshock.api.alert_log import Alert
from foreshock.api.diagnosis import Cause
from foreshock.api.registry import Run

__all__ = ["Checkpoint", "Grid", "Incident", "Mark", "WindowData"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Mark:
    """An event of the run."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The last checkpoint before the trouble, and where the data stood then.

    Attributes:
        step: Its step.
        attempt: The attempt that wrote it.
        detail: What the event says of it.
        tokens: Trained on up to it; None if neither recorded nor to be worked out.
        tokens_counted: Whether `tokens` was recorded, else steps times tokens per step.
        data: The last change of data before it, as its event says.
    """

    step: int
    attempt: int
    detail: str
    tokens: float | None
    tokens_counted: bool
    data: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One statistic of one role.

    Attributes:
        role, statistic: Which.
        layers: Names of the rows.
        values: (layers, buckets): the worst finite value, NaN where none.
        nonfinite: How many values were NaN or infinite.
    """

    role: str
    statistic: str
    layers: tuple[str, ...]
    values: FloatArray
    nonfinite: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowData:
    """The records of the window, reduced for drawing.

    Attributes:
        records: How many there are.
        tensor_rows: Rows of tensor statistics in them.
        first, last: Steps of the first and last one.
        width: Steps per bucket of the grids.
        steps: (T,) of every record.
        scalars: Name to (T,), NaN where not measured or not finite.
        nonfinite: Name to the steps where a scalar was NaN or infinite.
        marks: Events, by step.
        grids: One per role and statistic.
    """

    records: int
    tensor_rows: int
    first: int
    last: int
    width: int
    steps: npt.NDArray[np.int64]
    scalars: Mapping[str, FloatArray]
    nonfinite: Mapping[str, tuple[int, ...]]
    marks: tuple[Mark, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Everything around one step of one attempt.

    Attributes:
        run: The run.
        attempt, step: Which step is meant.
        first_step, last_step: The window asked for, ends included.
        alerts: Alerts of the attempt that touch the window, oldest first.
        causes: Diagnosis as of the step, likeliest first.
        risk: `risks.risk_history` of the window.
        checkpoint: The last known-good one; None if none was recorded.
        trouble_since: The earliest sign of trouble.
        versions: Of the service, the model, the client and what they run on.
        made_at: When the file was made.
    """

    run: Run
    attempt: int
    step: int
    first_step: int
    last_step: int
    alerts: tuple[Alert, ...]
    causes: tuple[Cause, ...]
    risk: Mapping[str, Any]
    checkpoint: Checkpoint | None
    trouble_since: int
    versions: Mapping[str, str]
    made_at: datetime
