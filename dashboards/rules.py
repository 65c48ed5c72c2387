"""Prometheus's recording and alerting rules.

Alert names and severities come from the service's alert log: the service's own alert and the rule
for the same thing must carry the same labels. Holds no threshold for the risk. Writes no file.
"""

from __future__ import annotations

from typing import Any, Final

from foreshock.api.alert_log import ALERT_NAMES, SEVERITIES, AlertKind
from foreshock.api.exposition import METRICS

__all__ = ["RUNBOOK", "WATCHDOG", "alert_rules", "rules"]

RUNBOOK: Final = "{{ $externalURL }}/consoles/runbook.html"
"""Start of every runbook link: Prometheus, which has just told of the alert, has the page too."""

WATCHDOG: Final = "Watchdog"
"""Fires always: whoever does not get it any more knows that alerts do not arrive."""

_LAG_SECONDS: Final = 30
_OVERHEAD: Final = 0.1
_RUN: Final = "{{ $labels.run }} (project {{ $labels.project }})"


def rules() -> dict[str, Any]:
    """Recording and alerting rules."""
    return {
        "groups": [
            {"name": "foreshock-recorded", "rules": _recorded_rules()},
            {
                "name": "foreshock-alerts",
                "rules": [*_run_alerts(), *_service_alerts(), *_delivery_alerts()],
            },
        ]
    }


def alert_rules() -> list[dict[str, Any]]:
    """The alerting ones alone."""
    found: list[dict[str, Any]] = rules()["groups"][1]["rules"]
    return found


def _recorded_rules() -> list[dict[str, str]]:
    state = "max by (project, run, state) (foreshock_run_state)"
    return [
        _recorded("project_run_horizon", "foreshock_divergence_risk_ratio"),
        _remembered("project_run_kind", "foreshock_alert_firing"),
        _recorded("project_run_kind", "foreshock_alert_muted"),
        _recorded("project_run", "foreshock_at_risk_seconds"),
        {
            "record": "project_state:foreshock_run_state:sum",
            "expr": f"sum by (project, state) ({state})",
        },
        _quantile("foreshock_scoring_seconds"),
        _quantile("foreshock_risk_delay_seconds"),
        _quantile("foreshock_alert_delivery_seconds"),
    ]


def _recorded(level: str, name: str) -> dict[str, str]:
    # Over instances: a service that moved to another address must not make two of one run.
    labels = ", ".join(METRICS[name].labels)
    return {"record": f"{level}:{name}:max", "expr": f"max by ({labels}) ({name})"}


def _remembered(level: str, name: str) -> dict[str, str]:
    """As `_recorded`, for five minutes longer than the service answers.

    A service that dies must not make its runs' alerts look resolved: `ForeshockDown` comes first,
    and hides them.
    """
    labels = ", ".join(METRICS[name].labels)
    expression = f"max by ({labels}) (last_over_time({name}[5m]))"
    return {"record": f"{level}:{name}:max", "expr": expression}


def _quantile(name: str) -> dict[str, str]:
    """The 95th percentile of a histogram over five minutes, per service."""
    assert METRICS[name].kind == "histogram", name
    rate = f"sum by (job, instance, le) (rate({name}_bucket[5m]))"
    return {
        "record": f"job_instance:{name}:p95_5m",
        "expr": f"histogram_quantile(0.95, {rate})",
    }


def _run_alerts() -> list[dict[str, Any]]:
    return [
        _firing(
            "forecast",
            "{{ $labels.run }}: the loss is likely to diverge",
            f"The forecaster expects the loss of {_RUN} to start diverging. Cause and layers are "
            "on the run's page.",
        ),
        _firing(
            "detection",
            "{{ $labels.run }}: the loss is diverging",
            f"The loss of {_RUN} is rising for good.",
        ),
        _firing(
            "nonfinite",
            "{{ $labels.run }}: the loss is not finite",
            f"The loss of {_RUN} is NaN or infinite: steps from here on are lost.",
        ),
        _firing(
            "silence",
            "{{ $labels.run }}: no records",
            f"{_RUN} has sent nothing for far longer than it usually does, and did not say that "
            "it is over: it died, hangs, or cannot reach the service.",
        ),
        _alert(
            "TrainingRecordsDropped",
            "max by (project, run) (increase(foreshock_records_dropped_total[10m])) > 0",
            "warning",
            "{{ $labels.run }}: the monitor dropped records",
            f"The monitor of {_RUN} dropped records in the last ten minutes; its forecasts rest "
            "on what is left.",
        ),
        _alert(
            "TrainingMonitorSlow",
            "max by (project, run) (avg_over_time(foreshock_monitor_overhead_ratio[15m])) "
            f"> {_OVERHEAD}",
            "info",
            "{{ $labels.run }}: monitoring takes {{ $value | humanizePercentage }} of a step",
            f"The monitor of {_RUN} takes {{{{ $value | humanizePercentage }}}} of its step time.",
            hold="15m",
        ),
    ]


