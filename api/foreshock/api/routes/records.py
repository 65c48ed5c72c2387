"""Read whole records back: Arrow, Parquet, CSV or JSON, all of them or a page at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import CSV, PARQUET, RECORDS_ANSWER
from foreshock.api.conditional import NOT_MODIFIED, TableQuestionDep
from foreshock.api.openapi import errors
from foreshock.api.paging import Cursor, link_next, read_cursor, write_cursor
from foreshock.api.routes.parameters import SelectionDep
from foreshock.api.services import ServicesDep
from foreshock.api.store import Store, View
from foreshock.api.store_rows import widen
from foreshock.api.tabular import csv_lines, csv_rows, write_arrow, write_parquet
from foreshock.api.windows import steps_after
from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import SCHEMA, records_to_json, table_to_records

__all__ = ["router"]

router = APIRouter(tags=["reading"])


@router.get(
    "/runs/{run}/records",
    response_class=StreamingResponse,
    dependencies=[READ],
    responses=errors(406, also=NOT_MODIFIED | {200: {"content": RECORDS_ANSWER}}),
)
def get_run_records(
    request: Request,
    chosen: SelectionDep,
    services: ServicesDep,
    question: TableQuestionDep,
    limit: Annotated[
        int | None, Query(ge=1, le=100_000, description="Most records; default: all, streamed.")
    ] = None,
    cursor: Cursor = None,
) -> StreamingResponse:
    """Records by step, as stored. CSV holds the scalars only, one column each.

    With `limit` the Link header names the next page, as does `next` in JSON.
    """
    media_type, headers = question.media_type, question.headers(chosen.run)
    view, more = _page(services.store, chosen.view, limit, cursor)
    body = _WRITERS[media_type](services.store, view)
    if media_type == JSON and limit is not None:
        body = _with_next(body, more)
    answer = StreamingResponse(body, media_type=media_type, headers=headers)
    link_next(request, answer, more)
    return answer


def _page(
    store: Store, view: View, limit: int | None, cursor: str | None
) -> tuple[View, str | None]:
    """The part of a view that a page shows, and the cursor of the next page."""
    if cursor is not None:
        (after,) = read_cursor(cursor, "records", int)
        view = replace(view, first_step=max(view.first_step, after + 1))
    if limit is None:
        return view, None
    steps = steps_after(store, view, limit + 1)
    if len(steps) <= limit:
        return view, None
    last = int(steps[limit - 1])
    return replace(view, last_step=last), write_cursor("records", last)


def _with_next(body: Iterator[bytes], more: str | None) -> Iterator[bytes]:
    """JSON of records with `next`, whose closing brace comes last."""
    held = b""
    for piece in body:
        yield held
        held = piece
    tail = "null" if more is None else f'"{more}"'
    yield held[:-1] + f',"next":{tail}}}'.encode()


def _arrow(store: Store, view: View) -> Iterator[bytes]:
    return write_arrow(SCHEMA, store.record_chunks(view))


def _parquet(store: Store, view: View) -> Iterator[bytes]:
    return write_parquet(SCHEMA, store.record_chunks(view))


def _csv(store: Store, view: View) -> Iterator[bytes]:
    names = store.scalar_names(view.run_id)
    yield csv_lines([["step", "time", *names]])
    for steps, scalars in store.scalar_chunks(view):
        yield csv_rows(widen(steps, scalars, names))


def _json(store: Store, view: View) -> Iterator[bytes]:
    opening = b'{"records":['
    between = opening
    for table in store.record_chunks(view):
        whole = records_to_json(table_to_records(table))
        yield between + whole[len(opening) : -len(b"]}")]
        between = b","
    yield opening + b"]}" if between == opening else b"]}"


_WRITERS: Final[dict[str, Callable[[Store, View], Iterator[bytes]]]] = {
    JSON: _json,
    ARROW: _arrow,
    PARQUET: _parquet,
    CSV: _csv,
}
