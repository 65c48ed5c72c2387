"""The door of the service: the token, the Host header, the size of a body.

Plain ASGI in front of everything, so that no route can forget it. Issues no tokens.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreshock.api.problems import Problem, problem_response
from foreshock.api.settings import Settings, is_loopback

__all__ = ["COOKIE", "Guard", "token_matches"]

COOKIE = "foreshock_token"
"""Cookie that may carry the token instead of the Authorization header."""

# Health has to answer to anybody; the page holds no data and asks for the token itself.
_OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/login", "/logout", "/favicon.ico"})
_OPEN_PREFIX = "/assets/"


def token_matches(given: str, expected: str) -> bool:
    """Compare two tokens in a time that does not tell how much of them agrees."""
    return hmac.compare_digest(given.encode(), expected.encode())


class Guard:
    """Lets a request through to the application, or answers it with a problem."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._token = settings.token
        self._limit = settings.max_body_bytes
        public = urlsplit(settings.public_url).hostname
        self._hosts = {name for name in (settings.host, public) if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = self._refusal(HTTPConnection(scope))
        if problem is not None:
            await problem_response(problem)(scope, receive, send)
            return
        await self._app(scope, _limited(receive, self._limit), send)

    def _refusal(self, connection: HTTPConnection) -> Problem | None:
        if self._token is None:
            return self._foreign_host(connection)
        path = connection.url.path
        if path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return None
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = connection.cookies.get(COOKIE, "")
        if token_matches(given.strip(), self._token):
            return None
        return Problem(
            401,
            "this service needs its token: Authorization: Bearer <token>",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _foreign_host(self, connection: HTTPConnection) -> Problem | None:
        # Without a token the loopback address is the only door. A page of a stranger could reach it
        # through a name of its own that points here; its Host header then gives it away.
        host = urlsplit(f"//{connection.headers.get('host', 'localhost')}").hostname or ""
        if is_loopback(host) or host in self._hosts:
            return None
        return Problem(421, f"this service does not answer to the name {host!r}")


def _limited(receive: Receive, limit: int) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes; send smaller batches")
        return message

    return counted
