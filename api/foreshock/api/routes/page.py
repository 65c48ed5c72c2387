"""The page at `/`, its files, and signing in to it; everything else it shows is the public API's.

Holds no session; the cookie that signing in gives is `access/sessions.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from foreshock.api.access.principal import Scope
from foreshock.api.access.scopes import COOKIE
from foreshock.api.guard import address_of
from foreshock.api.page import (
    CONTENT_SECURITY_POLICY,
    Asset,
    load_assets,
    load_docs,
    load_index,
    load_runbook,
)
from foreshock.api.problems import Problem
from foreshock.api.services import ServicesDep
from foreshock.api.settings import Settings

__all__ = ["SignIn", "router"]

_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}

router = APIRouter(include_in_schema=False)


@cache
def _index() -> str:
    return load_index()


@cache
def _assets() -> Mapping[str, Asset]:
    return load_assets()


@router.get("/")
def page() -> HTMLResponse:
    """The page; the same for every run, and without any data of its own."""
    return HTMLResponse(_index(), headers={**_HEADERS, "Cache-Control": "no-cache"})


@router.get("/docs")
def docs() -> HTMLResponse:
    """The API, laid out for people; the description itself needs a token like all else."""
    return HTMLResponse(load_docs(), headers={**_HEADERS, "Cache-Control": "no-cache"})


@router.get("/runbook")
def runbook() -> HTMLResponse:
    """What to do about each alert; alerts link to it, and it holds nothing of any run."""
    headers = {
        **_HEADERS,
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    }
    return HTMLResponse(load_runbook(), headers={**headers, "Cache-Control": "no-cache"})


@router.get("/assets/{name}")
def asset(
    name: str,
    version: Annotated[str | None, Query(alias="v")] = None,
    accept_encoding: Annotated[str, Header()] = "",
    if_none_match: Annotated[str, Header()] = "",
) -> Response:
    """One file of the page. A versioned address never changes, every other is asked for again."""
    found = _assets().get(name)
    if found is None:
        raise Problem(404, f"there is no /assets/{name}")
    headers = {
        "Cache-Control": "public, max-age=31536000, immutable" if version else "no-cache",
        "ETag": found.etag,
        "Vary": "Accept-Encoding",
        "X-Content-Type-Options": "nosniff",
    }
    if found.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    if "gzip" not in accept_encoding:
        return Response(found.body, media_type=found.media_type, headers=headers)
    headers["Content-Encoding"] = "gzip"
    return Response(found.compressed, media_type=found.media_type, headers=headers)


class SignIn(BaseModel):
    """The token, typed by a person, and what the page may do with it."""

    token: str = Field(max_length=4096, repr=False)
    scopes: list[Scope] = Field(default=["read"], min_length=1, max_length=3)


@router.post("/login", status_code=204)
def login(body: SignIn, services: ServicesDep, request: Request, response: Response) -> None:
    """Take the token once; give back a cookie that no script and no other site can use."""
    access = services.access
    if access.open:
        return
    scopes = frozenset(body.scopes)
    cookie, principal = access.sign_in(body.token.strip(), scopes, address_of(request))
    response.set_cookie(
        COOKIE,
        cookie,
        expires=principal.until,
        httponly=True,
        samesite="strict",
        secure=_secure(request, services.settings),
    )


@router.post("/logout", status_code=204)
def logout(services: ServicesDep, request: Request, response: Response) -> None:
    """End the session and take the cookie back."""
    cookie = request.cookies.get(COOKIE)
    if cookie is not None:
        services.access.sign_out(cookie, address_of(request))
    response.delete_cookie(
        COOKIE, httponly=True, samesite="strict", secure=_secure(request, services.settings)
    )


def _secure(request: Request, settings: Settings) -> bool:
    """Whether the cookie may go over TLS only: a proxy in front may hide that people use it."""
    return request.url.scheme == "https" or settings.public_url.startswith("https://")
