"""`foreshock.monitor.Client` against a real service: every operation, and the same numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from docs.openapi import document

from foreshock.api.diagnosis import Cause
from foreshock.api.paging import write_cursor
from foreshock.api.precision_advice import precision_advice
from foreshock.monitor import Client
from foreshock.monitor.client import ClientError, Diagnosis, InvalidRequest, NotFound
from foreshock.monitor.record import Event, records_to_table, table_to_records
from tests.api.live_helpers import record, wait_until
from tests.api.service import Service, new_launch

STEPS = 40
LAYER = "blocks.1.mlp.down"


def test_no_operation_is_without_a_method() -> None:
    """A new operation of the service needs a method of the client."""
    described = {
        operation["operationId"]
        for path in json.loads(document())["paths"].values()
        for operation in path.values()
    }
    methods = (getattr(Client, name) for name in dir(Client) if not name.startswith("_"))
    called = {method.operation for method in methods if hasattr(method, "operation")}
    assert called == described


OUTLIER = Cause(
    name="outlier",
    probability=0.9,
    layers=("blocks.1.mlp.down",),
    role="input",
    statistic="channel_kurtosis",
    since_step=2,
    evidence="one channel runs ahead",
    remedy="smooth it",
    source="",
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service that was fed by the client alone: healthy, then without a loss."""
    service = Service(tmp_path_factory.mktemp("client"))
    service.start()
    with Client(service.url, project="lab") as made:
        launch = new_launch()
        began = made.announce("llama", launch, config={"depth": 4}, layers=[LAYER], world_size=2)
        assert made.announce("llama", launch) == began
        healthy = [record(step, 4.0 - 0.02 * step, kurtosis=3.0) for step in range(STEPS)]
        receipt = made.put_batch("llama", f"{launch}-0-0", healthy)
        assert (receipt.duplicate, receipt.attempts, receipt.records) == (False, (1,), STEPS)
        assert made.put_batch("llama", f"{launch}-0-0", healthy).duplicate
        lost = records_to_table([record(STEPS + n, math.nan) for n in range(3)])
        made.put_batch(began.run_id, f"{launch}-0-1", lost)
        wait_until(lambda: made.risk("llama").step == STEPS + 2, 60)
        yield made
    assert service.stop() == 0, service.log


def test_runs(client: Client) -> None:
    (summary,) = client.runs(project="lab")
    assert (summary.run, summary.last_step, summary.state) == ("llama", STEPS + 2, "firing")
    assert math.isnan(summary.loss or 0.0)
    assert client.runs(name="other") == []
    detail = client.run("llama")
    assert (detail.config, detail.world_size, detail.layers[0]) == ({"depth": 4}, 2, LAYER)
    assert [attempt.last_step for attempt in detail.history] == [STEPS + 2]
    with pytest.raises(NotFound, match="no run 'absent'"):
        client.run("absent")


KINDS = ("checkpoint", "nonfinite", "checkpoint")
TOLD = [
    *((step, kind) for step in (0, 1) for kind in KINDS),
    (2, "restart"),
    *((3, kind) for kind in KINDS),
]


@pytest.fixture
def eventful(client: Client) -> Iterator[str]:
    """A run whose second attempt took its place at step 2."""
    first, second = new_launch(), new_launch()
    run = client.announce("eventful", first).run_id
    told = [
        replace(record(step, 2.0), events=tuple(Event(kind, detail=f"{step}") for kind in KINDS))
        for step in range(4)
    ]
    client.put_batch(run, f"{first}-0-0", told)
    client.announce("eventful", second, first_step=2)
    later = replace(record(2, 2.0), events=(Event("restart", rank=3, layer=LAYER),))
    client.put_batch(run, f"{second}-0-0", [later])
    yield run
    client.delete(run)


