"""The live half through a real service process: risk, diagnosis, alerts, events, metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foreshock.api.diagnosis import CAUSES
from foreshock.api.wire import ARROW
from foreshock.monitor.record import (
    Event,
    StepRecord,
    records_to_json,
    records_to_table,
    write_stream,
)
from tests.api.live_helpers import Receiver, receiver_process, record, wait_until
from tests.api.service import Service, new_launch, post_run, put_records

HEALTHY = 60
RUN = "/api/v1/runs/llama"


def story() -> list[StepRecord]:
    """Sixty good steps, then the loss is lost for three."""
    good = [
        record(step, 4.0 - 0.02 * step, kurtosis=3.0 if step % 2 == 0 else None)
        for step in range(HEALTHY)
    ]
    return [*good, *(record(HEALTHY + extra, math.nan) for extra in range(3))]


class Scene:
    """A service that has seen the story, and the receiver of its alerts."""

    def __init__(self, service: Service, receiver: Receiver) -> None:
        self.service = service
        self.receiver = receiver
        self.launch = new_launch()
        self.run_id = ""

    @property
    def client(self) -> httpx.Client:
        return self.service.client()

    def get(self, path: str, **parameters: Any) -> Any:
        with self.client as client:
            answer = client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def feed(self) -> None:
        with self.client as client:
            self.run_id = post_run(client, "llama", self.launch)["run_id"]
            records = story()
            for sequence in range(0, len(records), 9):
                chunk = records[sequence : sequence + 9]
                assert put_records(client, self.run_id, self.launch, sequence, chunk).is_success
        wait_until(lambda: self.get(f"{RUN}/risk")["step"] == HEALTHY + 2, 30)

    def firing(self) -> list[dict[str, Any]]:
        return list(self.get("/api/v1/alerts", state="firing")["alerts"])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "hook").mkdir()
    (folder / "service").mkdir()
    with receiver_process(folder / "hook") as receiver:
        service = Service(
            folder / "service",
            "--alert-url",
            receiver.url,
            "--public-url",
            "http://127.0.0.1:8420",
        )
        service.start()
        try:
            scene = Scene(service, receiver)
            scene.feed()
            yield scene
        finally:
            service.stop()


def test_risk_says_what_it_knows_and_why_not(scene: Scene) -> None:
    risk = scene.get(f"{RUN}/risk")
    assert risk["run_id"] == scene.run_id
    assert (risk["state"], risk["kind"]) == ("firing", "detection")
    assert set(risk["probability"]) == {"10", "100", "1000"}
    for horizon, probability in risk["probability"].items():
        assert probability is not None or risk["reasons"][horizon]
    assert risk["horizon_steps"] == [10, 100, 1000]
    assert risk["steps_per_record"] == 1
    assert risk["hours_at_risk"] == pytest.approx((HEALTHY + 2) / 3600)
    assert scene.get(f"/api/v1/runs/{scene.run_id}/risk") == risk


def test_the_list_of_runs_shows_the_risk(scene: Scene) -> None:
    (run,) = scene.get("/api/v1/runs")["runs"]
    assert run["state"] == "firing"
    assert run["risk"] == scene.get(f"{RUN}/risk")["probability"]


def test_history_holds_every_step_and_thins_to_the_peaks(scene: Scene) -> None:
    wait_until(lambda: len(scene.get(f"{RUN}/risk/history")["step"]) == HEALTHY + 3)
    history = scene.get(f"{RUN}/risk/history")
    assert history["step"] == list(range(HEALTHY + 3))
    assert history["state"][-3:] == ["firing"] * 3
    assert all(len(values) == HEALTHY + 3 for values in history["probability"].values())
    thin = scene.get(f"{RUN}/risk/history", points=5)
    assert len(thin["step"]) == 5
    assert thin["step"][-1] == HEALTHY + 2
    part = scene.get(f"{RUN}/risk/history", first_step=10, last_step=12)
    assert part["step"] == [10, 11, 12]


def test_forecast_gives_the_risks_that_the_run_got_live(scene: Scene) -> None:
    history = scene.get(f"{RUN}/risk/history")
    table = records_to_table(story())
    with scene.client as client:
        arrow = client.post(
            "/api/v1/forecast",
            content=write_stream(table),
            headers={"Content-Type": ARROW},
        ).json()
        plain = client.post(
            "/api/v1/forecast",
            content=records_to_json(story()),
            headers={"Content-Type": "application/json"},
        ).json()
    assert arrow == plain
    assert [risk["step"] for risk in arrow["risks"]] == history["step"]
    assert [risk["state"] for risk in arrow["risks"]] == history["state"]
    for horizon, live in history["probability"].items():
        again = [risk["probability"][horizon] for risk in arrow["risks"]]
        assert again == pytest.approx(live, nan_ok=True)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "JSON"),
        (b'{"records": []}', 422, "no record"),
        (records_to_json([record(1), record(1)]), 422, "steps must rise"),
        (b'{"records": [{"step": -1, "time": "2026-01-01T00:00:00Z"}]}', 422, "negative"),
    ],
)
def test_forecast_refuses_what_it_cannot_read(
    scene: Scene, body: bytes, status: int, words: str
) -> None:
    with scene.client as client:
        answer = client.post(
            "/api/v1/forecast", content=body, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]


def test_diagnosis_names_causes_with_evidence(scene: Scene) -> None:
    answer = scene.get(f"{RUN}/diagnosis")
    assert answer["step"] == HEALTHY + 2
    assert answer["causes"]
    for cause in answer["causes"]:
        assert cause["name"] in CAUSES
        assert cause["evidence"]
        assert cause["remedy"]


def test_the_alert_is_listed_delivered_and_can_be_judged(scene: Scene) -> None:
    (alert,) = scene.firing()
    assert alert["name"] == "TrainingLossNotFinite"
    assert alert["fired_step"] == HEALTHY
    assert alert["labels"] == {
        "alertname": "TrainingLossNotFinite",
        "project": "default",
        "run": "llama",
        "severity": "critical",
    }
    wait_until(lambda: all(d["delivered_at"] for d in scene.firing()[0]["deliveries"]))
    titles = [str(body["title"]) for body in scene.receiver.bodies()]
    assert "[firing] TrainingLossNotFinite llama" in titles
    with scene.client as client:
        path = f"/api/v1/alerts/{alert['id']}/feedback"
        judged = client.post(path, json={"correct": True, "note": "it was"}).json()
        assert (judged["correct"], judged["note"]) == (True, "it was")
        assert client.post("/api/v1/alerts/9999/feedback", json={"correct": True}).is_error
        assert client.post(path, json={"correct": "perhaps"}).status_code == 422
    assert scene.get("/api/v1/alerts", run="llama", state="resolved")["alerts"] == []


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/runs/nobody/risk",
        "/api/v1/runs/nobody/risk/history",
        "/api/v1/runs/nobody/diagnosis",
        "/api/v1/runs/nobody/events",
        "/api/v1/alerts?run=nobody",
    ],
)
def test_an_unknown_run_is_a_problem(scene: Scene, path: str) -> None:
    with scene.client as client:
        answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_run_without_records_has_no_risk_and_says_so(scene: Scene) -> None:
    with scene.client as client:
        post_run(client, "quiet", new_launch(), project="other")
    risk = scene.get("/api/v1/runs/quiet/risk", project="other")
    assert risk["step"] is None
    assert risk["probability"] == {"10": None, "100": None, "1000": None}
    assert "no record" in risk["reasons"]["10"]
    assert scene.get("/api/v1/runs/quiet/diagnosis", project="other")["causes"] == []


def test_metrics_show_the_run(scene: Scene) -> None:
    with scene.client as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, sample.labels.get("role", "")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.labels.get("run", "llama") == "llama"
    }
    assert found["foreshock_step", ""] == HEALTHY + 2
    assert math.isnan(found["foreshock_loss", ""])
    assert found["foreshock_kurtosis", "input"] == 10.0
    assert found["foreshock_ingest_records_total", ""] >= HEALTHY + 3
    assert found["foreshock_scored_records_total", ""] >= HEALTHY + 3


def read_frames(client: httpx.Client, path: str, count: int, last: str | None = None) -> list[str]:
    """The first frames of a stream, comments and retry left out."""
    headers = {} if last is None else {"Last-Event-ID": last}
    frames: list[str] = []
    with client.stream("GET", path, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        buffer = ""
        for text in answer.iter_text():
            buffer += text
            *whole, buffer = buffer.split("\n\n")
            frames += [frame for frame in whole if "event: " in frame]
            if len(frames) >= count:
                return frames
    return frames


def test_events_stream_and_resume(scene: Scene) -> None:
    with scene.client as client:
        # Any id of another life of the service: the reader is told, and gets an id to go on from.
        (reset,) = read_frames(client, f"{RUN}/events", 1, last="0-0")
        assert "event: reset" in reset
        here = reset.splitlines()[0].removeprefix("id: ")
        more = record(HEALTHY + 3, 2.8, events=[Event("checkpoint")])
        assert put_records(client, scene.run_id, scene.launch, 1000, [more]).is_success
        step, risk = read_frames(client, f"{RUN}/events", 2, last=here)[:2]
        first = step.splitlines()[0].removeprefix("id: ")
        again = read_frames(client, "/api/v1/events", 1, last=first)
    assert "event: step" in step
    assert "event: risk" in risk
    assert json.loads(risk.splitlines()[2].removeprefix("data: "))["step"] == HEALTHY + 3
    assert again[0] == risk


def test_readers_that_leave_are_forgotten(scene: Scene) -> None:
    def readers() -> float:
        with scene.client as client:
            text = client.get("/metrics").text
        (line,) = [x for x in text.splitlines() if x.startswith("foreshock_event_readers ")]
        return float(line.split()[1])

    wait_until(lambda: readers() == 0, 30)


def test_a_restart_tells_nobody_twice_and_remembers(scene: Scene, tmp_path: Path) -> None:
    before = len(scene.receiver.bodies())
    risk = scene.get(f"{RUN}/risk")
    with scene.client as client, client.stream("GET", f"{RUN}/events") as open_stream:
        assert open_stream.status_code == 200
        assert scene.service.stop() == 0
    assert "exceeded" not in scene.service.log
    scene.service.start()
    assert [alert["name"] for alert in scene.firing()] == ["TrainingLossNotFinite"]
    again = scene.get(f"{RUN}/risk")
    assert (again["step"], again["state"], again["kind"]) == (
        risk["step"],
        "firing",
        risk["kind"],
    )
    with scene.client as client:
        calm = [record(step, 2.8) for step in range(HEALTHY + 4, HEALTHY + 30)]
        assert put_records(client, scene.run_id, scene.launch, 2000, calm).is_success
    wait_until(lambda: scene.firing() == [], 30)
    wait_until(lambda: len(scene.receiver.bodies()) == before + 1)
    assert str(scene.receiver.bodies()[-1]["title"]).startswith("[resolved]")
