"""`GET /metrics` for Prometheus, in text or OpenMetrics as the scraper asks.

Outside `/api/v1`, where scrapers expect it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import choose_encoder

from foreshock.api.access.scopes import READ
from foreshock.api.exposition import metrics_of
from foreshock.api.routes.live_parts import Live
from foreshock.api.services import ServicesDep

__all__ = ["router"]

router = APIRouter(tags=["service"])

_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "content": {
            media_type: {
                "schema": {"type": "string"},
                "examples": {"one run": {"value": 'foreshock_loss{run="llama-1b"} 2.81\n'}},
            }
            for media_type in ("text/plain", "application/openmetrics-text")
        }
    }
}


@router.get("/metrics", response_class=PlainTextResponse, responses=_ANSWER, dependencies=[READ])
def get_metrics(
    live: Live,
    services: ServicesDep,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """Live runs and the service itself; a token kept to projects gets the runs of those only."""
    encoder, content_type = choose_encoder(accept)
    shown = metrics_of(live.metrics, services.principal.projects)
    return Response(encoder(shown), media_type=None, headers={"Content-Type": content_type})
