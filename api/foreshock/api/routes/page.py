"""The page at `/`, its files, and signing in to it; everything else it shows is the public API's.

Holds no session: the cookie carries the token itself, out of the reach of scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Final

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from foreshock.api.guard import COOKIE, token_matches
from foreshock.api.page import CONTENT_SECURITY_POLICY, Asset, load_assets, load_index
from foreshock.api.problems import Problem
from foreshock.api.services import ServicesDep

__all__ = ["SignIn", "router"]

_COOKIE_SECONDS: Final = 30 * 24 * 3600

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
    """The token, typed by a person."""

    token: str = Field(max_length=4096)


@router.post("/login", status_code=204)
def login(body: SignIn, services: ServicesDep, request: Request, response: Response) -> None:
    """Take the token once; give it back as a cookie that no script and no other site can use."""
    expected = services.settings.token
    if expected is None:
        return
    if not token_matches(body.token.strip(), expected):
        raise Problem(401, "that is not the token of this service")
    response.set_cookie(
        COOKIE,
        expected,
        max_age=_COOKIE_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


@router.post("/logout", status_code=204)
def logout(response: Response) -> None:
    """Take the cookie back."""
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
