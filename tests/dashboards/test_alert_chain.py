"""The whole chain, once, for real: a run that diverges to a webhook that is called.

Training watched by `watch`, `foreshock serve`, Debian's Prometheus and Alertmanager, a webhook
receiver; only the waits of the rules are cut short. The service's own alert and the rule's are one.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from dashboards.rules import rules

from foreshock.monitor import watch
from tests.dashboards.alertmanager import Alertmanager, running_alertmanager
from tests.dashboards.prometheus import Prometheus, running_prometheus, wait
from tests.dashboards.service import Service, running_service

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("prometheus-alertmanager")),
        reason="prometheus and alertmanager are not installed",
    ),
]
RUN = "diverging"
LOST = "TrainingLossNotFinite"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def impatient_rules(target: Path) -> Path:
    """Ours, but those that wait wait a second."""
    document = rules()
    for rule in document["groups"][1]["rules"]:
        if "for" in rule:
            rule["for"] = "1s"
    target.write_text(yaml.safe_dump(document))
    return target


def train(service: Service, folder: Path) -> None:
    """Fit a line, then raise the rate until the loss is not finite; never says that it is over.

    The record of the last step stays with the monitor, which would send it with the next one.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = torch.randn(64, 16)
    target = data.sum(1, keepdim=True)
    watched = watch(model, optimizer, run=RUN, url=service.address, spool=folder / "spool")
    for step in range(60):
        if step == 45:
            optimizer.param_groups[0]["lr"] = 1e6
        loss = torch.nn.functional.mse_loss(model(data), target)
        watched.log(loss=loss)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.isfinite(loss)
    path = f"/api/v1/runs/{RUN}"
    wait("the records", lambda: (service.client.get(path).json().get("last_step") or 0) >= 58)


@dataclass(frozen=True)
class Chain:
    service: Service
    stop_service: ExitStack
    prometheus: Prometheus
    manager: Alertmanager

    def one(self, name: str) -> dict[str, Any] | None:
        """The alert of the run with this name; two would be a failure of the deduplication."""
        found = self.manager.alerts(alertname=name, run=RUN)
        assert len(found) <= 1, found
        return found[0] if found else None


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """All of them running, and the run over the edge."""
    folder = tmp_path_factory.mktemp("chain")
    port = free_port()
    with ExitStack() as stack, ExitStack() as service_stack:
        manager = stack.enter_context(running_alertmanager(tmp_path_factory.mktemp("manager")))
        environment = {
            "FORESHOCK_ALERTMANAGER_URLS": manager.url,
            "FORESHOCK_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "FORESHOCK_STALE_SECONDS": "5",
            "FORESHOCK_STALE_INTERVALS": "2",
        }
        service = service_stack.enter_context(
            running_service(tmp_path_factory.mktemp("service"), port=port, environment=environment)
        )
        prometheus = stack.enter_context(
            running_prometheus(
                tmp_path_factory.mktemp("prometheus"),
                service,
                rules=impatient_rules(folder / "rules.yml"),
                alertmanager=manager.url.removeprefix("http://"),
            )
        )
        train(service, folder)
        yield Chain(service, service_stack, prometheus, manager)


def test_the_service_s_alert_arrives_first_and_says_all(chain: Chain) -> None:
    wait("the notification", lambda: notified(chain, LOST))
    first = notified(chain, LOST)[0]
    said = first["annotations"]
    assert said["headline"].startswith(f"{RUN}: loss not finite, step ")
    assert "Do: stop the run" in said["description"]
    assert first["labels"] == {
        "alertname": LOST,
        "project": "default",
        "run": RUN,
        "severity": "critical",
    }
    page = httpx.get(said["link"])
    assert page.status_code == 200


