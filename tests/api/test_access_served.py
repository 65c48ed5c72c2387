"""Tokens on a real service: made beside it, rotated, revoked, rated; and nothing of them told."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from tests.api.service import Service, make_records, new_launch, post_run, put_records
from tests.api.test_routes_batches import is_problem

BOOTSTRAP = "a-bootstrap-token-for-tests"


def command(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, ["token", *arguments], env={"COLUMNS": "200", **environment})


def made(*arguments: str, **environment: str) -> dict[str, Any]:
    done = command(*arguments, "--json", **environment)
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def until(status: int, ask: Any) -> httpx.Response:
    """Ask until this status comes: another process's change is noticed within seconds."""
    deadline = time.monotonic() + 20
    while (response := ask()).status_code != status:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.1)
    assert isinstance(response, httpx.Response)
    return response


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(
        tmp_path_factory.mktemp("access"),
        environment={"FORESHOCK_TOKEN": BOOTSTRAP, "FORESHOCK_TOKEN_REQUESTS": "50"},
    )
    made.start()
    yield made
    assert made.stop() == 0, made.log


def test_an_address_for_all_is_served_once_somebody_has_a_token(tmp_path: Path) -> None:
    data = tmp_path / "data"
    secret = made("create", "job", "--scope", "read", "--all-projects", "--data", str(data))
    service = Service(tmp_path, "--host", "0.0.0.0")
    service.start()
    try:
        with service.client() as stranger, service.client(secret["secret"]) as client:
            assert stranger.get("/api/v1/runs").status_code == 401
            assert client.get("/api/v1/runs").status_code == 200
            assert "clear text" in service.log
    finally:
        assert service.stop() == 0
    assert command("revoke", secret["id"], "--data", str(data)).exit_code == 0
    with pytest.raises(AssertionError, match="without a token"):
        service.start()


def test_a_token_made_beside_the_service_is_rotated_and_revoked_beside_it(
    service: Service,
) -> None:
    data = str(service.data)
    old = made("create", "job", "--scope", "write", "--project", "p", "--data", data)
    with service.client(old["secret"]) as before:
        until(422, lambda: before.post("/api/v1/runs", json={}))
        new = made("rotate", old["id"], "--grace", "1h", "--data", data)
        with service.client(new["secret"]) as after:
            until(422, lambda: after.post("/api/v1/runs", json={}))
            assert before.post("/api/v1/runs", json={}).status_code == 422
            newest = made("rotate", old["id"], "--grace", "0s", "--data", data)
            refused = until(401, lambda: after.post("/api/v1/runs", json={}))
            assert "not a token" in is_problem(refused, 401)
        with service.client(newest["secret"]) as client:
            until(422, lambda: client.post("/api/v1/runs", json={}))
            assert command("revoke", old["id"], "--data", data).exit_code == 0
            refused = until(401, lambda: client.post("/api/v1/runs", json={}))
            assert "was revoked" in is_problem(refused, 401)
    with service.client(BOOTSTRAP) as admin:
        entries = admin.get("/api/v1/audit", params={"limit": 200}).json()["entries"]
    mine = [e for e in entries if e["subject"] == old["id"]]
    assert [e["action"] for e in mine] == [
        "token.revoke",
        "token.rotate",
        "token.rotate",
        "token.create",
    ]
    assert {(e["actor_id"], e["address"], e["project"]) for e in mine} == {("local", "local", "p")}


