"""Every error is a problem body, health says the truth, strangers stay out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from foreshock.api.app import create_app
from foreshock.api.ingest import Ingest, Overloaded
from foreshock.api.settings import Settings
from foreshock.api.store import StoreBusy, StoreError
from foreshock.api.store_clickhouse import ClickHouseStore
from tests.api.service import make_records, new_launch, post_run, put_records
from tests.api.test_routes_batches import is_problem


def test_every_error_is_a_problem(client: httpx.Client) -> None:
    assert "/nowhere" in is_problem(client.get("/nowhere"), 404)
    is_problem(client.get("/api/v1/runs/absent"), 404)
    refused = client.request("DELETE", "/api/v1/runs")
    assert "DELETE" in is_problem(refused, 405)
    assert refused.headers["allow"]


def test_health_answers(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        assert client.get(path).json() == {"status": "ok", "reasons": []}


@pytest.mark.parametrize(
    ("body", "headers", "status", "named"),
    [
        (b"{", {"Content-Type": "application/json"}, 422, "JSON"),
        (b'{"run": 1}', {"Content-Type": "application/json"}, 422, "body.run"),
        (b"run=a", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "text/plain"),
        (b"{}", {}, 415, "application/json"),
        (b'"\xff"', {"Content-Type": "application/json"}, 400, "body"),
    ],
)
def test_a_body_that_does_not_read_is_a_problem(
    client: httpx.Client, body: bytes, headers: dict[str, str], status: int, named: str
) -> None:
    for path in ("/api/v1/runs", "/api/v1/alerts/1/feedback"):
        answer = client.post(path, content=body, headers=headers)
        assert named in is_problem(answer, status) or path.endswith("feedback")


def test_a_body_above_the_limit_is_a_problem(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path, max_body_bytes=1000))
    with TestClient(app, base_url="http://127.0.0.1") as inside:
        headers = {"Content-Type": "application/json"}
        answer = inside.post("/api/v1/runs", content=b" " * 2000, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")


def test_files_of_the_page_that_do_not_exist_are_problems(client: httpx.Client) -> None:
    assert "/assets/absent.js" in is_problem(client.get("/assets/absent.js"), 404)


def test_a_name_of_a_stranger_is_not_answered(client: httpx.Client) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:80"):
        is_problem(client.get("/api/v1/runs", headers={"Host": host}), 421)
    for host in ("localhost", "localhost:9", "127.0.0.1:1", "[::1]:80"):
        assert client.get("/api/v1/runs", headers={"Host": host}).status_code == 200


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application in this process, where parts of it can be made to fail."""
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("inside")))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def failing(error: Exception) -> object:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_what_nobody_foresaw_is_a_problem_without_its_reason(
    inside: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = inside.app.state.services.live  # type: ignore[attr-defined]
    monkeypatch.setattr(live, "states", failing(KeyError("a secret place")))
    response = inside.get("/api/v1/runs")
    assert (response.status_code, response.headers["content-type"]) == (
        500,
        "application/problem+json",
    )
    assert "secret" not in response.text


@pytest.mark.parametrize("error", [StoreError("memory limit"), StoreBusy("busy")])
def test_a_store_that_fails_is_503_and_not_ready(
    inside: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    launch = new_launch()
    run = inside.post("/api/v1/runs", json={"run": "a", "launch_id": launch}).json()["run_id"]
    for read in ("bounds", "scalar_series"):
        monkeypatch.setattr(ClickHouseStore, read, failing(error))
    response = inside.get(f"/api/v1/runs/{run}/series?name=loss")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert inside.get("/readyz").status_code == 503
    assert inside.get("/healthz").status_code == 200


def test_a_query_that_hangs_fails_health(
    inside: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClickHouseStore, "hung_seconds", lambda _: 3.0)
    response = inside.get("/healthz")
    assert (response.status_code, response.json()["reasons"]) == (503, ["a query hangs"])


def test_overload_asks_to_come_back(inside: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = new_launch()
    client: httpx.Client = inside  # type: ignore[assignment]
    run = post_run(client, "overload", launch)["run_id"]
    monkeypatch.setattr(Ingest, "submit", failing(Overloaded("too much")))
    response = put_records(client, run, launch, 1, make_records(0, 1))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
