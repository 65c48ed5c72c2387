"""The whole path through real parts: training, spool, HTTP, store, scorer, alert, webhook."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from foreshock.api.labels import label_run
from foreshock.api.scorer import NO_MODEL
from foreshock.api.wire import ARROW
from foreshock.monitor.record import read_stream, table_to_records
from foreshock.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.faults import LearningRateRamp
from foreshock.trainer.loop import RunResult, train
from foreshock.trainer.watched import watched
from tests.api.live_helpers import Receiver, receiver_process, wait_until
from tests.api.service import Service

FAULT_STEP = 100
LAYERS = ("mlp.down", "mlp.up", "mlp.gate", "attention.qkv", "attention.out")

FAILING = RunConfig(
    name="failing",
    model=ModelConfig(architecture="llama3", width=32, layers=2, heads=2),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    schedule=ScheduleConfig(warmup_steps=10),
    data=DataConfig(sequence_length=32, batch_size=4),
    steps=150,
    seed=5,
    fault=LearningRateRamp(start=FAULT_STEP, factor=1.25, limit=1e4),
    tensor_every=2,
)
HEALTHY = replace(FAILING, name="healthy", fault=None)


class Flow:
    """Both runs, trained against one service with one receiver of alerts."""

    def __init__(self, service: Service, receiver: Receiver, spool: Path) -> None:
        self.service = service
        self.receiver = receiver
        self.spool = spool
        threads = torch.get_num_threads()
        # A model this small is slower on more.
        torch.set_num_threads(1)
        self.results = {config.name: self._train(config) for config in (FAILING, HEALTHY)}
        torch.set_num_threads(threads)

    def _train(self, config: RunConfig) -> RunResult:
        return train(config, watch=watched(config, url=self.service.url, spool=self.spool))

    def answer(self, path: str, **parameters: Any) -> httpx.Response:
        with self.service.client() as client:
            response = client.get(f"/api/v1{path}", params=parameters)
        assert response.status_code == 200, response.text
        return response

    def get(self, path: str, **parameters: Any) -> Any:
        return self.answer(path, **parameters).json()

    def risk_steps(self, run: str) -> list[int]:
        return list(self.get(f"/runs/{run}/risk/history", points=10_000)["step"])

    def alerts(self, run: str) -> list[dict[str, Any]]:
        return list(self.get("/alerts", run=run)["alerts"])


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flow]:
    folder = tmp_path_factory.mktemp("flow")
    for name in ("hook", "service", "spool"):
        (folder / name).mkdir()
    with receiver_process(folder / "hook") as receiver:
        service = Service(folder / "service", "--alert-url", receiver.url)
        service.start()
        try:
            flow = Flow(service, receiver, folder / "spool")
            for config in (FAILING, HEALTHY):
                steps = [step.step for step in flow.results[config.name].steps]
                wait_until(lambda n=config.name, s=steps: flow.risk_steps(n) == s, 30)  # type: ignore[misc]
            yield flow
        finally:
            service.stop()


@pytest.mark.parametrize("run", ["failing", "healthy"])
def test_every_step_is_stored_once_and_exactly(flow: Flow, run: str) -> None:
    with flow.service.client() as client:
        body = client.get(f"/api/v1/runs/{run}/records", headers={"Accept": ARROW}).content
    records = table_to_records(read_stream(body))
    trained = flow.results[run].steps
    assert [record.step for record in records] == [step.step for step in trained]
    assert [record.scalars["loss"] for record in records] == pytest.approx(
        [step.loss for step in trained], rel=1e-6, nan_ok=True
    )
    assert [record.scalars["learning_rate"] for record in records] == pytest.approx(
        [step.learning_rate for step in trained]
    )
    measured = [record for record in records if record.tensors]
    assert {record.step % 2 for record in measured} == {0}
    assert {t.identity.role for t in measured[0].tensors} == {"input", "weight", "grad_output"}
    assert {t.identity.format for t in measured[0].tensors} == {"e4m3", "e5m2"}


def test_the_spool_is_empty_once_all_is_acknowledged(flow: Flow) -> None:
    wait_until(lambda: not [p for p in flow.spool.rglob("*.arrow*") if p.stat().st_size])


def test_the_loss_really_rose(flow: Flow) -> None:
    steps = flow.results["failing"].steps
    label = label_run([step.step for step in steps], [step.loss for step in steps])
    assert label.onset is not None
    assert label.onset > FAULT_STEP


def test_the_fault_is_told_to_nobody(flow: Flow) -> None:
    told = flow.get("/runs/failing")["config"]
    assert told["seed"] == FAILING.seed
    assert "fault" not in told
    assert "Ramp" not in str(told)


def test_the_divergence_is_detected_and_the_alert_arrives(flow: Flow) -> None:
    found = [alert for alert in flow.alerts("failing") if alert["kind"] == "detection"]
    assert found
    detected = min(alert["fired_step"] for alert in found)
    assert detected >= FAULT_STEP
    title = "[firing] TrainingLossDiverging failing"
    wait_until(lambda: title in [body["title"] for body in flow.receiver.bodies()], 20)
    message = next(str(b["message"]) for b in flow.receiver.bodies() if b["title"] == title)
    assert "run: failing" in message
    assert "cause: " in message
    assert "remedy: " in message


def test_the_alert_names_layers_of_the_model(flow: Flow) -> None:
    for alert in flow.alerts("failing"):
        for cause in alert["causes"]:
            assert all(layer.split(".", 2)[2] in LAYERS for layer in cause["layers"])


def test_the_healthy_twin_is_left_alone(flow: Flow) -> None:
    assert [a for a in flow.alerts("healthy") if a["kind"] == "detection"] == []
    assert not [b for b in flow.receiver.bodies() if "LossDiverging healthy" in str(b["title"])]


def test_every_step_has_a_risk_or_a_reason(flow: Flow) -> None:
    risk = flow.get("/runs/healthy/risk")
    for horizon, probability in risk["probability"].items():
        assert probability is not None or risk["reasons"][horizon]
    history = flow.get("/runs/failing/risk/history", points=10_000)
    forecast = any(value is not None for value in history["probability"]["100"][:FAULT_STEP])
    assert forecast != (NO_MODEL in risk["reasons"].values())


def test_the_page_of_the_run_reads_what_the_monitor_saw(flow: Flow) -> None:
    names = {"role": "input", "statistic": "headroom_log2", "points": 50}
    heatmap = flow.get("/runs/failing/heatmap", **names)
    assert {layer.split(".", 2)[2] for layer in heatmap["layers"]} == set(LAYERS)
    began = time.monotonic()
    flow.get("/runs/failing/series", name="loss")
    assert time.monotonic() - began < 5