def test_a_service_elsewhere_is_administered_over_http(service: Service) -> None:
    url = ("--url", service.url)
    token = made(
        "create",
        "far",
        "--scope",
        "read",
        "--all-projects",
        "--expires",
        "90d",
        *url,
        FORESHOCK_TOKEN=BOOTSTRAP,
    )
    assert token["expires_at"]
    with service.client(token["secret"]) as client:
        assert client.get("/api/v1/runs").status_code == 200
        denied = command("list", *url, FORESHOCK_TOKEN=token["secret"])
        assert denied.exit_code == 2
        assert "403" in denied.stderr
        assert command("revoke", token["id"], *url, FORESHOCK_TOKEN=BOOTSTRAP).exit_code == 0
        # Here at once: it is the same process.
        assert client.get("/api/v1/runs").status_code == 401
    listed = command("list", *url, FORESHOCK_TOKEN=BOOTSTRAP)
    assert token["id"] in listed.stdout
    assert "revoked" in listed.stdout
    assert token["secret"] not in listed.stdout


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    data = ("--data", str(tmp_path))
    for arguments, said in (
        (("create", "x", "--scope", "read", *data), "--all-projects"),
        (("create", "x", "--scope", "root", "--all-projects", *data), "root"),
        (("create", "x", "--scope", "read", "--all-projects", "--expires", "soon", *data), "90d"),
        (("revoke", "absent", *data), "absent"),
        (("list", "--url", "http://127.0.0.1:1"), "did not answer"),
    ):
        done = command(*arguments)
        assert done.exit_code == 2, arguments
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_what_was_done_and_by_whom_is_read_page_by_page(service: Service) -> None:
    with service.client(BOOTSTRAP) as admin:
        launch = new_launch()
        post_run(admin, "audited", launch, project="p")
        with service.client("a-wrong-token-for-the-log") as stranger:
            assert stranger.get("/api/v1/runs").status_code == 401
        assert admin.post("/login", json={"token": BOOTSTRAP}).status_code == 204
        seen: list[dict[str, Any]] = []
        before: int | None = None
        while True:
            query: dict[str, int] = {"limit": 2} | ({} if before is None else {"before": before})
            page = admin.get("/api/v1/audit", params=query).json()
            seen += page["entries"]
            before = page["before"]
            if before is None:
                break
        assert [e["id"] for e in seen] == sorted((e["id"] for e in seen), reverse=True)
        announced = next(e for e in seen if e["action"] == "launch.announce")
        assert (announced["actor_id"], announced["subject"]) == ("bootstrap", "audited")
        assert (announced["project"], announced["detail"]) == ("p", {"launch": launch})
        failed = next(e for e in seen if e["action"] == "auth.failed")
        assert (failed["actor_id"], failed["address"]) == ("nobody", "127.0.0.1")
        only = admin.get("/api/v1/audit", params={"action": "page.sign_in"}).json()["entries"]
        assert {e["action"] for e in only} == {"page.sign_in"}
        assert "wrong-token" not in json.dumps(seen)


def test_a_token_that_asks_too_much_waits_and_the_others_do_not(service: Service) -> None:
    data = str(service.data)
    greedy = made("create", "greedy", "--scope", "read", "--all-projects", "--data", data)
    with service.client(greedy["secret"]) as client, service.client(BOOTSTRAP) as other:
        until(200, lambda: client.get("/api/v1/runs"))
        for _ in range(5000):
            response = client.get("/api/v1/openapi.json")
            if response.status_code == 429:
                break
        assert "asks too much" in is_problem(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        assert other.get("/api/v1/runs").status_code == 200
        until(200, lambda: client.get("/api/v1/runs"))


@pytest.mark.long
def test_no_token_is_ever_told(tmp_path: Path) -> None:
    """Through every way to fail, then the whole output, the database and the answers are read."""
    service = Service(tmp_path, environment={"FORESHOCK_TOKEN": BOOTSTRAP})
    service.start()
    secrets = [BOOTSTRAP, "a-wrong-token-nobody-has"]
    answers: list[httpx.Response] = []
    with service.client(BOOTSTRAP) as admin:
        body = {"name": "job", "scopes": ["read", "write"], "projects": ["p"]}
        issued = admin.post("/api/v1/tokens", json=body).json()
        secrets.append(issued["secret"])
        launch = new_launch()
        run = post_run(admin, "quiet", launch, project="p")["run_id"]
        put_records(admin, run, launch, 1, make_records(0, 2))
    for secret in secrets:
        with service.client(secret) as client:
            answers += [
                client.get("/api/v1/runs"),
                client.get(f"/api/v1/runs/{secret}/series"),
                client.get("/api/v1/nowhere", params={"token": secret}),
                client.get("/api/v1/audit", params={"action": secret}),
                client.post("/login", json={"token": [secret]}),
                client.post("/login", json={"token": secret, "scopes": [secret]}),
                client.post("/login", content=b'{"token": "' + secret.encode()),
                client.post("/api/v1/runs", json={"launch_id": secret}),
                client.put(f"/api/v1/runs/{run}/batches/{secret}", content=b"x"),
                client.post("/api/v1/forecast", content=secret.encode()),
                client.delete(f"/api/v1/tokens/{secret}"),
                client.patch("/api/v1/runs"),
            ]
            signed_in = client.post("/login", json={"token": secret})
            secrets += [v for v in signed_in.cookies.values() if v not in secrets]
            answers.append(client.post("/logout", json={}))
    assert {answer.status_code for answer in answers} >= {200, 401, 403, 404, 405, 422}
    assert service.stop() == 0
    assert len(secrets) >= 5
    stored = b"".join(path.read_bytes() for path in service.data.glob("registry*"))
    for secret in secrets:
        assert secret not in service.log
        assert secret.encode() not in stored
        for answer in answers:
            # What a caller put into the address of its own request may be in its own answer.
            if secret not in str(answer.request.url):
                assert secret not in answer.text
                assert secret not in repr(dict(answer.headers))
    assert "Traceback" not in service.log
