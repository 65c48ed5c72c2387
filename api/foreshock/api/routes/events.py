"""What happens to runs, live, as server-sent events.

A stream to look at, not a log: a reader that was away too long gets `reset` and reads the API.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse

from foreshock.api.routes.live_parts import Live, WantedRun

__all__ = ["router"]

router = APIRouter(tags=["events"])

_HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_MEDIA_TYPE: Final = "text/event-stream"

LastEventId = Annotated[
    str | None, Header(description="Id of the last event seen; what came after it follows first")
]


class EventStreamResponse(StreamingResponse):
    """Marks the media type in OpenAPI."""

    media_type = _MEDIA_TYPE


@router.get("/events", response_class=EventStreamResponse)
async def all_events(live: Live, last_event_id: LastEventId = None) -> StreamingResponse:
    """Events of all runs: `step`, `risk`, `alert`, and `reset` after a gap."""
    body = live.stream.follow(last_event_id=last_event_id)
    return EventStreamResponse(body, headers=_HEADERS)


@router.get("/runs/{run}/events", response_class=EventStreamResponse)
async def run_events(
    run: WantedRun, live: Live, last_event_id: LastEventId = None
) -> StreamingResponse:
    """Events of one run: `step`, `risk`, `alert`, and `reset` after a gap."""
    body = live.stream.follow(run_id=run.run_id, last_event_id=last_event_id)
    return EventStreamResponse(body, headers=_HEADERS)
