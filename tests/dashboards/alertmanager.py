"""A real Alertmanager with our routes and inhibition, and a real webhook behind its receivers."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from dashboards.build import FOLDER
from dashboards.configs import alertmanager_config

from tests.api.live_helpers import Receiver, receiver_process
from tests.dashboards.prometheus import wait

__all__ = ["Alertmanager", "running_alertmanager"]


@dataclass(frozen=True)
class Alertmanager:
    """One that notifies a second after a run's first alert, and each second what changed.

    Attributes:
        url: Base address.
        client: With it.
        receiver: Where its notifications go.
    """

    url: str
    client: httpx.Client
    receiver: Receiver

    def post(self, *alerts: dict[str, str]) -> None:
        """Send alerts with these labels."""
        body = [{"labels": labels, "annotations": {}} for labels in alerts]
        self.client.post("/api/v2/alerts", json=body).raise_for_status()

    def alerts(self, **labels: str) -> list[dict[str, Any]]:
        """Its alerts that have these labels."""
        answer = self.client.get("/api/v2/alerts")
        answer.raise_for_status()
        found: Iterable[dict[str, Any]] = answer.json()
        return [alert for alert in found if labels.items() <= alert["labels"].items()]

    def states(self, **labels: str) -> dict[str, str]:
        """Alert name to active or suppressed."""
        return {a["labels"]["alertname"]: a["status"]["state"] for a in self.alerts(**labels)}

    def notified(self, receiver: str) -> list[dict[str, Any]]:
        """What one of its receivers was told, oldest first."""
        bodies: list[dict[str, Any]] = self.receiver.bodies()
        return [body for body in bodies if body["receiver"] == receiver]


@contextmanager
def running_alertmanager(folder: Path) -> Generator[Alertmanager]:
    """Start Debian's Alertmanager and a receiver process, and end them."""
    with receiver_process(folder) as receiver:
        hook = {"url": f"http://127.0.0.1:{receiver.port}/", "send_resolved": True}
        config = alertmanager_config(
            receivers=[{"name": n, "webhook_configs": [hook]} for n in ("people", "deadman")],
            group_wait="1s",
            group_interval="1s",
            templates=[str(FOLDER / "alertmanager/*.tmpl")],
        )
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with (folder / "alertmanager.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    "prometheus-alertmanager",
                    f"--config.file={folder / 'alertmanager.yml'}",
                    f"--storage.path={folder / 'alertmanager-data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--cluster.listen-address=",
                ],
                stdout=log,
                stderr=log,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=url, timeout=10) as client:
                wait("Alertmanager", lambda: _ready(client))
                yield Alertmanager(url, client, receiver)
        finally:
            process.terminate()
            process.wait(15)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
