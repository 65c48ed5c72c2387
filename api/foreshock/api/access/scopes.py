"""What each route asks of whoever calls it: `dependencies=[READ]`, `[WRITE]` or `[ADMIN]`.

A route under `/api/v1` that says nothing is refused to everybody (`DECLARED`). Which runs may be
touched is not decided here but where runs are found.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import Depends, Request, Security, params
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from foreshock.api.access.principal import NOBODY, SCOPES, Principal
from foreshock.api.problems import Problem

__all__ = ["ADMIN", "COOKIE", "DECLARED", "PRINCIPAL_KEY", "READ", "WRITE", "principal_of"]

COOKIE: Final = "foreshock_session"
"""The page's cookie: names a session, is not a token."""

PRINCIPAL_KEY: Final = "foreshock.principal"
"""Where the door leaves the principal in the ASGI scope."""

# Named for OpenAPI; the door has checked both long before a route is found.
_BEARER: Final = HTTPBearer(
    scheme_name="token",
    description="A token made by `foreshock token create`, with the scopes named at each operation",
    auto_error=False,
)
_SESSION: Final = APIKeyCookie(
    name=COOKIE, scheme_name="session", description="The page's cookie", auto_error=False
)


def principal_of(request: Request) -> Principal:
    """Who the door let in; somebody who may do nothing, if it was never asked."""
    principal = request.scope.get(PRINCIPAL_KEY, NOBODY)
    return principal if isinstance(principal, Principal) else NOBODY


async def _authorize(
    needed: SecurityScopes,
    request: Request,
    _token: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    _cookie: Annotated[str | None, Security(_SESSION)],
) -> None:
    principal = principal_of(request)
    for scope in SCOPES:
        if scope in needed.scopes and not principal.may(scope):
            held = [] if principal.grant is None else sorted(principal.grant.scopes)
            raise Problem(
                403, f"this needs the scope {scope}; {principal.name!r} has {', '.join(held)}"
            )


def _needs(scope: str) -> Any:
    return Security(_authorize, scopes=[scope])


READ: Final = _needs("read")
WRITE: Final = _needs("write")
ADMIN: Final = _needs("admin")


async def _declared(request: Request) -> None:
    declared = getattr(request.scope.get("route"), "dependencies", ())
    if not any(isinstance(d, params.Security) and d.dependency is _authorize for d in declared):
        raise Problem(403, "this operation names no scope, so nobody may call it")


DECLARED: Final = Depends(_declared)