def test_recorded_events(client: Client, eventful: str) -> None:
    everything = client.recorded_events("eventful")
    assert [(event.step, event.kind) for event in everything] == TOLD
    restart = everything[6]
    assert (restart.rank, restart.layer, restart.detail) == (3, LAYER, None)
    assert client.recorded_events("eventful", limit=4) == everything[:4]
    checkpoints = client.recorded_events("eventful", kind="checkpoint", first_step=1, attempt=1)
    assert [event.step for event in checkpoints] == [1, 1, 2, 2, 3, 3]
    with pytest.raises(NotFound):
        client.recorded_events(eventful, attempt=9)


def test_recorded_events_a_page_at_a_time(client: Client, eventful: str) -> None:
    found: list[dict[str, Any]] = []
    cursor = None
    path = f"api/v1/runs/{eventful}/events/recorded"
    while True:
        # A record's events are split between pages.
        page = client._http.ask("GET", path, query={"limit": 2, "cursor": cursor})
        found += page.json()["events"]
        cursor = page.json()["next"]
        if cursor is None:
            break
        assert "cursor=" in page.headers["link"]
    assert [(event["step"], event["kind"]) for event in found] == TOLD
    for wrong in ("bm8", write_cursor("alerts", 1, 2)):
        with pytest.raises(InvalidRequest):
            client._http.ask("GET", path, query={"cursor": wrong})
    far = client._http.ask("GET", path, query={"cursor": write_cursor("recorded", 10**40, 0)})
    assert far.json() == {"events": [], "next": None}


def test_series_and_heatmap(client: Client) -> None:
    loss = client.series("llama", "loss")
    assert isinstance(loss, pd.DataFrame)
    assert list(loss.columns) == ["min", "mean", "max", "nonfinite"]
    assert loss.index.tolist() == list(range(STEPS + 3))
    assert loss["mean"][10] == pytest.approx(3.8)
    assert loss["mean"][STEPS:].isna().all()
    assert client.series_table("llama", "loss").num_rows == len(loss)
    kurtosis = client.series("llama", layer=LAYER, statistic="kurtosis", last_step=9)
    assert kurtosis["max"].tolist() == [4.0] * 10
    with pytest.raises(InvalidRequest, match="statistic"):
        client.series("llama", layer=LAYER, statistic="amux")
    heatmap = client.heatmap("llama", "kurtosis")
    assert heatmap.layers[0] == LAYER
    assert heatmap.values.shape == (len(heatmap.layers), len(heatmap.steps))
    assert heatmap.frame().loc[LAYER, 5] == 4.0
    tensors = client.tensors("llama", "kurtosis", limit=3)
    assert tensors["kurtosis"].tolist() == [10.0, 9.0, 8.0]
    assert tensors["step"].tolist() == [STEPS - 1] * 3


def test_two_runs_and_the_forecaster(client: Client) -> None:
    found = client.compare("llama", "llama", statistic="kurtosis")
    assert (found["parted"], found["last_step"]) == (False, STEPS + 2)
    with pytest.raises(NotFound, match="no run 'absent'"):
        client.compare("llama", "absent")
    assert [head["name"] for head in client.forecaster()["heads"]] == ["full", "gradient", "loss"]


def test_records_are_those_that_were_put(client: Client, tmp_path: Path) -> None:
    table = client.records("llama")
    found = table_to_records(table)
    assert [r.step for r in found] == list(range(STEPS + 3))
    assert found[3].scalars["loss"] == pytest.approx(3.94)
    assert client.records("llama", first_step=5, limit=2)["step"].to_pylist() == [5, 6]
    size = client.save_records("llama", tmp_path / "llama.parquet")
    assert (tmp_path / "llama.parquet").stat().st_size == size
    assert pq.read_table(tmp_path / "llama.parquet")["step"].equals(table["step"])
    with pytest.raises(ClientError, match="parquet"):
        client.save_records("llama", tmp_path / "llama.docx")
    with pytest.raises(NotFound):
        client.save_records("absent", tmp_path / "absent.csv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.parquet"]


