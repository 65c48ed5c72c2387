"""Make a backup on the service's own disk.

Restoring one is `foreshock restore`, for a service that does not run.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from foreshock.api.access.scopes import ADMIN
from foreshock.api.backup import BackupError, make_backup
from foreshock.api.openapi import errors
from foreshock.api.problems import Problem
from foreshock.api.services import ServicesDep

__all__ = ["BackupBody", "router"]

router = APIRouter(tags=["service"])

_EXAMPLE: Final[dict[str, JsonValue]] = {
    "folder": "/var/lib/foreshock/backups/20260131T120000Z-4f1c2a",
    "bytes": 734003200,
    "began_at": "2026-01-31T12:00:00Z",
}


class BackupBody(BaseModel):
    """A complete backup."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    folder: str = Field(description="On the service's machine; it may be moved as a whole.")
    bytes: int
    began_at: datetime = Field(description="What was acknowledged before is in it.")


@router.post("/backups", status_code=201, dependencies=[ADMIN], responses=errors(409))
def make_service_backup(services: ServicesDep) -> BackupBody:
    """Back up registry and store while the service goes on; answers when the copy is complete.

    An admin of all projects may, since a backup holds them all.
    """
    if services.principal.projects is not None:
        raise Problem(403, "a backup holds every project: it takes an admin of all of them")
    try:
        with services.ingest.no_deletion:
            made = make_backup(services.settings, services.store)
    except BackupError as error:
        raise Problem(409, str(error)) from None
    services.note("service.backup", subject=made.folder.name)
    return BackupBody(folder=str(made.folder), bytes=made.bytes, began_at=made.began_at)
