"""What can go wrong between a client and the service: one tree, each leaf with what to do about it.

Knows the problem bodies of the service (RFC 9457) and no transport.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "ClientError",
    "Conflict",
    "Forbidden",
    "InvalidRequest",
    "MissingPackage",
    "NoAnswer",
    "NotFound",
    "Problem",
    "RateLimited",
    "ServiceFailure",
    "TooLarge",
    "Unauthorized",
    "problem_of",
]


class ClientError(Exception):
    """Anything that a call of the client raises."""


class MissingPackage(ClientError, ImportError):
    """An optional package is not installed; the message says which."""


class NoAnswer(ClientError):
    """Nobody answered, or the connection ended in the middle of an answer."""


class Problem(ClientError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        detail: What is wrong and what would be right, in the service's words.
        members: Further members of the body, e.g. `record` or `errors`.
    """

    def __init__(self, status: int, detail: str, members: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.detail = detail
        self.members = dict(members or {})


class InvalidRequest(Problem):
    """400, 406, 415, 422: the request is wrong as it stands; the detail says where."""


class Unauthorized(Problem):
    """401: no token, or one that the service does not know; set FORESHOCK_TOKEN."""


class Forbidden(Problem):
    """403: the token's scopes or projects do not cover this."""


class NotFound(Problem):
    """404: there is no such run, attempt, layer or alert."""


class Conflict(Problem):
    """409: the id is in use for something else."""


class TooLarge(Problem):
    """413: send less at a time."""


class RateLimited(Problem):
    """429, after the client's own retries: come back later."""


class ServiceFailure(Problem):
    """5xx, after the client's own retries: the service is busy or failing."""


_KINDS: Final[Mapping[int, type[Problem]]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    406: InvalidRequest,
    409: Conflict,
    413: TooLarge,
    415: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
}
_KNOWN: Final = ("type", "title", "status", "detail")


def problem_of(status: int, body: object, text: str) -> Problem:
    """The error that an answer stands for.

    Args:
        status: HTTP status, 300 or above.
        body: The answer as JSON, or None if it is none (a proxy's page, say).
        text: The answer as text, for want of anything better.
    """
    kind = ServiceFailure if status >= 500 else _KINDS.get(status, Problem)
    if not isinstance(body, Mapping) or "detail" not in body:
        return kind(status, text.strip()[:200] or "no reason given")
    members = {name: value for name, value in body.items() if name not in _KNOWN}
    return kind(status, str(body["detail"]), members)