def test_the_rule_fires_too_and_it_stays_one_alert(chain: Chain) -> None:
    wait("the rule", lambda: (LOST, "firing") in chain.prometheus.alerts())
    # The service told of it first; from the rule it has the address of a graph.
    rule = f":{chain.prometheus.client.base_url.port}/"
    wait("the rule's", lambda: rule in (chain.one(LOST) or {"generatorURL": ""})["generatorURL"])
    sent = chain.prometheus.client.get("/metrics").text
    errors = [line for line in sent.splitlines() if line.startswith("prometheus_notifications_err")]
    assert all(line.endswith(" 0") for line in errors)
    # However often either sends it: people were told of it under one fingerprint.
    assert len({alert["fingerprint"] for alert in notified(chain, LOST)}) == 1


def test_a_run_that_sends_nothing_any_more_joins_its_group(chain: Chain) -> None:
    wait("the silence", lambda: notified(chain, "TrainingRunSilent"))
    # On a slow machine the run may also be told to be slow, which is for information and apart.
    told = [body for body in chain.manager.notified("people") if about_run(body)]
    told = [body for body in told if body["commonLabels"].get("severity") != "info"]
    (group,) = {body["groupKey"] for body in told}
    assert f'run="{RUN}"' in group
    last = told[-1]
    names = [alert["labels"]["alertname"] for alert in last["alerts"]]
    assert sorted(names) == sorted(set(names))
    assert {LOST, "TrainingRunSilent"} <= set(names)


def test_every_runbook_link_that_was_sent_resolves(chain: Chain) -> None:
    active = chain.prometheus.client.get("/api/v1/alerts").json()["data"]["alerts"]
    links = {alert["annotations"]["runbook_url"] for alert in active}
    links |= {alert["annotations"]["runbook_url"] for alert in notified(chain, LOST)}
    assert len(links) >= 3
    for link in links:
        # Prometheus knows itself by the machine's name, which a test machine need not resolve.
        address, _, anchor = link.partition("#")
        port = httpx.URL(address).port
        page = httpx.get(f"http://127.0.0.1:{port}{httpx.URL(address).path}")
        assert page.status_code == 200, link
        assert f'id="{anchor}"' in page.text, link


def test_the_watchdog_beats_all_the_while(chain: Chain) -> None:
    wait("beats", lambda: len(chain.manager.notified("deadman")) >= 2)


def test_an_acknowledged_alert_is_silenced_at_alertmanager_and_shown_in_metrics(
    chain: Chain,
) -> None:
    client = chain.service.client
    (alert,) = (
        a for a in client.get("/api/v1/alerts?state=firing").json()["alerts"] if a["name"] == LOST
    )
    client.post(f"/api/v1/alerts/{alert['id']}/acknowledge", json={}).raise_for_status()
    wait("the silence", lambda: state_of(chain, LOST) == "suppressed")
    muted = f'project_run_kind:foreshock_alert_muted:max{{run="{RUN}", kind="nonfinite"}}'
    wait("the metric", lambda: list(chain.prometheus.ask(muted).values()) == [1.0])


def test_a_service_that_falls_silent_is_told_of_and_hides_its_runs(chain: Chain) -> None:
    """Last, for it ends the service."""
    chain.stop_service.close()
    wait("the alert", lambda: chain.manager.states(alertname="ForeshockDown"))
    wait("its notification", lambda: notified(chain, "ForeshockDown"))
    silent = chain.one("TrainingRunSilent")
    assert silent is not None, "the service's own alert outlives it for some minutes"
    hidden = "TrainingRunSilent"
    wait("the inhibition", lambda: (chain.one(hidden) or silent)["status"]["inhibitedBy"])


def about_run(body: dict[str, Any]) -> bool:
    return bool(body["groupLabels"].get("run") == RUN)


def notified(chain: Chain, name: str) -> list[dict[str, Any]]:
    """The alerts of this name in all notifications to people, oldest first."""
    bodies = chain.manager.notified("people")
    return [a for body in bodies for a in body["alerts"] if a["labels"]["alertname"] == name]


def state_of(chain: Chain, name: str) -> str:
    alert = chain.one(name)
    return "" if alert is None else str(alert["status"]["state"])
