"""`GET /metrics` for Prometheus, in text or OpenMetrics as the scraper asks.

Outside `/api/v1`, where scrapers expect it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response
from prometheus_client.exposition import choose_encoder

from foreshock.api.routes.live_parts import Live

__all__ = ["router"]

router = APIRouter(tags=["service"])


@router.get("/metrics", response_class=Response)
def metrics(live: Live, accept: Annotated[str, Header()] = "") -> Response:
    """Live runs and the service itself."""
    encoder, content_type = choose_encoder(accept)
    return Response(encoder(live.metrics), media_type=None, headers={"Content-Type": content_type})
