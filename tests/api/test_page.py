"""The page's files as they go over the wire, and signing in to it."""

from __future__ import annotations

import gzip
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from foreshock.api import problems
from foreshock.api.access.admission import Access
from foreshock.api.access.scopes import COOKIE
from foreshock.api.guard import Guard
from foreshock.api.page import load_assets, load_index
from foreshock.api.registry import Registry
from foreshock.api.routes.page import router
from foreshock.api.services import Services
from foreshock.api.settings import Settings

STATIC = files("foreshock.api.page") / "static"
TOKEN = "a-token-of-some-length"
OURS = ("api.js", "charts.js", "dom.js", "main.js", "panels.js", "wire.js")


def text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def service(settings: Settings, folder: Path) -> FastAPI:
    """The page behind the real guard, and one route that stands for all data; no store."""
    app = FastAPI()
    app.include_router(router)
    app.add_api_route("/api/v1/runs", lambda: {"runs": []})
    problems.install(app)
    app.add_middleware(Guard, settings=settings)
    nothing: Any = None
    app.state.services = Services(
        settings=settings,
        registry=nothing,
        ledger=nothing,
        store=nothing,
        ingest=nothing,
        live=nothing,
        access=Access(Registry(folder / "registry.sqlite"), settings),
    )
    return app


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(service(Settings(), tmp_path), base_url="http://localhost")


@pytest.fixture
def locked(tmp_path: Path) -> TestClient:
    return TestClient(service(Settings(token=TOKEN), tmp_path), base_url="http://localhost")


def test_page_has_a_strict_policy(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        [*part.split(maxsplit=1), ""][:2]
        for part in answer.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_page_names_only_files_that_are_there(client: TestClient) -> None:
    html = client.get("/").text
    names = re.findall(r'(?:src|href)="(/assets/[^"]+)"', html)
    assert len(names) >= 4
    for name in names:
        assert client.get(name).status_code == 200, name
    for module in OURS:
        for name in re.findall(r'from "\./([\w.]+)"', text(module)):
            assert client.get(f"/assets/{name}").status_code == 200, name


def test_page_has_nothing_from_elsewhere_and_nothing_inline() -> None:
    html = load_index()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', html)
    assert not re.findall(r"<script(?![^>]*src=)", html)
    assert not re.findall(r"<style|\sstyle=|\son\w+=", html)
    for name in (*OURS, "page.css", "charts.css"):
        assert not re.search(r"https?://|@import|url\(", text(name)), name


def test_names_reach_the_document_as_text_only() -> None:
    for name in OURS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text(name)
        )


def test_plotly_comes_from_its_package_cached_for_good(client: TestClient) -> None:
    address = re.search(r"/assets/plotly\.min\.js\?v=[\d.]+", client.get("/").text)
    assert address
    answer = client.get(address[0], headers={"Accept-Encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    assert "immutable" in answer.headers["cache-control"]
    assert "plotly.js" in answer.text[:200]
    again = client.get(address[0], headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_own_files_are_asked_for_again_but_not_sent_again(client: TestClient) -> None:
    answer = client.get("/assets/main.js", headers={"Accept-Encoding": "identity"})
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-encoding" not in answer.headers
    assert answer.text == text("main.js")
    known = {"If-None-Match": answer.headers["etag"]}
    assert client.get("/assets/main.js", headers=known).status_code == 304


@pytest.mark.parametrize("name", ["index.html", "nothing.js", "..%2f__init__.py", "%2e%2e/wire.py"])
def test_there_are_no_other_files(client: TestClient, name: str) -> None:
    assert client.get(f"/assets/{name}").status_code == 404


def test_assets_are_sound() -> None:
    for name, asset in load_assets().items():
        assert gzip.decompress(asset.compressed) == asset.body, name
        assert re.fullmatch(r'"[0-9a-f]{20}"', asset.etag)


def test_page_is_open_and_its_data_is_not(locked: TestClient) -> None:
    assert locked.get("/").status_code == 200
    assert locked.get("/assets/main.js").status_code == 200
    assert locked.get("/api/v1/runs").status_code == 401


def test_sign_in_gives_a_cookie_that_scripts_and_other_sites_cannot_use(locked: TestClient) -> None:
    refused = locked.post("/login", json={"token": "not the token"})
    assert refused.status_code == 401
    assert refused.headers["content-type"] == "application/problem+json"
    assert "set-cookie" not in refused.headers

    answer = locked.post("/login", json={"token": TOKEN})
    assert answer.status_code == 204
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"{COOKIE}=".lower())
    assert TOKEN not in cookie
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert locked.get("/api/v1/runs").status_code == 200

    assert locked.post("/logout").status_code == 204
    locked.cookies.set(COOKIE, answer.cookies[COOKIE])
    assert locked.get("/api/v1/runs").status_code == 401


def test_cookie_is_secure_over_https(tmp_path: Path) -> None:
    client = TestClient(service(Settings(token=TOKEN), tmp_path), base_url="https://localhost")
    answer = client.post("/login", json={"token": TOKEN})
    assert "secure" in answer.headers["set-cookie"].lower()


def test_sign_in_without_a_token_needs_none(client: TestClient) -> None:
    answer = client.post("/login", json={"token": "anything"})
    assert answer.status_code == 204
    assert "set-cookie" not in answer.headers