def _service_alerts() -> list[dict[str, Any]]:
    return [
        _alert(
            "ForeshockDown",
            'up{job="foreshock"} == 0 or absent(up{job="foreshock"})',
            "critical",
            "foreshock does not answer",
            "Prometheus cannot scrape the foreshock service: no run is being watched.",
            hold="2m",
        ),
        _alert(
            "ForeshockForecastsLate",
            f"job_instance:foreshock_risk_delay_seconds:p95_5m > {_LAG_SECONDS}",
            "warning",
            "foreshock's forecasts come late",
            "Of the records of the last five minutes one in twenty waited "
            "{{ $value | humanizeDuration }} or longer for its risk.",
            hold="5m",
        ),
        _alert(
            "ForeshockAnalysisFailing",
            "increase(foreshock_analysis_errors_total[10m]) > 0",
            "warning",
            "foreshock's live analysis fails",
            "The service at {{ $labels.instance }} could not score or diagnose something in the "
            "last ten minutes; its log says what.",
        ),
    ]


def _delivery_alerts() -> list[dict[str, Any]]:
    failed = _deliveries('outcome!="delivered"')
    delivered = _deliveries('outcome="delivered"')
    return [
        _alert(
            "ForeshockAlertsUndelivered",
            f"{failed} unless {delivered}",
            "critical",
            "alerts do not arrive at {{ $labels.channel }}",
            "For 15 minutes the service has tried to deliver alerts to {{ $labels.channel }} and "
            "none arrived: people there do not know what this Alertmanager knows.",
            hold="1m",
        ),
        _alert(
            "AlertmanagerNotificationsFailing",
            "sum by (job, instance, integration) "
            "(increase(alertmanager_notifications_failed_total[10m])) > 0",
            "critical",
            "Alertmanager cannot notify through {{ $labels.integration }}",
            "Notifications through {{ $labels.integration }} failed in the last ten minutes.",
        ),
        _alert(
            "PrometheusRulesFailing",
            "increase(prometheus_rule_evaluation_failures_total[10m]) > 0",
            "critical",
            "Prometheus cannot evaluate rules",
            "Rules of {{ $labels.rule_group }} failed in the last ten minutes: alerts may be "
            "missing.",
        ),
        _alert(
            WATCHDOG,
            "vector(1)",
            "none",
            "alerts arrive",
            "Fires always. Route it to something that calls you when it stops coming.",
        ),
    ]


def _deliveries(outcome: str) -> str:
    name = "foreshock_alert_deliveries_total"
    return f"sum by (job, instance, channel) (increase({name}{{{outcome}}}[15m])) > 0"


def _firing(kind: AlertKind, summary: str, description: str) -> dict[str, Any]:
    """The rule for what the service alerts on too: same name, same labels, so one notification.

    It follows the service's state and holds no threshold of its own: that comes with the
    forecaster's artifact, from an alarm budget. It waits a little, for the service's own alert says
    more: who reads the first notification shall have its words.
    """
    expression = f'project_run_kind:foreshock_alert_firing:max{{kind="{kind}"}}'
    return _alert(
        ALERT_NAMES[kind],
        f"max by (project, run) ({expression}) == 1",
        SEVERITIES[kind],
        summary,
        description,
        hold="30s",
    )


def _alert(
    name: str,
    expression: str,
    severity: str,
    summary: str,
    description: str,
    *,
    hold: str | None = None,
) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        **({} if hold is None else {"for": hold}),
        "labels": {"severity": severity},
        "annotations": {
            "summary": summary,
            "description": description,
            "runbook_url": f"{RUNBOOK}#{name.lower()}",
        },
    }
