"""The page's files as they go over the wire, and signing in to it."""

from __future__ import annotations

import gzip
import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from foreshock.api import problems
from foreshock.api.access.admission import Access
from foreshock.api.access.scopes import COOKIE, READ, WRITE
from foreshock.api.guard import Guard
from foreshock.api.page import load_assets, load_index
from foreshock.api.registry import Registry
from foreshock.api.routes.page import router
from foreshock.api.services import Services
from foreshock.api.settings import Settings

STATIC = files("foreshock.api.page") / "static"
TOKEN = "a-token-of-some-length"
OURS = sorted(entry.name for entry in STATIC.iterdir() if entry.name.endswith(".js"))
SHEETS = sorted(entry.name for entry in STATIC.iterdir() if entry.name.endswith(".css"))


def text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def service(settings: Settings, folder: Path) -> FastAPI:
    """The page behind the real guard, and one route that stands for all data; no store."""
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(router)
    nothing = {"runs": list[str]()}
    app.add_api_route("/api/v1/runs", lambda: nothing, dependencies=[READ])
    app.add_api_route("/api/v1/runs", lambda: nothing, methods=["POST"], dependencies=[WRITE])
    problems.install(app)
    app.add_middleware(Guard, settings=settings)
    absent: Any = None
    app.state.services = Services(
        settings=settings,
        registry=absent,
        ledger=absent,
        store=absent,
        ingest=absent,
        live=absent,
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


def test_the_runbook_opens_for_everybody_and_runs_nothing(locked: TestClient) -> None:
    answer = locked.get("/runbook")
    assert answer.status_code == 200
    assert '<h2 id="traininglossnotfinite">' in answer.text
    assert "<script" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


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
    for name in (*OURS, *SHEETS):
        # Names of XML and what comments cite are no addresses that anything is loaded from.
        found = re.findall(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text(name))
        assert not found, name


def test_the_reference_is_open_and_has_nothing_from_elsewhere(locked: TestClient) -> None:
    html = locked.get("/docs").text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', html)
    assert not re.findall(r"<script(?![^>]*src=)|<style|\sstyle=", html)
    names = re.findall(r'(?:src|href)="(/assets/[^"]+)"', html)
    assert len(names) == 4
    assert [locked.get(name).status_code for name in names] == [200] * 4


def test_every_file_is_short() -> None:
    for name in (*OURS, *SHEETS, "index.html"):
        assert len(text(name).splitlines()) <= 500, name


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


def sign_in(client: TestClient, **members: Any) -> Any:
    answer = client.post("/login", json={"token": TOKEN, **members})
    assert answer.status_code == 204, answer.text
    return answer


def test_a_session_looks_only_unless_asked_otherwise(locked: TestClient) -> None:
    ours = {"Origin": "http://localhost"}
    sign_in(locked)
    assert locked.get("/api/v1/runs").status_code == 200
    refused = locked.post("/api/v1/runs", headers=ours)
    assert (refused.status_code, "scope write" in refused.text) == (403, True)
    sign_in(locked, scopes=["read", "write"])
    assert locked.post("/api/v1/runs", headers=ours).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "https://fp8.example"}, 200),
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "http://localhost:81"}, 403),
    ],
)
def test_a_cookie_changes_nothing_for_a_page_of_another_site(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    settings = Settings(token=TOKEN, public_url="https://fp8.example")
    client = TestClient(service(settings, tmp_path), base_url="http://localhost")
    cookie = sign_in(client, scopes=["read", "write"]).cookies[COOKIE]
    # The cookie is for https only, which this client does not speak.
    given = {"Cookie": f"{COOKIE}={cookie}", **headers}
    assert client.get("/api/v1/runs", headers=given).status_code == 200
    assert client.post("/api/v1/runs", headers=given).status_code == status


def test_a_page_of_another_site_neither_signs_in_nor_writes_to_an_open_service(
    locked: TestClient, client: TestClient
) -> None:
    foreign = {"Origin": "https://evil.example"}
    answer = locked.post("/login", json={"token": TOKEN}, headers=foreign)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert client.post("/api/v1/runs", headers=foreign).status_code == 403
    assert client.post("/api/v1/runs").status_code == 200


def test_no_program_with_a_token_is_asked_for_its_origin(locked: TestClient) -> None:
    given = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://grafana.example"}
    assert locked.post("/api/v1/runs", headers=given).status_code == 200


def test_the_cookie_ends_when_the_session_does(tmp_path: Path) -> None:
    settings = Settings(token=TOKEN, session_hours=2)
    client = TestClient(service(settings, tmp_path), base_url="http://localhost")
    answer = sign_in(client)
    expires = parsedate_to_datetime(re.search("expires=([^;]*)", answer.headers["set-cookie"])[1])  # type: ignore[index]
    assert timedelta(minutes=110) < expires - datetime.now(UTC) <= timedelta(hours=2)


def test_every_answer_forbids_guessing_its_type_and_telling_its_address(
    locked: TestClient,
) -> None:
    for path in ("/", "/assets/main.js", "/healthz", "/api/v1/runs", "/nowhere"):
        headers = locked.get(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path
        assert len(headers.get_list("x-content-type-options")) == 1, path
