"""Entity tags: an answer that has not changed is not worked out again, let alone sent.

A tag is made of the question and of how far the run has come (its attempts, their last steps and
when their last batch was acknowledged), so that it is known before the store is asked.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Final

import pyarrow as pa
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from foreshock.api.negotiation import Accept, As, choose
from foreshock.api.registry import Run
from foreshock.api.tabular import TABLE_WRITERS
from foreshock.api.wire import JSON

__all__ = [
    "NOT_MODIFIED",
    "Question",
    "QuestionDep",
    "TableQuestion",
    "TableQuestionDep",
    "install",
    "service_version",
]

NOT_MODIFIED: Final[dict[int | str, dict[str, Any]]] = {
    304: {"description": "As it was when it had the given ETag"}
}


@cache
def service_version() -> str:
    """The version of foreshock that answers."""
    return importlib.metadata.version("foreshock")


class _NotModified(Exception):
    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__()
        self.headers = headers


IfNoneMatch = Annotated[
    str | None, Header(description="ETag of the answer you have; 304 if it still holds.")
]


class Question:
    """What a request asks, and what it knows already."""

    def __init__(
        self,
        request: Request,
        if_none_match: IfNoneMatch = None,
    ) -> None:
        self._text = f"{request.url.path}?{'&'.join(sorted(request.url.query.split('&')))}"
        self._known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}

    def headers(self, run: Run, *further: object) -> dict[str, str]:
        """Headers of the answer, given the state of the run and whatever else it depends on.

        Raises:
            An answer of 304, if the asker has this one already.
        """
        state = [[a.number, a.first_step, a.last_step, str(a.last_received)] for a in run.attempts]
        parts = [service_version(), self._text, run.run_id, run.layers, state, further]
        digest = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]
        headers = {
            "ETag": f'"{digest}"',
            "Cache-Control": "private, no-cache",
            "Vary": "Accept, Authorization, Cookie",
        }
        if self._known & {headers["ETag"], "*"}:
            raise _NotModified(headers)
        return headers


class TableQuestion(Question):
    """A question whose answer is a table, in the media type that is liked best.

    Attributes:
        media_type: One of `TABULAR`.
    """

    def __init__(
        self,
        request: Request,
        if_none_match: IfNoneMatch = None,
        accept: Accept = "",
        wanted: As = None,
    ) -> None:
        super().__init__(request, if_none_match)
        self.media_type = choose(accept, wanted)

    def headers(self, run: Run, *further: object) -> dict[str, str]:
        """As for any question; each media type has tags of its own."""
        return super().headers(run, self.media_type, *further)

    def answer(
        self, headers: Mapping[str, str], body: BaseModel, table: Callable[[], pa.Table]
    ) -> Response:
        """The answer: a body for JSON, a table for anything else."""
        if self.media_type == JSON:
            return Response(body.model_dump_json(), media_type=JSON, headers=dict(headers))
        rows = table()
        pieces = TABLE_WRITERS[self.media_type](rows.schema, [rows])
        return StreamingResponse(pieces, media_type=self.media_type, headers=headers)


QuestionDep = Annotated[Question, Depends()]
TableQuestionDep = Annotated[TableQuestion, Depends()]


def install(app: FastAPI) -> None:
    """Answer 304 where a route's question is answered already."""
    app.add_exception_handler(_NotModified, _on_not_modified)


def _on_not_modified(_: Request, error: Exception) -> Response:
    if not isinstance(error, _NotModified):
        raise TypeError("registered for _NotModified only")
    return Response(status_code=304, headers=dict(error.headers))
