"""Acknowledge and snooze at a real service: the command line, `/metrics`, the audit log, pages."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.main import app
from tests.api.live_helpers import Receiver, receiver_process, wait_until
from tests.api.service import make_record, new_launch, post_run, put_records
from tests.dashboards.service import running_service

BOOTSTRAP = "a-bootstrap-token-for-tests"
SCRIPTED = ("-m", "tests.api.page_service")


@dataclass(frozen=True)
class Scene:
    client: httpx.Client
    receiver: Receiver
    run_id: str
    launch: str

    def firing(self) -> dict[str, Any]:
        (alert,) = self.client.get("/api/v1/alerts", params={"state": "firing"}).json()["alerts"]
        return dict(alert)

    def foreshock(self, *arguments: str) -> Result:
        address = {"FORESHOCK_URL": str(self.client.base_url), "FORESHOCK_TOKEN": BOOTSTRAP}
        return CliRunner().invoke(app, ["alert", *arguments], env=os.environ | address)

    def muted(self) -> dict[str, float]:
        text = self.client.get("/metrics").text
        found = [line for line in text.splitlines() if line.startswith("foreshock_alert_muted{")]
        return {line.split('kind="')[1].split('"')[0]: float(line.split()[-1]) for line in found}

    def put(self, sequence: int, first: int, norm: float) -> None:
        records = [make_record(step, value=2.0) for step in range(first, first + 20)]
        for record in records:
            record.scalars["grad_norm"] = norm  # type: ignore[index]
        answer = put_records(self.client, self.run_id, self.launch, sequence, records)
        assert answer.status_code == 201, answer.text


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A run whose forecast fires from step 60 on, by a scripted scorer; the rest is real."""
    with receiver_process(tmp_path_factory.mktemp("receiver")) as receiver:
        environment = {"FORESHOCK_TOKEN": BOOTSTRAP, "FORESHOCK_ALERT_URLS": receiver.url}
        folder = tmp_path_factory.mktemp("service")
        with running_service(folder, environment=environment, command=SCRIPTED) as service:
            launch = new_launch()
            run_id = post_run(service.client, "llama", launch)["run_id"]
            scene = Scene(service.client, receiver, run_id, launch)
            for sequence in range(4):
                scene.put(sequence, 20 * sequence, 2.0)
            wait_until(lambda: len(receiver.bodies()) == 1, 60)
            yield scene


def test_the_command_line_acknowledges_snoozes_and_takes_it_back(scene: Scene) -> None:
    number = str(scene.firing()["id"])
    assert scene.muted() == {"forecast": 0, "detection": 0, "nonfinite": 0, "silence": 0}
    taken = scene.foreshock("acknowledge", number, "--note", "mine")
    assert (taken.exit_code, taken.stderr) == (0, "")
    assert "acknowledged by FORESHOCK_TOKEN" in taken.stdout
    assert scene.firing()["mute"]["note"] == "mine"
    assert scene.muted()["forecast"] == 1
    listed = scene.foreshock("list", "--state", "firing")
    assert listed.stdout == taken.stdout
    snoozed = scene.foreshock("snooze", number, "2h")
    assert "snoozed by FORESHOCK_TOKEN until" in snoozed.stdout
    assert "snoozed" not in scene.foreshock("unmute", number).stdout
    assert (scene.firing()["mute"], scene.muted()["forecast"]) == (None, 0)
    (row,) = json.loads(scene.foreshock("list", "--run", "llama", "--json").stdout)
    assert (row["id"], row["mute"]) == (int(number), None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("acknowledge", "999"), "there is no alert 999"),
        (("snooze", "1", "soon"), "a duration is 'soon'; allowed: a number and s, m, h or d"),
        (("snooze", "1", "90d"), "seconds"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    scene: Scene, arguments: tuple[str, ...], said: str
) -> None:
    refused = scene.foreshock(*arguments)
    assert refused.exit_code == 2
    assert said in refused.stderr


def test_every_decision_is_in_the_audit_log(scene: Scene) -> None:
    number = scene.firing()["id"]
    path = f"/api/v1/alerts/{number}"
    scene.client.post(f"{path}/snooze", json={"seconds": 60}).raise_for_status()
    scene.client.post(f"{path}/acknowledge", json={}).raise_for_status()
    scene.client.post(f"{path}/unmute").raise_for_status()
    entries = scene.client.get("/api/v1/audit", params={"limit": 3}).json()["entries"]
    assert [(e["action"], e["subject"], e["detail"]) for e in entries] == [
        ("alert.unmute", str(number), {}),
        ("alert.acknowledge", str(number), {}),
        ("alert.snooze", str(number), {"seconds": 60}),
    ]
    # Without a decision there is nothing to note.
    scene.client.post(f"{path}/unmute").raise_for_status()
    (newest,) = scene.client.get("/api/v1/audit", params={"limit": 1}).json()["entries"]
    assert newest["id"] == entries[0]["id"]


def test_a_decision_is_an_event_of_the_run(scene: Scene) -> None:
    number = scene.firing()["id"]
    with scene.client.stream("GET", f"/api/v1/runs/{scene.run_id}/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        scene.client.post(f"/api/v1/alerts/{number}/acknowledge", json={}).raise_for_status()
        event = next(line for line in lines if '"mute"' in line)
    body = json.loads(event.removeprefix("data:"))
    assert (body["id"], body["state"]) == (number, "firing")
    assert body["mute"] == {"decision": "acknowledged", "by": "FORESHOCK_TOKEN", "until": None}
    scene.client.post(f"/api/v1/alerts/{number}/unmute").raise_for_status()


def test_an_alert_that_is_over_cannot_be_taken_on(scene: Scene) -> None:
    """Last: it ends the alert, and one that was snoozed for a second pages when that is over."""
    alert = scene.firing()
    path = f"/api/v1/alerts/{alert['id']}"
    scene.client.post(f"{path}/snooze", json={"seconds": 1}).raise_for_status()
    assert len(scene.receiver.bodies()) == 1
    wait_until(lambda: len(scene.receiver.bodies()) == 2, 30)
    scene.put(4, 80, 0.1)
    wait_until(lambda: len(scene.receiver.bodies()) == 3, 30)
    refused = scene.client.post(f"{path}/acknowledge", json={})
    assert refused.status_code == 409
    assert "is resolved; only one that is firing" in refused.json()["detail"]
    assert scene.client.get(path).json()["mute"] is None
    time.sleep(0.5)
    assert len(scene.receiver.bodies()) == 3
