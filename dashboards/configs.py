"""Configuration of Prometheus and Alertmanager: what is scraped, who is told, what hides what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from dashboards.rules import WATCHDOG

from foreshock.api.alert_log import ALERT_NAMES
from foreshock.api.alert_model import OUTRANKS, AlertKind
from foreshock.api.exposition import most_series

__all__ = ["SCRAPE_INTERVAL", "alertmanager_config", "prometheus_config"]

SCRAPE_INTERVAL: Final = "5s"

_SERVICE: Final = "Foreshock(ForecastsLate|AnalysisFailing|AlertsUndelivered)"


def prometheus_config(
    *,
    target: str = "api:8420",
    rule_files: Sequence[str] = ("rules/*.yml",),
    token_file: str | None = "/etc/foreshock/token",
    alertmanager: str | None = "alertmanager:9093",
    scrape_interval: str = SCRAPE_INTERVAL,
) -> dict[str, Any]:
    """prometheus.yml.

    Args:
        target: Host and port of the service.
        rule_files: Patterns, from the file's own folder.
        token_file: File with the service's token; None for a service without one.
        alertmanager: Host and port; None for none.
        scrape_interval: Also how often rules are evaluated.
    """
    service: dict[str, Any] = {
        "job_name": "foreshock",
        # The service keeps below it by itself; another target by mistake does not.
        "sample_limit": most_series(),
        "label_limit": 20,
        "label_value_length_limit": 512,
        "static_configs": [{"targets": [target]}],
    }
    if token_file is not None:
        service["authorization"] = {"credentials_file": token_file}
    jobs = {
        "job_name": "foreshock-job",
        # Of jobs with a PrometheusSink: {"targets": ["node-1:9401"]} in a file, read as it changes.
        "file_sd_configs": [{"files": ["jobs/*.json"]}],
        "sample_limit": 10_000,
    }
    config: dict[str, Any] = {
        "global": {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval},
        "rule_files": list(rule_files),
        "scrape_configs": [service, jobs, _static("prometheus", "localhost:9090")],
    }
    if alertmanager is not None:
        managers = [{"static_configs": [{"targets": [alertmanager]}]}]
        config["alerting"] = {"alertmanagers": managers}
        config["scrape_configs"].append(_static("alertmanager", alertmanager))
    return config


def _static(job: str, target: str) -> dict[str, Any]:
    return {"job_name": job, "static_configs": [{"targets": [target]}]}


def alertmanager_config(
    *,
    receivers: Sequence[dict[str, Any]] = ({"name": "people"}, {"name": "deadman"}),
    group_wait: str = "5s",
    group_interval: str = "1m",
    templates: Sequence[str] = ("*.tmpl",),
) -> dict[str, Any]:
    """alertmanager.yml: one notification per run; the worse alert hides the lesser one.

    Args:
        receivers: `people`, and `deadman` for what is to call when alerts stop coming.
        group_wait: How long the first alert of a run waits for others.
        group_interval: How long what joins it later waits.
        templates: Patterns, from the file's own folder.
    """
    watchdog = {
        "receiver": "deadman",
        "matchers": [f'alertname="{WATCHDOG}"'],
        "group_wait": "0s",
        "group_interval": group_interval,
        # Often, for it is the silence that tells.
        "repeat_interval": group_interval,
    }
    hints = {"receiver": "people", "matchers": ['severity="info"'], "repeat_interval": "24h"}
    return {
        "templates": list(templates),
        "route": {
            "receiver": "people",
            "group_by": ["project", "run"],
            "group_wait": group_wait,
            "group_interval": group_interval,
            "repeat_interval": "4h",
            "routes": [watchdog, hints],
        },
        "inhibit_rules": [
            *(_hides_of_run(worse, lesser) for worse, lesser in OUTRANKS.items()),
            # `cluster`, where Prometheus adds it, keeps several services apart.
            _hides('alertname="ForeshockDown"', 'alertname=~"Training.+"', ["cluster"]),
            _hides('alertname="ForeshockDown"', f'alertname=~"{_SERVICE}"', ["cluster"]),
        ],
        "receivers": list(receivers),
    }


def _hides_of_run(worse: AlertKind, lesser: Sequence[AlertKind]) -> dict[str, Any]:
    names = "|".join(ALERT_NAMES[kind] for kind in lesser)
    source = f'alertname="{ALERT_NAMES[worse]}"'
    return _hides(source, f'alertname=~"{names}"', ["project", "run"])


def _hides(source: str, target: str, equal: Sequence[str]) -> dict[str, Any]:
    return {"source_matchers": [source], "target_matchers": [target], "equal": list(equal)}
