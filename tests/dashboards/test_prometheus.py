"""A real Prometheus scrapes a real service while a run goes bad; panels show what is stored."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from dashboards.build import FOLDER, PanelQuery, panel_queries, run_dashboard
from dashboards.rules import prometheus_config

from foreshock.api.alert_log import ALERT_NAMES
from foreshock.api.exposition import LAYER_STATISTICS
from foreshock.monitor.record import Event, StepRecord, decode_number
from tests.dashboards.service import Service, running_service
from tests.dashboards.synthetic import ROLES, SyntheticRun, record

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
RUN = "llama-1b"
WINDOW = "8s"
# Forecasts come from a script, so that they are there whatever model is shipped; the rest is real.
SCRIPTED = ("-m", "tests.api.page_service")
QUERIES = list(
    panel_queries(run_dashboard(), rate_interval=WINDOW, variables={"job": "foreshock", "run": RUN})
)

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]


def labels(**given: str) -> Labels:
    return frozenset(given.items())


@dataclass(frozen=True)
class Prometheus:
    client: httpx.Client

    def ask(self, expression: str) -> Vector:
        """An instant query; labels of the scrape are left out."""
        answer = self.client.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        found: Vector = {}
        for sample in answer.json()["data"]["result"]:
            metric = {
                key: value
                for key, value in sample["metric"].items()
                if key not in ("__name__", "job", "instance", "project", "run")
            }
            found[frozenset(metric.items())] = float(sample["value"][1])
        return found

    def alerts(self) -> set[tuple[str, str]]:
        answer = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {(a["labels"]["alertname"], a["state"]) for a in answer}


@contextmanager
def running_prometheus(folder: Path, service: Service) -> Generator[Prometheus]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = prometheus_config(
        target=service.address.removeprefix("http://"),
        rule_files=[str(FOLDER / "prometheus/rules/*.yml")],
        token_file=None,
        alertmanager=None,
        scrape_interval="1s",
    )
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            wait("Prometheus", lambda: ready(client))
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(15)


def ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait(what: str, condition: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Generator[Seen]:
    """What every panel and the store said, while the run was healthy and after it went bad."""
    folder = tmp_path_factory.mktemp("service")
    with (
        running_service(folder, command=SCRIPTED) as service,
        running_prometheus(tmp_path_factory.mktemp("prometheus"), service) as prometheus,
    ):
        run = SyntheticRun(service.client, RUN, onset=40, rise=90)
        feed(run, prometheus, 30)
        early = look(prometheus, service)
        feed(run, prometheus, 90, dropped=7)
        # It waits for its causes, and the rule for the next evaluation.
        alert = ALERT_NAMES["forecast"], "firing"
        wait("the alert", lambda: alert in prometheus.alerts())
        late = look(prometheus, service)
        alerts = prometheus.alerts()
        sent = service.client.get("/metrics").text
        yield Seen(early=early, late=late, alerts=alerts, metrics=sent)


def feed(run: SyntheticRun, prometheus: Prometheus, steps: int, dropped: int = 0) -> None:
    """Send steps over several scrapes, then wait until the last one was scraped and has settled."""
    for _ in range(3):
        run.send(steps // 3)
        time.sleep(1.2)
    if dropped:
        event = Event("dropped", detail=f"{dropped} records: the spool was full")
        last: StepRecord = record(run.next_step, onset=run.onset, rise=run.rise)
        run.put([replace(last, events=(event,))])
        run.next_step += 1
    wait("the last step", lambda: prometheus.ask("foreshock_step") == {labels(): run.next_step - 1})
    # Recording rules and the alerts on them each take an evaluation more.
    time.sleep(3)


@dataclass(frozen=True)
class Look:
    panels: Mapping[str, Vector]
    store: Mapping[str, Vector]


@dataclass(frozen=True)
class Seen:
    early: Look
    late: Look
    alerts: set[tuple[str, str]]
    metrics: str


def look(prometheus: Prometheus, service: Service) -> Look:
    return Look(
        panels={query.expression: prometheus.ask(query.expression) for query in QUERIES},
        store=stored(service.client),
    )


def stored(client: httpx.Client) -> dict[str, Vector]:
    """By metric, what the public API says about the newest step."""
    path = f"/api/v1/runs/{RUN}"
    step = get(client, path)["last_step"]
    found: dict[str, Vector] = {"foreshock_step": {labels(): step}}
    scalars = {
        "foreshock_loss": "loss",
        "foreshock_gradient_norm": "grad_norm",
        "foreshock_learning_rate": "learning_rate",
        "foreshock_step_seconds": "step_seconds",
        "foreshock_monitor_overhead_ratio": "overhead_ratio",
    }
    for metric, name in scalars.items():
        series = get(client, f"{path}/series", name=name, first_step=step)
        found[metric] = {labels(): number(series["mean"][-1])}
    risk = get(client, f"{path}/risk")
    found["foreshock_divergence_risk_ratio"] = {
        labels(horizon=horizon): number(value)
        for horizon, value in risk["probability"].items()
        if value is not None
    }
    found["foreshock_alert_state"] = {labels(): ("ok", "pending", "firing").index(risk["state"])}
    for known in LAYER_STATISTICS:
        worst, layers = tensors(client, path, known.statistic, step)
        found[f"foreshock_{known.suffix}"] = worst
        found[f"foreshock_layer_{known.suffix}"] = layers
    return found


def tensors(client: httpx.Client, path: str, statistic: str, step: int) -> tuple[Vector, Vector]:
    worst: Vector = {}
    layers: Vector = {}
    for role in ROLES:
        heat = get(client, f"{path}/heatmap", statistic=statistic, role=role, first_step=step)
        row = {
            layer: number(values[-1])
            for layer, values in zip(heat["layers"], heat["values"], strict=True)
        }
        pick = min if heat["worst"] == "min" else max
        worst[labels(role=role)] = pick(row.values())
        layers |= {labels(role=role, layer=layer): value for layer, value in row.items()}
    return worst, layers


def get(client: httpx.Client, path: str, **query: str | int) -> Any:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def number(value: object) -> float:
    decoded = decode_number(value, "value")
    assert decoded is not None
    return decoded


def metric_of(query: PanelQuery) -> str:
    return next(
        word
        for word in query.expression.replace("(", " ").replace("{", " ").split()
        if word.startswith("foreshock_")
    )


@pytest.mark.parametrize("query", QUERIES, ids=lambda q: f"{q.panel}: {q.legend}")
def test_every_expression_returns_data_that_changes(seen: Seen, query: PanelQuery) -> None:
    early, late = seen.early.panels[query.expression], seen.late.panels[query.expression]
    assert early, "no data while the run was healthy"
    assert late, "no data after it went bad"
    assert not any(math.isnan(value) for value in late.values())
    if metric_of(query) == "foreshock_scoring_queue_length":
        return  # 0 whenever the service keeps up
    assert early != late


@pytest.mark.parametrize(
    "query",
    [query for query in QUERIES if "rate(" not in query.expression],
    ids=lambda q: f"{q.panel}: {q.legend}",
)
def test_every_gauge_equals_the_stored_value(seen: Seen, query: PanelQuery) -> None:
    metric = metric_of(query)
    if metric == "foreshock_scoring_queue_length":
        assert seen.late.panels[query.expression] == {labels(): 0}
        return
    for moment in (seen.early, seen.late):
        panel, store = moment.panels[query.expression], moment.store[metric]
        if not query.expression.startswith(("topk", "bottomk")):
            assert panel.keys() == store.keys()
        for key, value in panel.items():
            assert value == pytest.approx(store[key], rel=1e-6), (metric, key)


def test_the_worst_layers_are_the_worst_of_all(seen: Seen) -> None:
    for query in QUERIES:
        pick = query.expression.partition("(")[0]
        if pick not in ("topk", "bottomk"):
            continue
        everything = sorted(seen.late.store[metric_of(query)].values(), reverse=pick == "topk")
        shown = sorted(seen.late.panels[query.expression].values(), reverse=pick == "topk")
        assert shown == pytest.approx(everything[:5], rel=1e-6)


def test_rates_follow_what_was_sent(seen: Seen) -> None:
    rates = {q.panel + q.legend: seen.late.panels[q.expression] for q in QUERIES}
    durable, scored = rates["Records per seconddurable"], rates["Records per secondscored"]
    # 91 records in about four seconds, over a window of eight.
    assert 3 < next(iter(durable.values())) < 60
    assert next(iter(scored.values())) == pytest.approx(next(iter(durable.values())), rel=0.5)
    assert next(iter(rates["Records dropped per second{{run}}"].values())) > 0
    assert "foreshock_ingest_records_total 121.0" in seen.metrics
    assert f'foreshock_records_dropped_total{{project="default",run="{RUN}"}} 7.0' in seen.metrics


def test_the_rule_fires_as_the_service_does(seen: Seen) -> None:
    firing = {name for name, state in seen.alerts if state == "firing"}
    assert "TrainingDivergenceRisk" in firing
    assert "TrainingRecordsDropped" in firing
    assert "ForeshockDown" not in firing


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_exposition_is_lint_clean(seen: Seen) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=seen.metrics,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
