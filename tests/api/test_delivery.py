"""Alerts arrive: at a real webhook receiver, at a real Alertmanager, once, and after troubles."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from foreshock.api.alert_log import Alert, AlertLog, Transition
from foreshock.api.channel_apprise import AppriseChannel
from foreshock.api.channels import (
    AlertmanagerChannel,
    Channel,
    DeliveryError,
)
from foreshock.api.delivery import Delivery
from foreshock.api.registry import Registry
from tests.api.live_helpers import SUBJECT, content, receiver_process, risk, wait_until


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry.sqlite")
    yield registry
    registry.close()


def fire(log: AlertLog, step: int = 3) -> None:
    log.follow(SUBJECT, risk(step, "firing", "forecast", 0.6), lambda: content(step))


def resolve(log: AlertLog, step: int = 9) -> None:
    log.follow(SUBJECT, risk(step), lambda: content(step))


@contextmanager
def delivering(
    registry: Registry,
    log: AlertLog,
    channels: Sequence[Channel],
    remind_after: timedelta | None = None,
) -> Iterator[Delivery]:
    delivery = Delivery(registry, log, channels, first_wait=0.05, remind_after=remind_after)
    delivery.start()
    try:
        yield delivery
    finally:
        delivery.stop()


def all_delivered(log: AlertLog) -> bool:
    (alert,) = log.find()
    messages = log.delivered([alert.id])[alert.id]
    return bool(messages) and all(message["delivered_at"] for message in messages)


class FlakyChannel:
    """Fails the first times, then keeps what it got."""

    name = "flaky"
    resend_seconds = None
    silencer = None

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.got: list[tuple[str, int]] = []

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise DeliveryError("not today")
        self.got += [(transition, alert.id) for alert in alerts]


def test_the_webhook_gets_the_alert_with_cause_layer_and_remedy(
    registry: Registry, tmp_path: Path
) -> None:
    with receiver_process(tmp_path) as receiver:
        channel = AppriseChannel(receiver.url, page="http://localhost:8420")
        log = AlertLog(registry, [channel.name])
        with delivering(registry, log, [channel]) as delivery:
            fire(log)
            delivery.wake()
            wait_until(lambda: len(receiver.bodies()) == 1)
            resolve(log)
            delivery.wake()
            wait_until(lambda: len(receiver.bodies()) == 2)
        first, second = receiver.bodies()
    assert first["title"] == "[firing] TrainingDivergenceRisk llama"
    message = str(first["message"])
    for fact in (
        "run: llama",
        "cause: learning_rate",
        "layers: blocks.3.mlp.down",
        "lower the learning rate",
        f"http://localhost:8420/?run={SUBJECT.run_id}",
    ):
        assert fact in message
    assert str(second["title"]).startswith("[resolved]")
    assert first["type"] == "warning"


def test_a_restart_sends_nothing_twice(registry: Registry, tmp_path: Path) -> None:
    with receiver_process(tmp_path) as receiver:
        channel = AppriseChannel(receiver.url)
        log = AlertLog(registry, [channel.name])
        with delivering(registry, log, [channel]) as delivery:
            fire(log)
            delivery.wake()
            wait_until(lambda: all_delivered(log))
        again = AlertLog(registry, [channel.name])
        with delivering(registry, again, [channel]) as delivery:
            fire(again, 4)
            resolve(again)
            delivery.wake()
            wait_until(lambda: len(receiver.bodies()) == 2)
        titles = [str(body["title"]).split()[0] for body in receiver.bodies()]
    assert titles == ["[firing]", "[resolved]"]


def test_an_alert_that_nobody_took_goes_out_after_the_restart(registry: Registry) -> None:
    channel = FlakyChannel(0)
    log = AlertLog(registry, [channel.name])
    fire(log)
    resolve(log)
    with delivering(registry, AlertLog(registry, [channel.name]), [channel]):
        wait_until(lambda: len(channel.got) == 2)
    assert [transition for transition, _ in channel.got] == ["firing", "resolved"]


def test_failures_are_tried_again_and_told(registry: Registry) -> None:
    channel = FlakyChannel(2)
    log = AlertLog(registry, [channel.name])
    outcomes: list[tuple[str, str, bool]] = []
    delivery = Delivery(
        registry,
        log,
        [channel],
        count=lambda channel, outcome, seconds: outcomes.append(
            (channel, outcome, seconds is not None)
        ),
        first_wait=0.02,
    )
    fire(log)
    delivery.start()
    wait_until(lambda: all_delivered(log))
    delivery.stop()
    failed = ("flaky", "failed", False)
    assert outcomes == [failed, failed, ("flaky", "delivered", True)]
    (message,) = log.delivered([1])[1]
    assert (message["tries"], message["error"]) == (3, None)


def test_a_dead_receiver_holds_nobody_up(registry: Registry) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = AppriseChannel(f"json://127.0.0.1:{unused.getsockname()[1]}/")
        fine = FlakyChannel(0)
        log = AlertLog(registry, [dead.name, fine.name])
        with delivering(registry, log, [dead, fine]) as delivery:
            fire(log)
            delivery.wake()
            wait_until(lambda: len(fine.got) == 1)
            wait_until(lambda: any(m["error"] for m in log.delivered([1])[1]))


def test_names_of_channels_hold_no_secret() -> None:
    channel = AppriseChannel("json://user:secret@127.0.0.1:1/hook?token=secret")
    assert "secret" not in channel.name
    assert "secret" not in repr(channel)


@pytest.mark.parametrize("url", ["nonsense", "nosuchservice://x", ""])
def test_an_unknown_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="json://"):
        AppriseChannel(url)


def test_a_firing_alert_is_sent_to_alertmanager_again_and_again(registry: Registry) -> None:
    class Counting(FlakyChannel):
        resend_seconds = 0.05  # type: ignore[assignment]

    channel = Counting(0)
    log = AlertLog(registry, [channel.name])
    with delivering(registry, log, [channel]) as delivery:
        fire(log)
        delivery.wake()
        wait_until(lambda: len(channel.got) >= 4)
        resolve(log)
        delivery.wake()
        wait_until(lambda: ("resolved", 1) in channel.got)
        sent = len(channel.got)
        threading.Event().wait(0.3)
    assert len(channel.got) == sent


@pytest.mark.debian
def test_a_real_alertmanager_shows_firing_then_resolved(registry: Registry, tmp_path: Path) -> None:
    if shutil.which("prometheus-alertmanager") is None:
        pytest.skip("needs Debian's prometheus-alertmanager")
    with alertmanager(tmp_path) as url:
        channel = AlertmanagerChannel(url, page="http://localhost:8420", resend_seconds=0.2)
        log = AlertLog(registry, [channel.name])
        with delivering(registry, log, [channel]) as delivery:
            fire(log)
            delivery.wake()
            wait_until(lambda: len(active(url)) == 1)
            (alert,) = active(url)
            assert alert["labels"] == {
                "alertname": "TrainingDivergenceRisk",
                "project": "default",
                "run": "llama",
                "severity": "warning",
            }
            assert alert["annotations"]["cause"] == "learning_rate"
            assert alert["generatorURL"].endswith(SUBJECT.run_id)
            resolve(log)
            delivery.wake()
            wait_until(lambda: active(url) == [])
            wait_until(lambda: all_delivered(log))


def active(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/api/v2/alerts?active=true", timeout=5) as answer:
        return list(json.load(answer))


@contextmanager
def alertmanager(folder: Path) -> Iterator[str]:
    """Debian's Alertmanager on a free port, without a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = folder / "alertmanager.yml"
    config.write_text("route: {receiver: nobody}\nreceivers: [{name: nobody}]\n")
    process = subprocess.Popen(
        [
            "prometheus-alertmanager",
            f"--config.file={config}",
            f"--storage.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return active(url) == []
        except OSError:
            return False

    try:
        wait_until(ready, 20)
        yield url
    finally:
        process.terminate()
        process.wait(10)
