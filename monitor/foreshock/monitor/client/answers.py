"""What the service answers, as frozen dataclasses; made from its JSON, unknown members ignored.

null is None (not measured, or the model cannot say); NaN and infinities are floats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from foreshock.monitor.client.diagnosis import Cause
from foreshock.monitor.client.errors import MissingPackage
from foreshock.monitor.record import AlertState, Driver, RiskKind, decode_number

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Alert",
    "Attempt",
    "Heatmap",
    "Launch",
    "Mute",
    "Receipt",
    "RecordedEvent",
    "RiskHistory",
    "RunDetail",
    "RunRisk",
    "RunSummary",
    "ServiceEvent",
    "pandas",
]

FloatArray = npt.NDArray[np.float64]


def pandas() -> Any:
    """The pandas module, which foreshock itself does not require.

    Raises:
        MissingPackage: It is not installed.
    """
    try:
        import pandas as module
    except ImportError:
        raise MissingPackage(
            "frames need pandas: pip install pandas (the *_table methods give Arrow without it)"
        ) from None
    return module


def _time(value: Any) -> datetime | None:
    return None if value is None else datetime.fromisoformat(str(value).replace("Z", "+00:00"))


def _moment(value: Any) -> datetime:
    return datetime.fromisoformat(str(value).replace("Z", "+00:00"))


def _by_horizon(values: Mapping[str, Any] | None) -> dict[int, float | None]:
    return {int(h): decode_number(v, "probability") for h, v in (values or {}).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One stretch of a run without going back; numbered from 1."""

    number: int
    launch_id: str
    parent_launch: str | None
    first_step: int
    last_step: int | None
    started_at: datetime
    last_received: datetime | None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Attempt:
        """From JSON."""
        return cls(
            number=body["number"],
            launch_id=body["launch_id"],
            parent_launch=body.get("parent_launch"),
            first_step=body["first_step"],
            last_step=body.get("last_step"),
            started_at=_moment(body["started_at"]),
            last_received=_time(body.get("last_received")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run at a glance.

    Attributes:
        run_id: Its id, which never changes.
        project, run: Its name.
        status: new, live, stale or finished: whether it is heard of.
        attempts: How many there are.
        attempt: The highest that holds records.
        first_step, last_step: Bounds of what was recorded.
        created_at, last_received: Wall-clock times.
        loss: Newest loss.
        state: ok, pending, firing or resolved; None while the run is not analysed.
        kind: forecast or detection.
        risk: Per horizon, P(the loss starts to diverge within it); None where unsupported.
    """

    run_id: str
    project: str
    run: str
    status: str
    attempts: int
    attempt: int | None
    first_step: int | None
    last_step: int | None
    created_at: datetime | None
    last_received: datetime | None
    loss: float | None
    state: AlertState | None
    kind: RiskKind | None
    risk: Mapping[int, float | None]

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> RunSummary:
        """From JSON."""
        return cls(**_summary(body))


def _summary(body: Mapping[str, Any]) -> dict[str, Any]:
    plain = ("run_id", "project", "run", "status", "attempts", "attempt", "first_step", "last_step")
    return {name: body.get(name) for name in (*plain, "state", "kind")} | {
        "created_at": _time(body.get("created_at")),
        "last_received": _time(body.get("last_received")),
        "loss": decode_number(body.get("loss"), "loss"),
        "risk": _by_horizon(body.get("risk")),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetail(RunSummary):
    """A run with all that is known of it besides its records; layers in model order."""

    tokens_per_step: int | None
    world_size: int | None
    config: Mapping[str, Any]
    layers: tuple[str, ...]
    scalars: tuple[str, ...]
    roles: tuple[str, ...]
    formats: tuple[str, ...]
    statistics: tuple[str, ...]
    history: tuple[Attempt, ...]

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> RunDetail:
        """From JSON."""
        names = ("layers", "scalars", "roles", "formats", "statistics")
        lists: dict[str, Any] = {name: tuple(body.get(name, ())) for name in names}
        return cls(
            **_summary(body),
            tokens_per_step=body.get("tokens_per_step"),
            world_size=body.get("world_size"),
            config=body.get("config") or {},
            history=tuple(Attempt.read(item) for item in body.get("history", ())),
            **lists,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Where the records of a launch go."""

    run_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A batch is durable; `duplicate` says that it was before."""

    duplicate: bool
    attempts: tuple[int, ...]
    records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRisk:
    """The risk after one record.

    Attributes:
        step: The step; None before the first scored record.
        probability: Per horizon; None where the model cannot say.
        reasons: For each None, why.
        band: Per horizon, (low, high).
        expected_lead: Steps until the loss rises, given it does.
        kind: forecast or detection; None if quiet.
        state: The alert's.
        drivers: What moved the forecast, strongest first.
        model_version: Who answered.
        run_id, attempt, time, steps_per_record, hours_at_risk: Of a run; None from `forecast`.
    """

    step: int | None
    probability: Mapping[int, float | None]
    reasons: Mapping[int, str] = field(default_factory=dict)
    band: Mapping[int, tuple[float | None, ...]] = field(default_factory=dict)
    expected_lead: float | None = None
    kind: RiskKind | None = None
    state: AlertState = "ok"
    drivers: tuple[Driver, ...] = ()
    model_version: str = ""
    run_id: str | None = None
    attempt: int | None = None
    time: datetime | None = None
    steps_per_record: int | None = None
    hours_at_risk: float | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> RunRisk:
        """From JSON."""
        plain = ("step", "kind", "run_id", "attempt", "steps_per_record", "hours_at_risk")
        return cls(
            **{name: body.get(name) for name in plain},
            probability=_by_horizon(body["probability"]),
            reasons={int(h): why for h, why in body.get("reasons", {}).items()},
            band={
                int(h): tuple(decode_number(end, "band") for end in ends)
                for h, ends in body.get("band", {}).items()
            },
            expected_lead=decode_number(body.get("expected_lead"), "expected_lead"),
            state=body.get("state", "ok"),
            drivers=tuple(_driver(item) for item in body.get("drivers", ())),
            model_version=body.get("model_version", ""),
            time=_time(body.get("time")),
        )


def _driver(body: Mapping[str, Any]) -> Driver:
    part = decode_number(body["contribution"], "contribution")
    return Driver(body["signal"], float("nan") if part is None else part, body.get("layer"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskHistory:
    """Risks by step.

    Attributes:
        step: (T,) rising.
        probability, low, high: Horizon to (T,), NaN where the model cannot say.
        state, kind: (T,).
    """

    step: npt.NDArray[np.int64]
    probability: Mapping[int, FloatArray]
    low: Mapping[int, FloatArray]
    high: Mapping[int, FloatArray]
    state: tuple[AlertState, ...]
    kind: tuple[RiskKind | None, ...]

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> RiskHistory:
        """From JSON."""
        numbers = {
            part: {int(h): _floats(values) for h, values in body[part].items()}
            for part in ("probability", "low", "high")
        }
        return cls(
            step=np.array(body["step"], dtype=np.int64),
            **numbers,
            state=tuple(body["state"]),
            kind=tuple(body["kind"]),
        )

    def frame(self) -> pd.DataFrame:
        """One row per step: state, kind, and probability_100, low_100, high_100 per horizon."""
        parts = (("probability", self.probability), ("low", self.low), ("high", self.high))
        numbers = {f"{part}_{h}": v for part, by_horizon in parts for h, v in by_horizon.items()}
        columns = {"state": self.state, "kind": self.kind, **numbers}
        made: pd.DataFrame = pandas().DataFrame(
            columns, index=pandas().Index(self.step, name="step")
        )
        return made


def _floats(values: Sequence[Any]) -> FloatArray:
    known = (decode_number(value, "value") for value in values)
    return np.array([np.nan if value is None else value for value in known], dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """The worst value of a statistic per layer and bucket of steps.

    Attributes:
        layers: In model order; where `rows` was asked for, the first layer of each row.
        steps: (S,) first step of each bucket.
        values: (layers, S), NaN where not measured (or where NaN is what was measured).
        worst: min or max: which end of the statistic is the bad one.
    """

    layers: tuple[str, ...]
    steps: npt.NDArray[np.int64]
    values: FloatArray
    worst: str

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Heatmap:
        """From JSON."""
        rows = [_floats(row) for row in body["values"]]
        shape = (len(body["layers"]), len(body["steps"]))
        return cls(
            layers=tuple(body["layers"]),
            steps=np.array(body["steps"], dtype=np.int64),
            values=np.array(rows, dtype=np.float64).reshape(shape),
            worst=body["worst"],
        )

    def frame(self) -> pd.DataFrame:
        """Layers by steps."""
        index = pandas().Index(self.layers, name="layer")
        made: pd.DataFrame = pandas().DataFrame(self.values, index=index, columns=self.steps)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Mute:
    """Who keeps an alert from paging: `acknowledged`, or `snoozed` until then."""

    decision: str
    by: str
    at: datetime
    until: datetime | None
    note: str | None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Mute:
        """From JSON."""
        return cls(
            decision=body["decision"],
            by=body["by"],
            at=_moment(body["at"]),
            until=_time(body.get("until")),
            note=body.get("note"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert: what fired, when, why, and whether people agreed (`correct`, `note`)."""

    id: int
    name: str
    run_id: str
    project: str
    run: str
    attempt: int
    kind: str
    severity: str
    state: str
    step: int
    opened_step: int
    fired_step: int | None
    resolved_step: int | None
    starts_at: datetime
    ends_at: datetime | None
    end_reason: str | None
    summary: str
    probability: Mapping[int, float | None]
    band: Mapping[int, tuple[float, float]]
    expected_lead: float | None
    step_seconds: float | None
    hours_at_risk: float | None
    world_size: int | None
    gpu_hours_at_risk: float | None
    causes: tuple[Cause, ...]
    model_version: str
    labels: Mapping[str, str]
    correct: bool | None
    note: str | None
    mute: Mute | None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Alert:
        """From JSON."""
        mute = body.get("mute")
        converted = {
            "band": {int(h): (edges[0], edges[1]) for h, edges in body.get("band", {}).items()},
            "mute": None if mute is None else Mute.read(mute),
            "starts_at": _moment(body["starts_at"]),
            "ends_at": _time(body.get("ends_at")),
            "probability": _by_horizon(body.get("probability")),
            "expected_lead": decode_number(body.get("expected_lead"), "expected_lead"),
            "causes": tuple(Cause.read(cause) for cause in body.get("causes", ())),
        }
        names = [name for name in cls.__dataclass_fields__ if name not in converted]
        return cls(**{name: body.get(name) for name in names}, **converted)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvent:
    """One event of a run's records; None where it says nothing."""

    step: int
    kind: str
    micro_batch: int | None
    layer: str | None
    role: str | None
    rank: int | None
    detail: str | None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> RecordedEvent:
        """From JSON."""
        return cls(**{name: body.get(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEvent:
    """One event of the stream.

    Attributes:
        id: For `last_event_id`.
        kind: step, risk, alert; or reset: some were missed, `data` says why.
        data: Its members.
    """

    id: str
    kind: str
    data: Mapping[str, Any]
