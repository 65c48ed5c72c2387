"""The service as a job reaches it: address, certificate, health, token, clock. Changes nothing."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from foreshock.api.cli.checkup.findings import Finding, note, ok, wrong
from foreshock.monitor.certificates import verification

__all__ = ["check_service"]

_TIMEOUT: Final = httpx.Timeout(15.0, connect=5.0)
_SKEW_SECONDS: Final = 60.0
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# A scope is there if such a request is refused for another reason than the scope, or answered.
_PROBES: Final[Mapping[str, tuple[str, str]]] = {
    "read": ("GET", "api/v1/runs?limit=1"),
    "write": ("POST", "api/v1/runs"),
    "admin": ("GET", "api/v1/tokens"),
}


def check_service(name: str, url: str, token: str | None) -> Iterator[Finding]:
    """Everything from here to a service.

    Args:
        name: What it is called in findings: service or relay.
        url: Its address.
        token: What a job from here would bring.
    """
    if (problem := _address_problem(url)) is not None:
        yield wrong(name, f"its address is {url!r}: {problem}", "http://host:8420 or https://host")
        return
    try:
        verify = verification()
    except ValueError as error:
        yield wrong("certificate", str(error), "point FORESHOCK_CA to the authority's PEM file")
        return
    with httpx.Client(base_url=url.rstrip("/") + "/", timeout=_TIMEOUT, verify=verify) as client:
        sent = time.time()
        try:
            answer = client.get("healthz")
        except httpx.TransportError as error:
            yield _unreachable(name, url, error)
            return
        yield from _health(name, url, client, answer)
        yield from _clock(answer, (sent + time.time()) / 2)
        if name == "service" and _is_health(answer):
            yield from _token(client, token)


def _address_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "not one that a job could use"
    return None


def _unreachable(name: str, url: str, error: httpx.TransportError) -> Finding:
    reason = str(error) or type(error).__name__
    if isinstance(error.__cause__ or error.__context__, ssl.SSLError) or "SSL" in reason:
        remedy = (
            "set FORESHOCK_CA to the PEM file of the authority that signed it; if the service "
            "speaks plain HTTP, its address begins with http://"
        )
        return wrong("certificate", f"{url}: {reason}", remedy)
    remedy = "is it running (foreshock serve), and does a firewall or another port stand between?"
    used = [n for n in _PROXIES if os.environ.get(n) or os.environ.get(n.lower())]
    if used:
        remedy += f" {', '.join(used)} is set: name the service's host in NO_PROXY"
    return wrong(name, f"{url} does not answer: {reason}", remedy)


def _is_health(answer: httpx.Response) -> bool:
    body = _json(answer)
    return answer.status_code in (200, 503) and "status" in body and "reasons" in body


def _health(name: str, url: str, client: httpx.Client, answer: httpx.Response) -> Iterator[Finding]:
    if not _is_health(answer):
        yield wrong(
            name,
            f"{url} answers {answer.status_code}, but it is no foreshock {name}",
            "correct the address; behind a proxy, /healthz must reach the service",
        )
        return
    if answer.status_code == 503:
        yield wrong(name, f"it fails: {_reasons(answer)}", "restart it; its log says more")
        return
    ready = client.get("readyz")
    if ready.status_code == 503:
        yield wrong(
            name,
            f"it takes no requests now: {_reasons(ready)}",
            "make room on its disk, or bring its store and database back",
        )
    else:
        yield ok(name, f"{url} is well and ready")


def _reasons(answer: httpx.Response) -> str:
    return ", ".join(map(str, _json(answer).get("reasons", ()))) or "no reason given"


def _clock(answer: httpx.Response, here: float) -> Iterator[Finding]:
    """The Date header has whole seconds, so that two clocks that agree may differ by one."""
    try:
        there = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return
    skew = here - there
    if abs(skew) > _SKEW_SECONDS:
        side = "ahead of" if skew > 0 else "behind"
        yield wrong(
            "clock",
            f"this machine's is {abs(skew):.0f} seconds {side} the service's: curves over time "
            "stand in the wrong place",
            "synchronise both clocks (NTP)",
        )
    else:
        yield ok("clock", f"within {abs(skew) + 1:.0f} seconds of the service's")


def _token(client: httpx.Client, token: str | None) -> Iterator[Finding]:
    if token is not None and not (token.isascii() and token.isprintable()):
        yield wrong("token", "it holds what no HTTP header can carry", "copy FORESHOCK_TOKEN again")
        return
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    held = []
    for scope, (method, path) in _PROBES.items():
        answer = client.request(
            method, path, headers=headers, json={} if method == "POST" else None
        )
        if answer.status_code in (401, 429):
            yield _refused(answer, token)
            return
        if answer.status_code != 403:
            held.append(scope)
    yield _judge_scopes(held, token)


def _refused(answer: httpx.Response, token: str | None) -> Finding:
    detail = str(_json(answer).get("detail", answer.status_code))
    if answer.status_code == 429:
        return wrong("token", detail, "wait a minute, then set the right token")
    if token is None:
        remedy = "set FORESHOCK_TOKEN; `foreshock token create` on the service makes one"
        return wrong("token", f"FORESHOCK_TOKEN is not set, and {detail}", remedy)
    return wrong("token", detail, "ask for another: foreshock token create, or rotate")


def _judge_scopes(held: list[str], token: str | None) -> Finding:
    if token is None:
        return ok("token", "the service is open to this machine; none is needed")
    scopes = ", ".join(held) or "none"
    if "write" not in held:
        return note(
            "token",
            f"its scopes: {scopes}",
            "a training job needs write: foreshock token create JOB --scope write --project NAME",
        )
    return ok("token", f"its scopes: {scopes}")


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
