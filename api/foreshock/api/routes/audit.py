"""Read the audit log, newest entry first."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from foreshock.api.access.audit import Action
from foreshock.api.access.scopes import ADMIN
from foreshock.api.services import ServicesDep

__all__ = ["AuditBody", "AuditPage", "router"]

router = APIRouter(tags=["access"])


class AuditBody(BaseModel):
    """One entry."""

    id: int
    at: datetime
    action: str
    actor_id: str = Field(description="Id of the token; nobody, anyone, bootstrap or local.")
    actor: str
    address: str
    project: str | None
    subject: str | None = Field(description="A run's name, or the id of an alert or a token.")
    detail: dict[str, Any]


class AuditPage(BaseModel):
    """Entries, newest first."""

    entries: list[AuditBody]
    before: int | None = Field(description="Ask with it for the page that follows; null = none.")


@router.get("/audit", dependencies=[ADMIN])
def list_audit(
    services: ServicesDep,
    *,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most so many.")] = 100,
    before: Annotated[
        int | None, Query(ge=1, lt=2**63, description="Only entries before this one.")
    ] = None,
    action: Annotated[Action | None, Query(description="Only these.")] = None,
) -> AuditPage:
    """The audit log. An admin kept to projects sees the entries about those."""
    found = services.access.audit.page(
        limit=limit + 1, before=before, action=action, projects=services.principal.projects
    )
    shown = found[:limit]
    return AuditPage(
        entries=[
            AuditBody(
                id=entry.id,
                at=entry.at,
                action=entry.action,
                actor_id=entry.actor_id,
                actor=entry.actor,
                address=entry.address,
                project=entry.project,
                subject=entry.subject,
                detail=dict(entry.detail),
            )
            for entry in shown
        ],
        before=shown[-1].id if len(found) > limit else None,
    )
