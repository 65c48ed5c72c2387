"""A real Prometheus that scrapes a service every second."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml
from dashboards.build import FOLDER
from dashboards.configs import prometheus_config

from tests.dashboards.service import Service

__all__ = ["Labels", "Prometheus", "Vector", "labels", "running_prometheus", "wait"]

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]

_OF_SCRAPE = ("__name__", "job", "instance", "project", "run")


def labels(**given: str) -> Labels:
    """A key of a `Vector`."""
    return frozenset(given.items())


@dataclass(frozen=True)
class Prometheus:
    client: httpx.Client

    def ask(self, expression: str) -> Vector:
        """An instant query; labels of the scrape, project and run are left out."""
        answer = self.client.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        result = answer.json()["data"]
        if result["resultType"] == "scalar":
            return {labels(): float(result["result"][1])}
        found: Vector = {}
        for sample in result["result"]:
            metric = {k: v for k, v in sample["metric"].items() if k not in _OF_SCRAPE}
            found[frozenset(metric.items())] = float(sample["value"][1])
        return found

    def alerts(self) -> set[tuple[str, str]]:
        answer = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {(a["labels"]["alertname"], a["state"]) for a in answer}


@contextmanager
def running_prometheus(
    folder: Path,
    service: Service,
    *,
    rules: Path = FOLDER / "prometheus/rules/foreshock.yml",
    alertmanager: str | None = None,
) -> Generator[Prometheus]:
    """Start Debian's Prometheus with our configuration and runbook, and end it.

    Args:
        folder: For data and log.
        service: What it scrapes.
        rules: File of rules.
        alertmanager: Host and port of what it tells.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = prometheus_config(
        target=service.address.removeprefix("http://"),
        rule_files=[str(rules)],
        token_file=None,
        alertmanager=alertmanager,
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
                f"--web.console.templates={FOLDER / 'prometheus/consoles'}",
                # What it sends before it knows its Alertmanager is lost, and the next in a minute.
                "--rules.alert.resend-delay=1s",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            wait("Prometheus", lambda: _ready(client))
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(15)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
