"""The file of an incident: everything around a step, for somebody without this service."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import BINARY
from foreshock.api.incident import gather, pack
from foreshock.api.incident.pack import archive_name
from foreshock.api.openapi import errors
from foreshock.api.routes.live_parts import Live, WantedRun
from foreshock.api.routes.parameters import AttemptNumber
from foreshock.api.services import ServicesDep
from foreshock.api.store import LAST_STEP

__all__ = ["router"]

router = APIRouter(tags=["risk"])

_ZIP: Final = "application/zip"
_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {_ZIP: {"schema": BINARY}}, "description": "The archive"}
}


class ZipResponse(StreamingResponse):
    """Marks the media type in OpenAPI."""

    media_type = _ZIP


@router.get(
    "/runs/{run}/incident",
    response_class=ZipResponse,
    responses=errors(404, also=_ANSWER),
    dependencies=[READ],
)
def get_run_incident(
    run: WantedRun,
    live: Live,
    services: ServicesDep,
    step: Annotated[int, Query(ge=0, le=LAST_STEP, description="The step it is about.")],
    attempt: AttemptNumber = None,
) -> StreamingResponse:
    """A .zip about one step: incident.html, records.parquet and incident.json.

    2,000 steps around it, all series, with alarm, risk, diagnosis, configuration, versions and the
    last checkpoint before the trouble. The page opens anywhere, without scripts and without a
    network; the Parquet file holds every record as it was received.
    """
    incident = gather(services.store, live, run, step, attempt)
    name = archive_name(incident)
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return ZipResponse(pack(incident, services.store), headers=headers)
