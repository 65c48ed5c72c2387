"""The alerts of all runs, and people's answer to "was this right?".

Raises and sends none.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from foreshock.api.access.scopes import READ, WRITE
from foreshock.api.alert_log import Alert, AlertKind, UnknownAlert
from foreshock.api.alert_text import alert_annotations, alert_labels, summary
from foreshock.api.openapi import errors
from foreshock.api.paging import PageDep, read_cursor, write_cursor
from foreshock.api.problems import Problem
from foreshock.api.routes.live_parts import Live, Number
from foreshock.api.schemas import NEXT, number
from foreshock.api.services import ServicesDep, find_run

__all__ = ["AlertList", "AlertModel", "DeliveryModel", "Feedback", "router"]

router = APIRouter(tags=["alerts"])


class DeliveryModel(BaseModel):
    """What became of one message."""

    channel: str
    transition: Literal["firing", "resolved"]
    tries: int
    delivered_at: datetime | None
    abandoned: bool
    error: str | None


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
    expected_lead: Number
    causes: list[dict[str, Any]]
    drivers: list[dict[str, Any]]
    model_version: str
    labels: dict[str, str]
    annotations: dict[str, str]
    correct: bool | None = Field(description="People's answer")
    note: str | None
    deliveries: list[DeliveryModel]


class AlertList(BaseModel):
    """Alerts, newest first."""

    alerts: list[AlertModel]
    next: str | None = NEXT


class Feedback(BaseModel):
    """Was this alert right?"""

    correct: bool
    note: Annotated[str | None, Field(max_length=2000)] = None


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
    delivered = live.log.delivered([alert.id for alert in found])
    following = page.more(write_cursor("alerts", found[-1].id) if more else None)
    models = [_model(alert, delivered[alert.id]) for alert in found]
    return AlertList(alerts=models, next=following)


@router.post("/alerts/{id}/feedback", dependencies=[WRITE])
def post_alert_feedback(
    live: Live,
    services: ServicesDep,
    alert_id: Annotated[int, Path(alias="id", ge=1, lt=2**63, description="The alert.")],
    answer: Feedback,
) -> AlertModel:
    """Say whether an alert was right; a later answer replaces an earlier one."""
    project = _find(live, services, alert_id).subject.project
    alert = live.log.answer(alert_id, correct=answer.correct, note=answer.note)
    services.note("alert.feedback", project=project, subject=str(alert_id), correct=answer.correct)
    return _model(alert, live.log.delivered([alert.id])[alert.id])


def _find(live: Live, services: ServicesDep, alert_id: int) -> Alert:
    """An alert that the caller may see."""
    try:
        alert = live.log.get(alert_id)
    except UnknownAlert:
        alert = None
    if alert is None or not services.principal.sees(alert.subject.project):
        raise Problem(404, f"there is no alert {alert_id}")
    return alert


def _model(alert: Alert, delivered: tuple[Mapping[str, Any], ...]) -> AlertModel:
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
        expected_lead=number(content.expected_lead),
        causes=[dict(cause) for cause in content.causes],
        drivers=[dict(driver) for driver in content.drivers],
        model_version=content.model_version,
        labels=alert_labels(alert),
        annotations=alert_annotations(alert, transition),
        correct=alert.correct,
        note=alert.note,
        deliveries=[DeliveryModel(**message) for message in delivered],
    )
