"""Every route of the application, called by whoever must not: no route can be forgotten.

The list of routes is the application's own, so a new one is walked without anybody thinking of it;
one with a parameter that this test cannot fill fails it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from docs.openapi import document
from fastapi.routing import iter_route_contexts

from foreshock.api.app import create_app
from foreshock.api.guard import OPEN_PATHS
from foreshock.api.settings import Settings
from tests.api.service import batch_path, make_record, new_launch, post_run, put_records
from tests.dashboards.service import running_service

BOOTSTRAP = "a-bootstrap-token-for-tests"
THEIRS, OURS = "theirs", "ours"
DOCUMENT: dict[str, Any] = json.loads(document())
OPEN = ("/healthz", "/readyz")
# Routes of the page: what they do without a token is tested in test_page.py.
PAGE = {"/", "/docs", "/runbook", "/login", "/logout", "/assets/{name}", "/api/v1/openapi.json"}
# What names a project in its body, or concerns all of them.
FOR_NOBODY_ELSE = ("/api/v1/runs", "/api/v1/tokens", "/api/v1/backups")
NEEDED = {"read": {"read", "admin"}, "write": {"write", "admin"}, "admin": {"admin"}}


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    description: dict[str, Any] = field(repr=False)

    @property
    def scope(self) -> str:
        """The scope that it asks for; every route has to name one."""
        named = [s for way in self.description["security"] for s in way.get("token", ())]
        assert len(named) == 1, f"{self} has to name one scope"
        return str(named[0])

    @property
    def streams(self) -> bool:
        return "text/event-stream" in self.description["responses"].get("200", {}).get(
            "content", {}
        )


OPERATIONS = [
    Operation(method.upper(), path, operation)
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if path not in OPEN
]
# What deletes comes last, or nothing would be left to be denied.
OPERATIONS.sort(key=lambda operation: operation.method == "DELETE")
NAMES = [f"{operation.method} {operation.path}" for operation in OPERATIONS]


@dataclass(frozen=True)
class World:
    """A service with a run, an alert and a token in the project `theirs`."""

    url: str
    run_id: str
    launch: str
    alert: int
    token_id: str
    secrets: dict[str, str] = field(repr=False)
    clients: dict[str | None, httpx.Client] = field(repr=False, default_factory=dict)

    def client(self, token: str | None) -> httpx.Client:
        """One for each token, closed with the service."""
        if token not in self.clients:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            self.clients[token] = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        return self.clients[token]

    def request(self, operation: Operation, token: str | None) -> tuple[int, str]:
        """Status and body of an operation on what is theirs; of a stream, its first piece."""
        with self.client(token).stream(
            operation.method,
            self._address(operation),
            params=self._query(operation),
            **self._body(operation),
        ) as response:
            if operation.streams and response.is_success:
                return response.status_code, next(response.iter_text())
            return response.status_code, response.read().decode(errors="replace")

    def _address(self, operation: Operation) -> str:
        tokens = "/tokens/" in operation.path
        values = {
            "run": self.run_id,
            "batch": f"{self.launch}-0-1",
            "id": self.token_id if tokens else str(self.alert),
        }
        return re.sub(r"{(\w+)}", lambda found: values[found[1]], operation.path)

    def _query(self, operation: Operation) -> dict[str, str]:
        values = {"statistic": "kurtosis", "role": "input", "name": "loss", "step": "40"}
        values["other"] = self.run_id
        given = operation.description.get("parameters", ())
        return {p["name"]: values[p["name"]] for p in given if _wanted(p, values)}

    def _body(self, operation: Operation) -> dict[str, Any]:
        content = operation.description.get("requestBody", {}).get("content", {})
        if not content:
            return {}
        example = next(iter(content["application/json"]["examples"].values()))["value"]
        if operation.path == "/api/v1/runs":
            example = example | {"project": THEIRS, "launch_id": new_launch()}
        if operation.path == "/api/v1/tokens":
            example = example | {"projects": [THEIRS]}
        return {"json": example}


def _wanted(parameter: dict[str, Any], known: dict[str, str]) -> bool:
    return parameter["in"] == "query" and (
        parameter.get("required", False) or parameter["name"] in known
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with running_service(
        tmp_path_factory.mktemp("world"),
        environment={"FORESHOCK_TOKEN": BOOTSTRAP},
        command=("-m", "tests.api.page_service"),
    ) as service:
        admin = service.client
        launch = new_launch()
        run_id = post_run(admin, "secretrun", launch, project=THEIRS)["run_id"]
        records = [make_record(step, value=2.0) for step in range(80)]
        for record in records:
            record.scalars["grad_norm"] = 2.0  # type: ignore[index]
        assert put_records(admin, run_id, launch, 1, records).status_code == 201
        secrets = {
            f"{project} {scope}": make(admin, f"{project} {scope}", [scope], [project])["secret"]
            for project in (THEIRS, OURS)
            for scope in NEEDED
        }
        made = World(
            url=service.address,
            run_id=run_id,
            launch=launch,
            alert=first_alert(admin),
            token_id=make(admin, "spare", ["read"], [THEIRS])["id"],
            secrets=secrets,
        )
        yield made
        for client in made.clients.values():
            client.close()


def make(
    client: httpx.Client, name: str, scopes: list[str], projects: list[str] | None
) -> dict[str, Any]:
    body = {"name": name, "scopes": scopes, "projects": projects}
    answer = client.post("/api/v1/tokens", json=body)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def first_alert(client: httpx.Client) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alerts = client.get("/api/v1/alerts").json()["alerts"]
        if any(alert["state"] == "firing" for alert in alerts):
            return int(alerts[0]["id"])
        time.sleep(0.1)
    raise AssertionError("no alert")


def test_the_walk_covers_every_route() -> None:
    app = create_app(Settings())
    routes = {context.path for context in iter_route_contexts(app.routes)}
    assert routes == {operation.path for operation in OPERATIONS} | set(OPEN) | PAGE
    assert {path for path in PAGE if "{" not in path} - {"/api/v1/openapi.json"} <= OPEN_PATHS


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_nobody_enters_without_a_token(world: World, operation: Operation) -> None:
    for token in (None, "fsk_000000000000_" + "A" * 43):
        assert world.request(operation, token)[0] in (401, 429)


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_a_lesser_scope_is_refused(world: World, operation: Operation) -> None:
    lesser = set(NEEDED) - NEEDED[operation.scope]
    assert lesser
    for scope in lesser:
        status, body = world.request(operation, world.secrets[f"{THEIRS} {scope}"])
        assert status == 403, (scope, body)
        assert f"the scope {operation.scope}" in body


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_a_token_of_another_project_finds_nothing(world: World, operation: Operation) -> None:
    status, body = world.request(operation, world.secrets[f"{OURS} {operation.scope}"])
    names_something = "{" in operation.path or operation.method in ("PUT", "DELETE")
    if names_something:
        assert status == 404, body
    elif operation.method == "POST" and operation.path in FOR_NOBODY_ELSE:
        assert status == 403, body
    else:
        assert status == 200, body
        for mark in ("secretrun", THEIRS, world.run_id, world.launch, world.token_id):
            assert mark not in body


def test_a_launch_of_another_project_neither_shows_nor_blocks(world: World) -> None:
    ours, theirs = world.client(world.secrets[f"{OURS} write"]), world.client(BOOTSTRAP)
    before = theirs.get(f"/api/v1/runs/{world.run_id}/records?limit=1000").content
    answer = ours.post("/api/v1/runs", json={"run": "secretrun", "launch_id": world.launch})
    assert answer.status_code == 201, answer.text
    assert answer.json()["attempt"] == 1
    assert answer.json()["run_id"] != world.run_id
    # The same number as a batch of theirs, with other contents.
    for run in (answer.json()["run_id"], "secretrun"):
        sent = put_records(ours, run, world.launch, 1, [make_record(3)])
        assert sent.json()["duplicate"] is (run == "secretrun"), sent.text
    assert put_records(ours, world.run_id, world.launch, 2, [make_record(9)]).status_code == 404
    assert put_records(theirs, world.run_id, world.launch, 1, [make_record(3)]).status_code == 409
    assert theirs.get(f"/api/v1/runs/{world.run_id}/records?limit=1000").content == before
    reader = world.client(world.secrets[f"{OURS} read"])
    shown = reader.get("/api/v1/runs/secretrun").json()
    assert [each["launch_id"] for each in shown["history"]] == [world.launch]
    assert theirs.delete(f"/api/v1/runs/{shown['run_id']}").status_code == 204


def events(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line


def test_a_stream_of_all_events_carries_only_ones_own(world: World) -> None:
    admin, ours = world.client(BOOTSTRAP), world.client(world.secrets[f"{OURS} read"])
    launches = {project: new_launch() for project in (THEIRS, OURS)}
    runs = {p: post_run(admin, "twin", launch, project=p) for p, launch in launches.items()}
    with ours.stream("GET", "/api/v1/events") as response:
        for project in (THEIRS, OURS):
            run_id = runs[project]["run_id"]
            answer = put_records(admin, run_id, launches[project], 1, [make_record(0)])
            assert answer.status_code == 201
        first = next(events(response))
    assert runs[OURS]["run_id"] in first


def test_one_name_in_two_projects_is_two_runs(world: World) -> None:
    writers = {p: world.client(world.secrets[f"{p} write"]) for p in (THEIRS, OURS)}
    readers = {p: world.client(world.secrets[f"{p} read"]) for p in (THEIRS, OURS)}
    found = {}
    for number, project in enumerate((THEIRS, OURS)):
        launch = new_launch()
        # Without a project in the request: a token for one project means that one.
        run_id = post_run(writers[project], "same-name", launch)["run_id"]
        record = make_record(0, value=float(number))
        assert put_records(writers[project], "same-name", launch, 1, [record]).status_code == 201
        found[project] = run_id
    assert found[THEIRS] != found[OURS]
    for number, project in enumerate((THEIRS, OURS)):
        series = readers[project].get("/api/v1/runs/same-name/series?name=loss").json()
        assert series["mean"] == [float(number)]
        named = [r["run_id"] for r in readers[project].get("/api/v1/runs").json()["runs"]]
        assert found[project] in named
        assert not set(found.values()) - {found[project]} & set(named)
    asked = readers[OURS].get("/api/v1/runs/same-name", params={"project": THEIRS})
    assert asked.status_code == 404


def test_a_launch_of_another_project_cannot_be_written_to(world: World) -> None:
    ours = world.client(world.secrets[f"{OURS} write"])
    for run in (world.run_id, "secretrun", "grab"):
        path = batch_path(run, world.launch, 2)
        answer = ours.put(path, json={"records": [{"step": 99, "time": "2026-01-01T00:00:00Z"}]})
        unknown = batch_path(run, new_launch(), 2)
        nothing = ours.put(unknown, json={"records": []})
        assert answer.status_code == nothing.status_code == 404
        # As if there were none: only the launch that was asked for stands in the answer.
        without = [a.json()["detail"].split()[2:] for a in (answer, nothing)]
        assert without[0] == without[1]
    admin = world.client(BOOTSTRAP)
    series = admin.get(f"/api/v1/runs/{world.run_id}/series?name=loss").json()
    assert 99 not in series["step"]


def test_a_token_for_all_projects_reads_all(world: World) -> None:
    admin = world.client(BOOTSTRAP)
    secret = make(admin, "all", ["read"], None)["secret"]
    client = world.client(secret)
    projects = {run["project"] for run in client.get("/api/v1/runs").json()["runs"]}
    assert {THEIRS, OURS} <= projects
    assert 'project="theirs"' in client.get("/metrics").text


def test_an_admin_of_one_project_makes_no_token_for_more(world: World) -> None:
    client = world.client(world.secrets[f"{OURS} admin"])
    for projects in (None, [OURS, THEIRS]):
        body = {"name": "more", "scopes": ["read"], "projects": projects}
        assert client.post("/api/v1/tokens", json=body).status_code == 403
    assert make(client, "mine", ["read"], [OURS])["projects"] == [OURS]


@pytest.mark.parametrize("operation", OPERATIONS, ids=NAMES)
def test_its_own_token_is_served(world: World, operation: Operation) -> None:
    """Else the refusals above could be for any reason. Last, because it deletes the run."""
    own = world.secrets[f"{THEIRS} {operation.scope}"]
    concerns_all = operation.path == "/api/v1/backups"
    status, body = world.request(operation, BOOTSTRAP if concerns_all else own)
    # The example batch is another than the stored one of this id.
    assert status < 400 or (status == 409 and operation.method == "PUT"), body
