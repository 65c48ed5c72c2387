"""Every error of the service as one body: RFC 9457 `application/problem+json`.

Never carries a stack trace, a token or a path of the server.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

__all__ = ["MEDIA_TYPE", "Problem", "database_lost", "install", "problem_response"]

MEDIA_TYPE: Final = "application/problem+json"

_log = logging.getLogger(__name__)


class Problem(Exception):
    """An error with an HTTP answer.

    Attributes:
        status: HTTP status code.
        detail: What is wrong with this request and what would be right.
        members: Further members of the body, e.g. the index of the record at fault.
        headers: Further headers, e.g. Retry-After.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        members: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.members = dict(members or {})
        self.headers = dict(headers or {})


def database_lost(error: Exception) -> Problem:
    """What is answered when the database is not there; logs why."""
    # Its text may hold a statement with values; its origin says what is wrong.
    _log.error("the database failed: %s", getattr(error, "orig", None) or type(error).__name__)
    detail = "the database does not answer; try again"
    return Problem(503, detail, headers={"Retry-After": "1"})


def problem_response(problem: Problem) -> Response:
    """The answer for a problem."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.detail,
    }
    return Response(
        json.dumps(body | problem.members, allow_nan=False),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=problem.headers,
    )


def install(app: FastAPI) -> None:
    """Answer every error of an application with a problem body."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(Exception, _on_unexpected)


def _on_problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, Problem):
        raise TypeError("registered for Problem only")
    return problem_response(error)


def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError("registered for HTTPException only")
    details = {
        404: f"there is no {request.url.path}",
        405: f"{request.method} is not allowed here",
    }
    standard = error.detail == HTTPStatus(error.status_code).phrase
    detail = details.get(error.status_code, error.detail) if standard else error.detail
    return problem_response(Problem(error.status_code, detail, headers=error.headers))


def _on_invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise TypeError("registered for RequestValidationError only")
    # The offending input stays out: it may be huge, secret, or NaN.
    errors = [
        {"where": ".".join(str(part) for part in item["loc"]), "reason": item["msg"]}
        for item in error.errors()
    ]
    if any(item["loc"] == ("body",) for item in error.errors()) and not _says_json(request):
        given = request.headers.get("content-type", "")
        reason = f"Content-Type {given!r} is not read; allowed: application/json"
        return problem_response(Problem(415, reason))
    first = errors[0] if errors else {"where": "request", "reason": "invalid"}
    detail = f"{first['where']}: {first['reason']}"
    return problem_response(Problem(422, detail, members={"errors": errors}))


def _says_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


def _on_unexpected(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    return problem_response(Problem(500, "an error in the service; its log says more"))
