"""The description of the service at `/api/v1/openapi.json`: names, examples and every error answer.

Works on the document that FastAPI makes from the routes; adds what all routes have in common, so
that no route has to repeat it. Serves nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from foreshock.api.examples import EXAMPLES
from foreshock.api.problems import MEDIA_TYPE

__all__ = ["TAGS", "Responses", "describe", "errors", "install", "operation_name"]

Responses = dict[int | str, dict[str, Any]]

TAGS: Final = (
    ("runs", "Announce launches; list runs and look at one."),
    ("batches", "Records in, exactly once."),
    ("reading", "Series, heatmaps and whole records, as JSON, CSV, Arrow or Parquet."),
    ("risk", "How likely a run is to diverge, since when, and why."),
    ("alerts", "What fired, and whether it was right."),
    ("events", "What happens, live, as server-sent events."),
    ("access", "Tokens and the audit log, for administrators."),
    ("health", "For whoever restarts the service."),
    ("service", "The service itself."),
)

_DETAILS: Final[Mapping[int, str]] = {
    400: "There was an error parsing the body",
    401: "this service needs a token: Authorization: Bearer <token>",
    403: "this token lacks the scope write",
    404: "there is no run 'llama-1b' in project 'default'; POST /api/v1/runs first",
    406: "this comes as application/json, text/csv",
    409: "batch 0b9f2c4e-6f1d-4a53-9d0e-2f7c1b8a6e35-0-7 is stored with other contents",
    413: "the body is larger than 67108864 bytes; send smaller batches",
    415: "Content-Type 'text/plain' is not read; allowed: application/json",
    421: "this service does not answer to the name 'evil.example'",
    422: "query.points: Input should be greater than or equal to 1",
    429: "too many requests; wait as long as Retry-After says",
    500: "an error in the service; its log says more",
    503: "the store is busy",
}
_OPEN: Final = ("/healthz", "/readyz")
_PROTECTED: Final = (401, 403, 421, 429)
_WAITS: Final = (429, 503)
_BODY: Final = (400, 413, 415)
_JSON: Final = "application/json"

_PROBLEM: Final[Mapping[str, Any]] = {
    "title": "Problem",
    "description": "An error, as RFC 9457 has it.",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "description": "about:blank: the status says what it is."},
        "title": {"type": "string", "description": "The status in words."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "What is wrong and what would be right."},
        "record": {"type": "integer", "description": "Which record of a batch is at fault."},
        "errors": {
            "type": "array",
            "description": "Every wrong parameter or member.",
            "items": {
                "type": "object",
                "required": ["where", "reason"],
                "properties": {"where": {"type": "string"}, "reason": {"type": "string"}},
            },
        },
    },
}


def operation_name(route: APIRoute) -> str:
    """The operation id of a route: the name of its function, which must therefore stay."""
    return route.name


def errors(*statuses: int, also: Responses | None = None) -> Responses:
    """For a route's `responses`: problems that it has beyond those of every route, and more."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses} | (
        also or {}
    )


def install(app: FastAPI) -> None:
    """Let an application describe itself with what this module adds."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                summary=app.summary,
                description=app.description,
                routes=app.routes,
                license_info=app.license_info,
                tags=[{"name": name, "description": text} for name, text in TAGS],
            )
            app.openapi_schema = describe(made)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Add the errors, and an example to every body."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Problem"] = dict(_PROBLEM)
    components["responses"] = {_component(status): _response(status) for status in _DETAILS}
    for path, operation in _operations(document):
        _add_errors(path, operation)
        for content in _contents(operation):
            _add_example(content, schemas)
    return document


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for operation in item.values():
            yield path, operation


def _contents(operation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every media type of an operation's request and answers."""
    yield from operation.get("requestBody", {}).get("content", {}).values()
    for response in operation["responses"].values():
        yield from response.get("content", {}).values()


def _add_errors(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    statuses = [500]
    if path not in _OPEN:
        statuses += [*_PROTECTED, 503]
    if operation.get("parameters") or "requestBody" in operation:
        statuses.append(422)
    if "{" in path:
        statuses.append(404)
    if "requestBody" in operation:
        statuses += _BODY
    statuses += [status for status in _DETAILS if str(status) in responses]
    for status in statuses:
        # A route that describes an error's body itself is believed (health is no problem).
        if "content" not in responses.get(str(status), {}):
            responses[str(status)] = {"$ref": _reference(status)}
    operation["responses"] = dict(sorted(responses.items()))


def _add_example(content: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    found = EXAMPLES.get(name) or next(iter(schemas.get(name, {}).get("examples", ())), None)
    if found is not None and "examples" not in content:
        content["examples"] = {name: {"value": found}}


def _component(status: int) -> str:
    return HTTPStatus(status).phrase.title().replace(" ", "")


def _reference(status: int) -> str:
    return f"#/components/responses/{_component(status)}"


def _response(status: int) -> dict[str, Any]:
    phrase = HTTPStatus(status).phrase
    body = {"type": "about:blank", "title": phrase, "status": status, "detail": _DETAILS[status]}
    schema = {"$ref": "#/components/schemas/Problem"}
    response: dict[str, Any] = {
        "description": phrase,
        "content": {MEDIA_TYPE: {"schema": schema, "examples": {phrase: {"value": body}}}},
    }
    if status in _WAITS:
        wait = {"description": "Seconds to wait.", "schema": {"type": "string"}}
        response["headers"] = {"Retry-After": wait}
    return response
