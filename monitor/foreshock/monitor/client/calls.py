"""What the parts of the client share: the connections, and which operation a method calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote

from foreshock.monitor.client.http import Http

__all__ = ["Calls", "operation", "path_of"]

_Method = TypeVar("_Method", bound=Callable[..., object])


def operation(name: str) -> Callable[[_Method], _Method]:
    """Say which operation of the service's OpenAPI description a method calls."""

    def marked(method: _Method) -> _Method:
        method.operation = name  # type: ignore[attr-defined]
        return method

    return marked


def path_of(run: str, tail: str = "") -> str:
    """The address of a run, or of something of it."""
    return f"api/v1/runs/{quote(run, safe='')}{tail}"


class Calls:
    """Calls to one service, through `Http`."""

    def __init__(self, http: Http) -> None:
        self._http = http
