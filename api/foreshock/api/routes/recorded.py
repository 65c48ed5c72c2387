"""What happened to a run, as its records tell it: a page at a time."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from foreshock.api.access.scopes import READ
from foreshock.api.openapi import errors
from foreshock.api.paging import PageDep, read_cursor, write_cursor
from foreshock.api.routes.parameters import SelectionDep
from foreshock.api.schemas import NEXT
from foreshock.api.services import ServicesDep

__all__ = ["RecordedEvent", "RecordedEvents", "router"]

router = APIRouter(tags=["events"])

_BEFORE_ALL = (-1, 0)


class RecordedEvent(BaseModel):
    """One event of a record; null where it says nothing."""

    step: int
    kind: str = Field(description="E.g. nonfinite, checkpoint, rollback, data_switch, end.")
    micro_batch: int | None = None
    layer: str | None = None
    role: str | None = None
    rank: int | None = None
    detail: str | None = None


class RecordedEvents(BaseModel):
    """Events by step, in the order in which each record has them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "step": 4096,
                            "kind": "checkpoint",
                            "micro_batch": None,
                            "layer": None,
                            "role": None,
                            "rank": 0,
                            "detail": "step-4096",
                        }
                    ],
                    "next": None,
                }
            ]
        }
    )

    events: list[RecordedEvent]
    next: str | None = NEXT


@router.get("/runs/{run}/events/recorded", dependencies=[READ], responses=errors(404))
def list_recorded_events(
    chosen: SelectionDep,
    services: ServicesDep,
    page: PageDep,
    kind: Annotated[
        str | None, Query(max_length=128, description="Only events of this kind.")
    ] = None,
) -> RecordedEvents:
    """Events that a run's records tell of, oldest first, a page at a time.

    For what the service itself says, live: `/runs/{run}/events` and `/alerts`.
    """
    after = _BEFORE_ALL
    if page.cursor is not None:
        step, position = read_cursor(page.cursor, "recorded", int, int)
        after = _place(step), _place(position)
    rows = services.store.event_page(chosen.view, kind, after, page.limit + 1).to_pylist()
    shown = rows[: page.limit]
    more = None
    if len(rows) > page.limit:
        more = write_cursor("recorded", shown[-1]["step"], shown[-1]["position"])
    return RecordedEvents(events=[RecordedEvent(**row) for row in shown], next=page.more(more))


def _place(number: int) -> int:
    """Within what a step can be: a cursor may be anybody's."""
    return max(-1, min(number, 2**63 - 1))
