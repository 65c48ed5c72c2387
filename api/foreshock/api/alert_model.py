"""What an alert is: its kinds, names, states and content, and how a row of the log holds it.

Knows no database connection; decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from foreshock.monitor.record import HORIZONS, decode_number, encode_number

__all__ = [
    "ALERT_NAMES",
    "OF_RISK",
    "OUTRANKS",
    "SEVERITIES",
    "Alert",
    "AlertContent",
    "AlertKind",
    "AlertSubject",
    "LoggedState",
    "Stakes",
    "Transition",
    "alert_of",
    "dump_content",
    "outranked",
    "subject_of",
    "utc",
]

LoggedState = Literal["pending", "firing", "resolved"]
Transition = Literal["firing", "reminder", "resolved"]
"""What a message says: it fires, it still fires, it is over."""

AlertKind = Literal["forecast", "detection", "nonfinite", "silence"]
"""The kinds of risk, the worst of it (the loss is NaN or infinite), and a run that fell silent."""

OF_RISK: Final[tuple[AlertKind, ...]] = ("forecast", "detection", "nonfinite")
"""Kinds that end when the risk is back to normal."""

ALERT_NAMES: Final[Mapping[AlertKind, str]] = {
    "forecast": "TrainingDivergenceRisk",
    "detection": "TrainingLossDiverging",
    "nonfinite": "TrainingLossNotFinite",
    "silence": "TrainingRunSilent",
}
"""Kind to alertname; the Prometheus rules carry the same names."""

SEVERITIES: Final[Mapping[AlertKind, str]] = {
    "forecast": "warning",
    "detection": "critical",
    "nonfinite": "critical",
    "silence": "warning",
}


OUTRANKS: Final[Mapping[AlertKind, tuple[AlertKind, ...]]] = {
    "nonfinite": ("detection", "forecast"),
    "detection": ("forecast",),
}
"""Of the same run: while the one fires, the others tell nobody anything new."""


@dataclass(frozen=True, slots=True)
class AlertSubject:
    """Whose alert it is.

    Attributes:
        run_id: Hex id of the run.
        project: Project name.
        run: Run name.
        attempt: Attempt number.
    """

    run_id: str
    project: str
    run: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stakes:
    """What an alert is about, in time and machines.

    Attributes:
        step_seconds: Usual duration of a step; None if not measured.
        hours_at_risk: Hours of training since the last checkpoint, or the first record, that was
            seen: lost if the run diverges now.
        world_size: Processes of the job, one GPU each; None if it did not say.
    """

    step_seconds: float | None = None
    hours_at_risk: float | None = None
    world_size: int | None = None

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours at risk, if both are known."""
        if self.hours_at_risk is None or self.world_size is None:
            return None
        return self.hours_at_risk * self.world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertContent:
    """What an alert says, as of the step it fired at.

    Attributes:
        step: That step.
        probability: Per horizon; None where the model cannot say.
        band: Per horizon a (low, high) interval for it.
        stakes: Time and machines.
        expected_lead: Steps until onset, if the model can say.
        causes: From the diagnosis, most likely first: name, probability, layers, role, statistic,
            since_step, evidence, remedy, source.
        drivers: Signals that moved the forecast: signal, contribution, layer.
        model_version: Which artifact answered.
    """

    step: int
    probability: Mapping[int, float | None] = field(default_factory=dict)
    band: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    stakes: Stakes = field(default_factory=Stakes)
    expected_lead: float | None = None
    causes: tuple[Mapping[str, Any], ...] = ()
    drivers: tuple[Mapping[str, Any], ...] = ()
    model_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert of one run.

    Attributes:
        id: Number of the row.
        subject: Whose it is.
        kind: forecast, detection, nonfinite or silence.
        state: pending, firing or resolved.
        opened_step, fired_step, resolved_step: Steps of the transitions.
        starts_at, ends_at: Wall-clock times (UTC) of firing (opening while pending) and resolving.
        end_reason: Why it ended.
        content: What it says.
        correct, note: People's answer to "was this right?".
    """

    id: int
    subject: AlertSubject
    kind: AlertKind
    state: LoggedState
    opened_step: int
    fired_step: int | None
    resolved_step: int | None
    starts_at: datetime
    ends_at: datetime | None
    end_reason: str | None
    content: AlertContent
    correct: bool | None
    note: str | None

    @property
    def name(self) -> str:
        """The alertname."""
        return ALERT_NAMES[self.kind]

    @property
    def severity(self) -> str:
        """As it stands in the label: warning or critical."""
        return SEVERITIES[self.kind]


def outranked(firing: Iterable[Alert]) -> frozenset[int]:
    """Ids of the firing alerts whose run has a worse one that is firing too."""
    alerts = list(firing)
    covered = {
        (alert.subject.run_id, lesser)
        for alert in alerts
        for lesser in OUTRANKS.get(alert.kind, ())
    }
    return frozenset(a.id for a in alerts if (a.subject.run_id, a.kind) in covered)


def utc(value: datetime | None) -> datetime | None:
    """A time of these tables: SQLite keeps no timezone, and each of them is UTC."""
    return None if value is None else value.replace(tzinfo=UTC)


def dump_content(content: AlertContent) -> str:
    """As JSON, for the row."""
    body = asdict(content)
    body["probability"] = {str(h): encode_number(p) for h, p in content.probability.items()}
    body["band"] = {str(horizon): list(edges) for horizon, edges in content.band.items()}
    body["expected_lead"] = encode_number(content.expected_lead)
    return json.dumps(_finite(body), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return encode_number(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _load(text: str) -> AlertContent:
    body = json.loads(text)
    return AlertContent(
        step=body["step"],
        probability={
            h: decode_number(body["probability"].get(str(h)), "probability") for h in HORIZONS
        },
        band={int(horizon): tuple(edges) for horizon, edges in body.get("band", {}).items()},
        stakes=Stakes(**body.get("stakes", {})),
        expected_lead=decode_number(body["expected_lead"], "expected_lead"),
        causes=tuple(body["causes"]),
        drivers=tuple(body["drivers"]),
        model_version=body["model_version"],
    )


def subject_of(row: Any) -> AlertSubject:
    """Whose alert a row is."""
    return AlertSubject(row.run_id, row.project, row.run, row.attempt)


def alert_of(row: Any) -> Alert:
    """An alert from its row."""
    return Alert(
        id=row.id,
        subject=subject_of(row),
        kind=row.kind,
        state=row.state,
        opened_step=row.opened_step,
        fired_step=row.fired_step,
        resolved_step=row.resolved_step,
        starts_at=row.starts_at.replace(tzinfo=UTC),
        ends_at=utc(row.ends_at),
        end_reason=row.end_reason,
        content=_load(row.content),
        correct=row.correct,
        note=row.note,
    )
