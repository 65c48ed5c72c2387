"""The alerts of all runs, who has taken them on, and people's answer to "was this right?".

Raises and sends none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from foreshock.api.access.scopes import READ, WRITE
from foreshock.api.alert_feedback import RuleFeedback, interval
from foreshock.api.alert_log import Alert, AlertKind, UnknownAlert
from foreshock.api.alert_mutes import Decision, Mute, NotOpen
from foreshock.api.alert_text import alert_annotations, alert_labels, summary
from foreshock.api.live_service import LiveService
from foreshock.api.openapi import errors
from foreshock.api.paging import PageDep, read_cursor, write_cursor
from foreshock.api.problems import Problem
from foreshock.api.routes.live_parts import Live, Number
from foreshock.api.schemas import NEXT, number
from foreshock.api.services import ServicesDep, find_run

__all__ = [
    "Acknowledgement",
    "AlertList",
    "AlertModel",
    "DeliveryModel",
    "Feedback",
    "FeedbackRates",
    "MuteModel",
    "RuleRate",
    "Snooze",
    "router",
]

router = APIRouter(tags=["alerts"])


class DeliveryModel(BaseModel):
    """What became of one message."""

    channel: str
    transition: Literal["firing", "reminder", "resolved"]
    tries: int
    delivered_at: datetime | None
    abandoned: bool
    error: str | None


class MuteModel(BaseModel):
    """Who keeps an alert from paging: acknowledged for good, or snoozed until then."""

    decision: Decision
    by: str = Field(description="Name of the token, or local")
    at: datetime
    until: datetime | None = Field(description="End of a snooze; null = for as long as it fires")
    note: str | None


class AlertModel(BaseModel):
    """One alert."""

    id: int
    name: str = Field(description="The alertname")
    run_id: str
    project: str
    run: str
    attempt: int
    kind: AlertKind
    severity: str
    state: Literal["pending", "firing", "resolved"]
    step: int = Field(description="The step it fired at (was opened at, while pending)")
    opened_step: int
    fired_step: int | None
    resolved_step: int | None
    starts_at: datetime
    ends_at: datetime | None
    end_reason: str | None
    summary: str
    probability: dict[str, Number]
    band: dict[str, list[Number]] = Field(description="[low, high] of each probability")
    expected_lead: Number
    step_seconds: Number = Field(description="Usual duration of a step, when it fired")
    hours_at_risk: Number = Field(
        description="Hours of training since the last checkpoint (or the first record) seen then"
    )
    world_size: int | None
    gpu_hours_at_risk: Number = Field(description="The same for all processes of the job")
    causes: list[dict[str, Any]]
    drivers: list[dict[str, Any]]
    model_version: str
    labels: dict[str, str]
    annotations: dict[str, str]
    correct: bool | None = Field(description="People's answer")
    note: str | None
    mute: MuteModel | None = Field(description="null: it pages; a snooze that is over is null too")
    deliveries: list[DeliveryModel]


class AlertList(BaseModel):
    """Alerts, newest first."""

    alerts: list[AlertModel]
    next: str | None = NEXT


Note = Annotated[str | None, Field(max_length=2000)]


class Feedback(BaseModel):
    """Was this alert right?"""

    correct: bool
    note: Note = None


class RuleRate(BaseModel):
    """What people said of the alerts of one rule."""

    name: str = Field(description="The alertname")
    kind: AlertKind
    severity: str
    fired: int = Field(description="Alerts that fired, those still pending left out")
    right: int
    wrong: int
    unanswered: int
    false_share: float | None = Field(description="wrong / (right + wrong); null = no answer yet")
    interval: list[float] | None = Field(description="Its 95 % interval (Wilson)")


class FeedbackRates(BaseModel):
    """False alarms as people see them."""

    since: datetime | None = Field(description="Alerts that started from then on; null = all")
    rules: list[RuleRate]


_LONGEST_SNOOZE: Final = 30 * 86_400


class Acknowledgement(BaseModel):
    """I have it."""

    note: Note = None


class Snooze(BaseModel):
    """Not now."""

    seconds: Annotated[int, Field(ge=1, le=_LONGEST_SNOOZE, description="From now")]
    note: Note = None


AlertId = Annotated[int, Path(alias="id", ge=1, lt=2**63, description="The alert.")]


@router.get("/alerts", dependencies=[READ], responses=errors(404))
def list_alerts(
    live: Live,
    services: ServicesDep,
    page: PageDep,
    *,
    run: Annotated[str | None, Query(description="Name or id of a run")] = None,
    project: Annotated[str, Query(description="Project of the run")] = "default",
    state: Annotated[
        Literal["pending", "firing", "resolved"] | None, Query(description="Only those.")
    ] = None,
) -> AlertList:
    """Alerts, newest first, of one run or of all, a page at a time."""
    run_id = None if run is None else find_run(services, run, project).run_id
    before = None if page.cursor is None else read_cursor(page.cursor, "alerts", int)[0]
    found = live.log.find(
        run_id=run_id,
        state=state,
        limit=page.limit + 1,
        projects=services.principal.projects,
        before=before,
    )
    more = len(found) > page.limit
    found = found[: page.limit]
    following = page.more(write_cursor("alerts", found[-1].id) if more else None)
    return AlertList(alerts=_models(live, found), next=following)


@router.post("/alerts/{id}/feedback", dependencies=[WRITE])
def post_alert_feedback(
    live: Live,
    services: ServicesDep,
    alert_id: AlertId,
    answer: Feedback,
) -> AlertModel:
    """Say whether an alert was right; a later answer replaces an earlier one."""
    project = _find(live, services, alert_id).subject.project
    alert = live.log.answer(alert_id, correct=answer.correct, note=answer.note)
    services.note("alert.feedback", project=project, subject=str(alert_id), correct=answer.correct)
    return _one(live, alert)


@router.get("/alerts/feedback", dependencies=[READ], responses=errors(404))
def get_alert_feedback(
    live: Live,
    services: ServicesDep,
    *,
    run: Annotated[str | None, Query(description="Name or id of a run")] = None,
    project: Annotated[str, Query(description="Project of the run")] = "default",
    days: Annotated[int | None, Query(ge=1, le=3650, description="Of the last days only.")] = None,
) -> FeedbackRates:
    """How many alerts people called right and wrong, for each rule, of one run or of all."""
    run_id = None if run is None else find_run(services, run, project).run_id
    since = None if days is None else datetime.now(UTC) - timedelta(days=days)
    found = live.log.feedback(run_id=run_id, projects=services.principal.projects, since=since)
    return FeedbackRates(since=since, rules=[_rate(rule) for rule in found])


@router.get("/alerts/{id}", dependencies=[READ])
def get_alert(live: Live, services: ServicesDep, alert_id: AlertId) -> AlertModel:
    """One alert."""
    return _one(live, _find(live, services, alert_id))


@router.post("/alerts/{id}/acknowledge", dependencies=[WRITE], responses=errors(409))
def acknowledge_alert(
    live: Live, services: ServicesDep, alert_id: AlertId, answer: Acknowledgement
) -> AlertModel:
    """Take a firing alert on: it pages nobody again. Its end is still told.

    Replaces a snooze. With an Alertmanager it becomes a silence there, for as long as it fires.
    """
    alert = _find(live, services, alert_id)
    by = services.principal.name
    try:
        live.log.mutes.acknowledge(alert_id, by=by, note=answer.note)
    except NotOpen as error:
        raise Problem(409, str(error)) from None
    services.note("alert.acknowledge", project=alert.subject.project, subject=str(alert_id))
    return _decided(live, alert)


@router.post("/alerts/{id}/snooze", dependencies=[WRITE], responses=errors(409))
def snooze_alert(
    live: Live, services: ServicesDep, alert_id: AlertId, answer: Snooze
) -> AlertModel:
    """Keep an alert from paging for a while; if it fires then, it pages again.

    Covers alerts of the same kind that the run raises meanwhile. Replaces an acknowledgement.
    """
    alert = _find(live, services, alert_id)
    until = datetime.now(UTC) + timedelta(seconds=answer.seconds)
    by = services.principal.name
    try:
        live.log.mutes.snooze(alert_id, by=by, until=until, note=answer.note)
    except NotOpen as error:
        raise Problem(409, str(error)) from None
    project, seconds = alert.subject.project, answer.seconds
    services.note("alert.snooze", project=project, subject=str(alert_id), seconds=seconds)
    return _decided(live, alert)


@router.post("/alerts/{id}/unmute", dependencies=[WRITE])
def unmute_alert(live: Live, services: ServicesDep, alert_id: AlertId) -> AlertModel:
    """Take back an acknowledgement or a snooze; without either, nothing changes."""
    alert = _find(live, services, alert_id)
    if live.log.mutes.end(alert_id):
        services.note("alert.unmute", project=alert.subject.project, subject=str(alert_id))
    return _decided(live, alert)


def _rate(rule: RuleFeedback) -> RuleRate:
    ends = interval(rule.wrong, rule.right + rule.wrong)
    return RuleRate(
        name=rule.name,
        kind=rule.kind,
        severity=rule.severity,
        fired=rule.fired,
        right=rule.right,
        wrong=rule.wrong,
        unanswered=rule.unanswered,
        false_share=rule.false_share,
        interval=None if ends is None else list(ends),
    )


def _decided(live: LiveService, alert: Alert) -> AlertModel:
    live.muted(alert)
    return _one(live, alert)


def _one(live: LiveService, alert: Alert) -> AlertModel:
    (model,) = _models(live, [alert])
    return model


def _models(live: LiveService, found: Sequence[Alert]) -> list[AlertModel]:
    ids = [alert.id for alert in found]
    delivered, mutes = live.log.delivered(ids), live.log.mutes.of(ids)
    return [_model(alert, delivered[alert.id], mutes.get(alert.id), live.page) for alert in found]


def _mute_model(mute: Mute) -> MuteModel:
    return MuteModel(
        decision=mute.decision, by=mute.by, at=mute.at, until=mute.until, note=mute.note
    )


def _find(live: Live, services: ServicesDep, alert_id: int) -> Alert:
    """An alert that the caller may see."""
    try:
        alert = live.log.get(alert_id)
    except UnknownAlert:
        alert = None
    if alert is None or not services.principal.sees(alert.subject.project):
        raise Problem(404, f"there is no alert {alert_id}")
    return alert


def _model(
    alert: Alert,
    delivered: tuple[Mapping[str, Any], ...],
    mute: Mute | None,
    page: str | None,
) -> AlertModel:
    subject, content = alert.subject, alert.content
    transition: Literal["firing", "resolved"] = (
        "resolved" if alert.state == "resolved" else "firing"
    )
    return AlertModel(
        id=alert.id,
        name=alert.name,
        run_id=subject.run_id,
        project=subject.project,
        run=subject.run,
        attempt=subject.attempt,
        kind=alert.kind,
        severity=alert.severity,
        state=alert.state,
        step=content.step,
        opened_step=alert.opened_step,
        fired_step=alert.fired_step,
        resolved_step=alert.resolved_step,
        starts_at=alert.starts_at,
        ends_at=alert.ends_at,
        end_reason=alert.end_reason,
        summary=summary(alert, transition),
        probability={str(h): number(p) for h, p in content.probability.items()},
        band={str(h): [number(edge) for edge in edges] for h, edges in content.band.items()},
        expected_lead=number(content.expected_lead),
        step_seconds=number(content.stakes.step_seconds),
        hours_at_risk=number(content.stakes.hours_at_risk),
        world_size=content.stakes.world_size,
        gpu_hours_at_risk=number(content.stakes.gpu_hours),
        causes=[dict(cause) for cause in content.causes],
        drivers=[dict(driver) for driver in content.drivers],
        model_version=content.model_version,
        labels=alert_labels(alert),
        annotations=alert_annotations(alert, transition, page),
        correct=alert.correct,
        note=alert.note,
        mute=None if mute is None or alert.state == "resolved" else _mute_model(mute),
        deliveries=[DeliveryModel(**message) for message in delivered],
    )
