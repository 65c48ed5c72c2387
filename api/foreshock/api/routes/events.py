"""What happens to runs, live, as server-sent events.

A stream to look at, not a log: a reader that was away too long gets `reset` and reads the API.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from foreshock.api.access.scopes import READ
from foreshock.api.routes.live_parts import Live, WantedRun
from foreshock.api.services import Services, ServicesDep

__all__ = ["router"]

router = APIRouter(tags=["events"])

_HEADERS: Final = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
_MEDIA_TYPE: Final = "text/event-stream"

Seconds = Annotated[
    float | None, Query(gt=0, le=86_400, description="End after so long; default: never.")
]
LastEventId = Annotated[
    str | None, Header(description="Id of the last event seen; what came after it follows first")
]


class EventStreamResponse(StreamingResponse):
    """Marks the media type in OpenAPI."""

    media_type = _MEDIA_TYPE


_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "content": {
            _MEDIA_TYPE: {
                # Of one event: a stream has no schema of its own before OpenAPI 3.2.
                "schema": {
                    "type": "object",
                    "required": ["id", "event", "data"],
                    "properties": {
                        "id": {"type": "string", "description": "For Last-Event-ID."},
                        "event": {"enum": ["step", "risk", "alert", "reset"]},
                        "data": {"type": "string", "description": "A JSON object on one line."},
                    },
                },
                "examples": {
                    "one step": {
                        "value": {
                            "id": "1f2e3d4c-812",
                            "event": "step",
                            "data": '{"run_id":"5f0c8a1e9b7d4c3f8e2a6b1d0c9f7e5a","step":4120}',
                        }
                    }
                },
            }
        }
    }
}


@router.get("/events", response_class=EventStreamResponse, responses=_ANSWER, dependencies=[READ])
async def stream_events(
    live: Live,
    services: ServicesDep,
    last_event_id: LastEventId = None,
    seconds: Seconds = None,
) -> StreamingResponse:
    """Events of all runs: `step`, `risk`, `alert`, and `reset` after a gap."""
    body = live.stream.follow(
        sees=services.principal.sees,
        holds=_holds(services),
        last_event_id=last_event_id,
        seconds=seconds or math.inf,
    )
    return EventStreamResponse(body, headers=_HEADERS)


@router.get(
    "/runs/{run}/events",
    response_class=EventStreamResponse,
    responses=_ANSWER,
    dependencies=[READ],
)
async def stream_run_events(
    run: WantedRun,
    live: Live,
    services: ServicesDep,
    last_event_id: LastEventId = None,
    seconds: Seconds = None,
) -> StreamingResponse:
    """Events of one run: `step`, `risk`, `alert`, and `reset` after a gap.

    `reset` says what is missing: `{"reason": "overrun", "missed": 12}` when the buffer no longer
    held so many events, `{"reason": "restart"}` when the id is of another life of the service.
    Read the API anew then; the stream goes on from where it is.
    """
    body = live.stream.follow(
        run_id=run.run_id,
        holds=_holds(services),
        last_event_id=last_event_id,
        seconds=seconds or math.inf,
    )
    return EventStreamResponse(body, headers=_HEADERS)


def _holds(services: Services) -> Callable[[], bool]:
    """Whether the reader would still be let in: a stream outlives the request that opened it."""
    return partial(services.access.holds, services.principal)
