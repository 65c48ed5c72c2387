"""Prometheus's rules and configuration, and Alertmanager's.

Alert names and severities come from the service's alert log: the service's own alert and the rule
for the same thing must carry the same labels. Holds no threshold for the risk. Writes no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from foreshock.api.alert_log import ALERT_NAMES, SEVERITIES, AlertKind
from foreshock.api.exposition import METRICS

__all__ = [
    "RUNBOOK",
    "SCRAPE_INTERVAL",
    "alertmanager_config",
    "prometheus_config",
    "rules",
]

RUNBOOK: Final = "dashboards/runbook.md"
"""Start of every runbook link: set it to where your people read the file."""

SCRAPE_INTERVAL: Final = "5s"


def _alert(
    name: str, expression: str, severity: str, summary: str, description: str, **timing: str
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        **timing,
        "labels": {"severity": severity},
        "annotations": {
            "summary": summary,
            "description": description,
            "runbook_url": f"{RUNBOOK}#{name.lower()}",
        },
    }


def _firing(kind: AlertKind, summary: str, description: str) -> dict[str, Any]:
    """The rule for what the service alerts on too: same name, same labels, so one notification.

    It follows the service's state and holds no threshold of its own: that comes with the
    forecaster's artifact, from an alarm budget.
    """
    expression = f'project_run_kind:foreshock_alert_firing:max{{kind="{kind}"}}'
    return _alert(
        ALERT_NAMES[kind],
        f"max by (project, run) ({expression}) == 1",
        SEVERITIES[kind],
        summary,
        description,
    )


def rules() -> dict[str, Any]:
    """Recording and alerting rules."""
    recorded = [
        _recorded("project_run_horizon", "foreshock_divergence_risk_ratio"),
        _recorded("project_run_kind", "foreshock_alert_firing"),
    ]
    alerts = [
        _firing(
            "forecast",
            "{{ $labels.run }}: the loss is likely to diverge",
            "The forecaster expects the loss of {{ $labels.run }} (project {{ $labels.project }}) "
            "to start diverging. Cause and layers are on the run's page.",
        ),
        _firing(
            "detection",
            "{{ $labels.run }}: the loss is diverging",
            "The loss of {{ $labels.run }} (project {{ $labels.project }}) is rising for good, or "
            "is not finite.",
        ),
        _firing(
            "silence",
            "{{ $labels.run }}: no records",
            "{{ $labels.run }} (project {{ $labels.project }}) has sent nothing for far longer "
            "than it usually does, and did not say that it is over: it died, hangs, or cannot "
            "reach the service.",
        ),
        _alert(
            "TrainingRecordsDropped",
            "max by (project, run) (increase(foreshock_records_dropped_total[10m])) > 0",
            "warning",
            "{{ $labels.run }}: the monitor dropped records",
            "The monitor of {{ $labels.run }} (project {{ $labels.project }}) dropped records in "
            "the last ten minutes; its forecasts rest on what is left.",
        ),
        _alert(
            "ForeshockDown",
            'up{job="foreshock"} == 0 or absent(up{job="foreshock"})',
            "critical",
            "foreshock does not answer",
            "Prometheus cannot scrape the foreshock service: no run is being watched.",
            **{"for": "2m"},
        ),
    ]
    return {
        "groups": [
            {"name": "foreshock-recorded", "rules": recorded},
            {"name": "foreshock-alerts", "rules": alerts},
        ]
    }


def _recorded(level: str, name: str) -> dict[str, str]:
    # Over instances: a service that moved to another address must not make two of one run.
    labels = ", ".join(METRICS[name].labels)
    return {"record": f"{level}:{name}:max", "expr": f"max by ({labels}) ({name})"}


def prometheus_config(
    *,
    target: str = "api:8420",
    rule_files: Sequence[str] = ("rules/*.yml",),
    token_file: str | None = "/tmp/foreshock-token",
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
    scrape: dict[str, Any] = {"job_name": "foreshock", "static_configs": [{"targets": [target]}]}
    if token_file is not None:
        scrape["authorization"] = {"credentials_file": token_file}
    config: dict[str, Any] = {
        "global": {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval},
        "rule_files": list(rule_files),
        "scrape_configs": [scrape],
    }
    if alertmanager is not None:
        managers = [{"static_configs": [{"targets": [alertmanager]}]}]
        config["alerting"] = {"alertmanagers": managers}
    return config


def alertmanager_config() -> dict[str, Any]:
    """alertmanager.yml: one notification per run; the worse alert hides the lesser one."""
    return {
        "route": {
            "receiver": "people",
            "group_by": ["project", "run"],
            "group_wait": "5s",
            "group_interval": "1m",
            "repeat_interval": "4h",
        },
        "inhibit_rules": [
            {
                "source_matchers": [f'alertname="{ALERT_NAMES["detection"]}"'],
                "target_matchers": [f'alertname="{ALERT_NAMES["forecast"]}"'],
                "equal": ["project", "run"],
            }
        ],
        "receivers": [{"name": "people"}],
    }
