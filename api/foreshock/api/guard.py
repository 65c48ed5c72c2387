"""The door of the service: who asks, from which page, under which name, and how large a body.

Plain ASGI in front of everything, so that no route can forget it. Which scope a route needs, the
route says itself (`access/scopes.py`).
"""

from __future__ import annotations

import math
from typing import Final
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from foreshock.api.access.admission import Access, Credentials
from foreshock.api.access.principal import Principal
from foreshock.api.access.scopes import COOKIE, PRINCIPAL_KEY
from foreshock.api.database import DATABASE_LOST
from foreshock.api.problems import Problem, database_lost, problem_response
from foreshock.api.settings import Settings, is_loopback

__all__ = ["OPEN_PATHS", "Guard", "address_of"]

OPEN_PATHS: Final = frozenset(
    {"/", "/docs", "/runbook", "/healthz", "/readyz", "/login", "/logout", "/favicon.ico"}
)
"""Health has to answer to anybody; the page holds no data and asks for a token itself; the runbook
is the same everywhere, and links in alerts are opened on phones."""

_OPEN_PREFIX: Final = "/assets/"
_TOO_LARGE: Final = "the body is larger than {} bytes; send smaller batches"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


def address_of(connection: HTTPConnection) -> str:
    """Where a request comes from; behind a proxy that uvicorn trusts, what the proxy says."""
    return connection.client.host if connection.client is not None else ""


class Guard:
    """Lets a request through to the application, or answers it with a problem."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limit = settings.max_body_bytes
        public = urlsplit(settings.public_url)
        self._public = public.netloc
        self._hosts = {name for name in (settings.host, public.hostname) if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        send = _hardened(send)
        connection = HTTPConnection(scope)
        try:
            principal, receive = await self._let_in(connection, receive)
        except Problem as problem:
            await problem_response(problem)(scope, receive, send)
            return
        except DATABASE_LOST as error:
            await problem_response(database_lost(error))(scope, receive, send)
            return
        scope[PRINCIPAL_KEY] = principal
        await self._app(scope, receive, send)

    async def _let_in(
        self, connection: HTTPConnection, receive: Receive
    ) -> tuple[Principal | None, Receive]:
        access = _access(connection)
        if access.open:
            self._check_host(connection)
        self._check_size(connection)
        given = _credentials(connection)
        unsafe = connection.scope["method"] not in _SAFE_METHODS
        # No browser adds an Authorization header for a page of another site.
        if unsafe and given.token is None and not self._same_origin(connection, strict=False):
            raise Problem(403, "a page of another site may not do this")
        path = connection.url.path
        if path in OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return None, _limited(receive, self._limit)
        principal = access.recall(given)
        if principal is None:
            principal = await run_in_threadpool(access.admit, given)
        if principal.session and unsafe and not self._same_origin(connection, strict=True):
            # SameSite keeps other sites' pages from sending the cookie; this is the second bolt.
            raise Problem(403, "a cookie changes nothing without Origin or Sec-Fetch-Site")
        if access.open:
            return principal, _limited(receive, self._limit)
        wait = access.rates.admit(principal.id)
        if wait > 0:
            raise Problem(
                429,
                f"token {principal.name!r} asks too much of this service",
                headers={"Retry-After": str(math.ceil(wait))},
            )
        return principal, _limited(receive, self._limit, access, principal)

    def _check_host(self, connection: HTTPConnection) -> None:
        # Without a token the loopback address is the only door. A page of a stranger could reach it
        # through a name of its own that points here; its Host header then gives it away.
        host = urlsplit(f"//{connection.headers.get('host', 'localhost')}").hostname or ""
        if not is_loopback(host) and host not in self._hosts:
            raise Problem(421, f"this service does not answer to the name {host!r}")

    def _check_size(self, connection: HTTPConnection) -> None:
        length = connection.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            raise Problem(413, _TOO_LARGE.format(self._limit))

    def _same_origin(self, connection: HTTPConnection, *, strict: bool) -> bool:
        """Whether a request comes from this service's own page, as far as the browser says.

        Args:
            connection: The request.
            strict: Whether silence counts against it; programs send neither header.
        """
        site = connection.headers.get("sec-fetch-site")
        if site is not None:
            return site == "same-origin" or (site == "none" and not strict)
        origin = connection.headers.get("origin")
        if origin is None:
            return not strict
        ours = {connection.headers.get("host", ""), self._public} - {""}
        return urlsplit(origin).netloc in ours


def _access(connection: HTTPConnection) -> Access:
    services = getattr(connection.scope["app"].state, "services", None)
    access = getattr(services, "access", None)
    if not isinstance(access, Access):
        raise Problem(503, "the service is starting", headers={"Retry-After": "1"})
    return access


def _credentials(connection: HTTPConnection) -> Credentials:
    scheme, _, text = connection.headers.get("authorization", "").partition(" ")
    token = text.strip() if scheme.lower() == "bearer" else None
    return Credentials(token, connection.cookies.get(COOKIE), address_of(connection))


def _hardened(send: Send) -> Send:
    async def hardened(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            given = {name.lower() for name, _ in headers}
            headers += [pair for pair in _HEADERS if pair[0] not in given]
            message = {**message, "headers": headers}
        await send(message)

    return hardened


def _limited(
    receive: Receive,
    limit: int,
    access: Access | None = None,
    principal: Principal | None = None,
) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        size = len(message.get("body", b""))
        seen += size
        if access is not None and principal is not None and size:
            access.rates.charge(principal.id, size)
        if seen > limit:
            raise HTTPException(413, _TOO_LARGE.format(limit))
        return message

    return counted
