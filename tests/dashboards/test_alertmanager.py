"""Our Alertmanager configuration in a real one: what is grouped, what hides what, who is told."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from dashboards.configs import alertmanager_config
from dashboards.rules import WATCHDOG, alert_rules

from tests.dashboards.alertmanager import Alertmanager, running_alertmanager
from tests.dashboards.prometheus import wait

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(
        shutil.which("prometheus-alertmanager") is None, reason="alertmanager is not installed"
    ),
]
SEVERITY = {rule["alert"]: rule["labels"]["severity"] for rule in alert_rules()}


@pytest.fixture
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alertmanager]:
    with running_alertmanager(tmp_path_factory.mktemp("alertmanager")) as manager:
        yield manager


def of_run(name: str, run: str, project: str = "default") -> dict[str, str]:
    labels = {"alertname": name, "severity": SEVERITY[name]}
    return {**labels, "project": project, "run": run}


def of_service(name: str, **more: str) -> dict[str, str]:
    return {"alertname": name, "severity": SEVERITY[name], "job": "foreshock", **more}


def test_a_nan_hides_rise_and_risk_of_its_own_run_only(manager: Alertmanager) -> None:
    hidden = ("TrainingLossDiverging", "TrainingDivergenceRisk")
    manager.post(
        *(of_run(name, "a") for name in ("TrainingLossNotFinite", *hidden)),
        of_run("TrainingRecordsDropped", "a"),
        of_run("TrainingDivergenceRisk", "b"),
        of_run("TrainingDivergenceRisk", "a", project="other"),
    )
    everything = {"TrainingLossNotFinite": "active", "TrainingRecordsDropped": "active"}
    everything |= dict.fromkeys(hidden, "suppressed")
    wait("the inhibition", lambda: manager.states(project="default", run="a") == everything)
    assert manager.states(run="b") == {"TrainingDivergenceRisk": "active"}
    assert manager.states(project="other") == {"TrainingDivergenceRisk": "active"}


def test_a_rise_hides_the_risk(manager: Alertmanager) -> None:
    manager.post(of_run("TrainingLossDiverging", "a"), of_run("TrainingDivergenceRisk", "a"))
    expected = {"TrainingLossDiverging": "active", "TrainingDivergenceRisk": "suppressed"}
    wait("the inhibition", lambda: manager.states(run="a") == expected)


def test_a_service_that_does_not_answer_hides_its_runs_but_not_those_of_another_cluster(
    manager: Alertmanager,
) -> None:
    manager.post(
        of_service("ForeshockDown", cluster="one"),
        of_service("ForeshockForecastsLate", cluster="one"),
        {**of_run("TrainingRunSilent", "a"), "cluster": "one"},
        {**of_run("TrainingLossNotFinite", "b"), "cluster": "one"},
        {**of_run("TrainingRunSilent", "a"), "cluster": "two"},
        {**of_service("PrometheusRulesFailing"), "cluster": "one"},
    )
    expected = {
        "ForeshockDown": "active",
        "ForeshockForecastsLate": "suppressed",
        "TrainingRunSilent": "suppressed",
        "TrainingLossNotFinite": "suppressed",
        "PrometheusRulesFailing": "active",
    }
    wait("the inhibition", lambda: manager.states(cluster="one") == expected)
    assert manager.states(cluster="two") == {"TrainingRunSilent": "active"}


def test_without_clusters_the_service_hides_its_runs_too(manager: Alertmanager) -> None:
    manager.post(of_service("ForeshockDown"), of_run("TrainingRunSilent", "a"))
    expected = {"ForeshockDown": "active", "TrainingRunSilent": "suppressed"}
    wait("the inhibition", lambda: manager.states() == expected)


def test_alerts_of_one_run_come_in_one_notification(manager: Alertmanager) -> None:
    manager.post(
        of_run("TrainingLossNotFinite", "a"),
        of_run("TrainingRecordsDropped", "a"),
        of_run("TrainingRunSilent", "b"),
    )
    wait("both groups", lambda: len(manager.notified("people")) == 2)
    names = {
        body["groupLabels"]["run"]: sorted(a["labels"]["alertname"] for a in body["alerts"])
        for body in manager.notified("people")
    }
    assert names == {
        "a": ["TrainingLossNotFinite", "TrainingRecordsDropped"],
        "b": ["TrainingRunSilent"],
    }


def test_the_watchdog_goes_to_the_dead_man_s_switch_again_and_again_and_to_nobody_else(
    manager: Alertmanager,
) -> None:
    manager.post({"alertname": WATCHDOG, "severity": "none"})
    wait("three beats", lambda: len(manager.notified("deadman")) >= 3)
    assert manager.notified("people") == []


def test_the_watchdog_beats_faster_than_people_are_reminded() -> None:
    route = alertmanager_config()["route"]
    (watchdog,) = (r for r in route["routes"] if r["receiver"] == "deadman")
    assert (watchdog["repeat_interval"], route["repeat_interval"]) == ("1m", "4h")
