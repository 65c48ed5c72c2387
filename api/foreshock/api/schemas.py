"""Bodies of requests and answers, typed for OpenAPI. Non-finite numbers stand as words.

Holds shapes only; numbers are put through `record.encode_number` by `number` and `numbers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, field_validator

from foreshock.monitor.record import encode_number

__all__ = [
    "NEXT",
    "AttemptBody",
    "BatchReceipt",
    "Health",
    "HeatmapBody",
    "LaunchAnswer",
    "LaunchBody",
    "Number",
    "RunBody",
    "RunDetail",
    "RunList",
    "SeriesBody",
    "TensorsBody",
    "number",
    "numbers",
]

NEXT: Any = Field(None, description="`cursor` of the next page; null on the last one.")

_MOST_CONFIG: Final = 4 * 1024 * 1024

NonFinite = Literal["NaN", "Infinity", "-Infinity"]
Number = float | NonFinite | None
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=512)]


def number(value: float | None) -> Number:
    """A number for an answer."""
    return encode_number(value)  # type: ignore[return-value]


def numbers(values: Iterable[float | None]) -> list[Number]:
    """Numbers for an answer."""
    return [number(value) for value in values]


class _Body(BaseModel):
    model_config = ConfigDict(ser_json_inf_nan="strings")


class LaunchBody(_Body):
    """One start of a training job."""

    project: Name = Field("default", description="Group of runs.")
    run: Name = Field(description="Name of the run, unique within its project.")
    launch_id: UUID = Field(description="Made by the client once per process group.")
    first_step: int = Field(0, ge=0, le=2**62, description="Step the launch starts at.")
    parent_launch: UUID | None = Field(None, description="Launch whose checkpoint it starts from.")
    config: dict[str, JsonValue] | None = Field(
        None, description="Shown to people, never analysed; at most 4 MiB as JSON."
    )
    layers: list[LayerName] = Field([], max_length=65_535, description="Layers in model order.")
    tokens_per_step: int | None = Field(None, gt=0, le=2**62)
    world_size: int | None = Field(None, gt=0, le=2**31 - 1)

    @field_validator("config")
    @classmethod
    def _bounded(cls, config: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        # Every list of runs reads it.
        if config is not None and len(json.dumps(config)) > _MOST_CONFIG:
            raise ValueError(f"it has more than {_MOST_CONFIG} bytes as JSON")
        return config


class LaunchAnswer(_Body):
    """Where the records of a launch will go."""

    run_id: str
    attempt: int = Field(description="Attempt that this launch starts, counted from 1.")


class BatchReceipt(_Body):
    """A batch is durable."""

    duplicate: bool = Field(description="It was durable before this request.")
    attempts: list[int] = Field(description="Attempts that its records belong to.")
    records: int


class AttemptBody(_Body):
    """One stretch of a run without going back."""

    number: int
    launch_id: str
    parent_launch: str | None
    first_step: int
    last_step: int | None
    started_at: datetime
    last_received: datetime | None


class RunBody(_Body):
    """A run at a glance."""

    run_id: str
    project: str
    run: str
    status: Literal["new", "live", "stale", "finished"] = Field(
        description="new = no record yet; stale = silent for far longer than it usually is; "
        "finished = it said that it is over."
    )
    attempts: int = Field(description="How many attempts there are.")
    attempt: int | None = Field(description="The highest attempt that holds records.")
    first_step: int | None
    last_step: int | None = Field(description="Last step of that attempt.")
    created_at: datetime | None = None
    last_received: datetime | None
    clock_skew_seconds: float | None = Field(
        default=None,
        description="How far the run's clock is behind the service's (negative: ahead); late "
        "delivery looks like it. null = not heard of lately.",
    )
    loss: Number = Field(description="Newest loss of that attempt.")
    state: Literal["ok", "pending", "firing", "resolved"] | None = Field(
        description="Alert state; null while the run is not analysed."
    )
    kind: Literal["forecast", "detection"] | None
    risk: dict[str, Number] | None = Field(
        description="Probability of divergence within so many steps; null where unsupported."
    )


class RunDetail(RunBody):
    """A run with all that its page needs."""

    tokens_per_step: int | None
    world_size: int | None
    config: dict[str, JsonValue]
    layers: list[str] = Field(description="In model order.")
    scalars: list[str] = Field(description="Names of the scalars it recorded.")
    roles: list[str] = Field(description="Roles of its tensors.")
    formats: list[str] = Field(description="Formats of its tensors.")
    statistics: list[str] = Field(description="Statistics that may be asked for.")
    history: list[AttemptBody] = Field(description="Its attempts, oldest first.")


class RunList(_Body):
    """A page of runs."""

    runs: list[RunBody]
    next: str | None = NEXT


class SeriesBody(_Body):
    """One series, downsampled into buckets of equal width in steps."""

    step: list[int] = Field(description="First step of each bucket.")
    min: list[Number] = Field(description="Smallest finite value; a word where none is finite.")
    mean: list[Number]
    max: list[Number]
    nonfinite: list[int] = Field(description="Values of the bucket that were NaN or infinite.")


class HeatmapBody(_Body):
    """The worst value of a statistic per layer and bucket of steps."""

    layers: list[str] = Field(description="In model order; of a shared row the first.")
    counts: list[int] = Field(description="How many layers each row stands for.")
    steps: list[int] = Field(description="First step of each bucket.")
    values: list[list[Number]] = Field(description="One row per layer; null = not measured.")
    worst: Literal["min", "max"] = Field(description="Which end of the statistic is the bad one.")


class TensorsBody(_Body):
    """Tensors of one step, worst first."""

    step: int | None = Field(description="When they were measured; null = never.")
    worst: Literal["min", "max"] = Field(description="Which end of the statistic is the bad one.")
    tensors: list[dict[str, str | bool | int | float | None]] = Field(
        description="Identity, sizes and every statistic of each, as in a record."
    )


class Health(_Body):
    """Whether the service works."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok", "reasons": []}]})

    status: Literal["ok", "failing"]
    reasons: list[str]