def test_risk(client: Client) -> None:
    risk = client.risk("llama")
    assert (risk.state, risk.kind, risk.attempt) == ("firing", "detection", 1)
    assert set(risk.probability) == {10, 100, 1000}
    assert all(p is not None or risk.reasons[h] for h, p in risk.probability.items())
    wait_until(lambda: len(client.risk_history("llama").step) == STEPS + 3)
    history = client.risk_history("llama")
    assert history.state[-1] == "firing"
    frame = history.frame()
    assert frame.index[-1] == STEPS + 2
    np.testing.assert_array_equal(frame["probability_100"], history.probability[100])
    again = client.forecast(table_to_records(client.records("llama")))
    assert [answer.state for answer in again] == list(history.state)
    diagnosis = client.diagnosis("llama")
    assert diagnosis.step == STEPS + 2
    assert diagnosis.causes[0].remedy


def test_a_diagnosis_is_read_whole() -> None:
    advice = precision_advice([OUTLIER])
    assert advice is not None
    body = {"step": 3, "causes": [asdict(OUTLIER)], "abstains": False, "precision": asdict(advice)}
    read = Diagnosis.read(json.loads(json.dumps(body)))
    assert (read.step, read.abstains, read.causes[0].layers) == (3, False, OUTLIER.layers)
    assert read.precision is not None
    assert asdict(read.precision) == asdict(advice)
    # A service of before says neither.
    old = Diagnosis.read({"step": None, "causes": []})
    assert (old.abstains, old.precision) == (True, None)


def test_alerts_and_events(client: Client) -> None:
    (alert,) = client.alerts("llama", state="firing")
    assert (alert.kind, alert.fired_step) == ("nonfinite", STEPS)
    assert (alert.world_size, alert.severity) == (2, "critical")
    judged = client.feedback(alert.id, correct=True, note="it was")
    assert (judged.correct, judged.note) == (True, "it was")
    assert client.alerts(limit=1) == [judged]
    rates = {rule["kind"]: rule for rule in client.alert_feedback("llama", days=1)}
    assert (rates["nonfinite"]["right"], rates["nonfinite"]["false_share"]) == (1, 0.0)
    snoozed = client.snooze(alert.id, 3600, note="later").mute
    assert snoozed is not None
    assert (snoozed.decision, snoozed.note) == ("snoozed", "later")
    assert snoozed.until is not None
    assert (snoozed.until - snoozed.at).total_seconds() == pytest.approx(3600, abs=1)
    taken = client.acknowledge(alert.id).mute
    assert taken is not None
    assert (taken.decision, taken.until) == ("acknowledged", None)
    assert client.alert(alert.id).mute == taken
    assert client.unmute(alert.id) == judged
    with pytest.raises(NotFound, match="no alert 9999"):
        client.acknowledge(9999)
    (first, *_) = client.run_events("llama", last_event_id="0-0", seconds=1)
    assert (first.kind, first.data) == ("reset", {"reason": "restart"})
    assert list(client.events(seconds=0.2)) == []


def test_the_page_about_the_client_is_true(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of docs/client.md runs, in order."""
    launch = new_launch()
    with Client(client.url) as other:
        other.announce("llama-1b", launch, layers=[LAYER])
        healthy = [record(step, 4.0 - 0.02 * step, kurtosis=3.0) for step in range(STEPS)]
        other.put_batch("llama-1b", f"{launch}-0-0", healthy)
        wait_until(lambda: other.risk("llama-1b").step == STEPS - 1, 60)
    monkeypatch.setenv("FORESHOCK_URL", client.url)
    monkeypatch.delenv("FORESHOCK_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, "docs/client.md", "exec"), names)
    finally:
        names["client"].close()
    assert names["loss"].index.tolist() == list(range(STEPS))
    assert (tmp_path / "llama-1b.parquet").exists()
    assert (tmp_path / "llama-1b-step-20.zip").exists()


def test_the_service_itself(client: Client) -> None:
    assert client.healthy()
    assert client.ready()
    assert "foreshock_step" in client.metrics()
