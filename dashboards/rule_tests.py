"""Unit tests of the rules, for `promtool test rules`: each alert firing, and not firing.

Only series in and alerts out; nothing here knows how a rule is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dashboards.rules import WATCHDOG, alert_rules

__all__ = ["rule_tests"]

_RUN: Final = {"project": "default", "run": "llama-1b"}
_SCRAPED: Final = {"job": "foreshock", "instance": "api:8420"}


def rule_tests() -> dict[str, Any]:
    """The file for promtool; series are a sample a minute."""
    return {
        "rule_files": ["../rules/foreshock.yml"],
        "evaluation_interval": "1m",
        "tests": [
            _forecast(),
            _detection(),
            _nonfinite(),
            _quiet(),
            _silent(),
            _dropped(),
            _slow(),
            _down(),
            _orphaned(),
            _absent(),
            _late(),
            *_troubles(),
            _undelivered(),
        ],
    }


def _forecast() -> dict[str, Any]:
    firing = _expected("TrainingDivergenceRisk", _RUN)
    series = [
        _series("foreshock_alert_firing", "0 0 1 1 1 1 0 0 0", **_RUN, kind="forecast"),
        _series("foreshock_alert_firing", "0x8", **_RUN, kind="detection"),
        # The same run, seen through a second address: still one alert.
        _series("foreshock_alert_firing", "0 0 1 1 1 1 0 0 0", "old:8420", **_RUN, kind="forecast"),
        # Another run, calm throughout.
        _series("foreshock_alert_firing", "0x8", project="default", run="calm", kind="forecast"),
        _series("foreshock_divergence_risk_ratio", "0.1 0.9", **_RUN, horizon="100"),
    ]
    recorded = {
        "expr": "project_run_horizon:foreshock_divergence_risk_ratio:max",
        "eval_time": "1m",
        "exp_samples": [
            {
                "labels": _name(
                    "project_run_horizon:foreshock_divergence_risk_ratio:max",
                    {**_RUN, "horizon": "100"},
                ),
                "value": 0.9,
            }
        ],
    }
    return {
        "name": "a forecast fires once per run, and ends",
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [recorded],
        "alert_rule_test": [
            _at("1m", "TrainingDivergenceRisk"),
            _at("5m", "TrainingDivergenceRisk", firing),
            _at("5m", "TrainingLossDiverging"),
            _at("8m", "TrainingDivergenceRisk"),
        ],
    }


def _detection() -> dict[str, Any]:
    return {
        "name": "a loss that diverges is critical",
        "interval": "1m",
        "input_series": [
            _series("foreshock_alert_firing", "0 1 1 1 1", **_RUN, kind="detection"),
            _series("foreshock_alert_firing", "0x4", **_RUN, kind="forecast"),
        ],
        "alert_rule_test": [
            _at("0m", "TrainingLossDiverging"),
            _at("4m", "TrainingLossDiverging", _expected("TrainingLossDiverging", _RUN)),
            _at("4m", "TrainingDivergenceRisk"),
        ],
    }


def _quiet() -> dict[str, Any]:
    names = [rule["alert"] for rule in alert_rules() if rule["alert"] != WATCHDOG]
    return {
        "name": "a healthy run and service fire nothing",
        "interval": "1m",
        "input_series": [
            _series("up", "1x30"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="forecast"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="detection"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="nonfinite"),
            _series("foreshock_monitor_overhead_ratio", "0.02x30", **_RUN),
            _series("foreshock_analysis_errors_total", "2x30"),
            *_delays("0+60x30", "0+60x30"),
            *_tries("0+1x30", "0+1x30"),
            _series("alertmanager_notifications_failed_total", "1x30", integration="slack"),
            _series("prometheus_rule_evaluation_failures_total", "1x30", rule_group="foreshock"),
            _series("foreshock_divergence_risk_ratio", "0.02x30", **_RUN, horizon="100"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="silence"),
            _series("foreshock_records_dropped_total", "3x30", **_RUN),
        ],
        "alert_rule_test": [
            *(_at("25m", name) for name in names),
            _at("25m", WATCHDOG, _expected(WATCHDOG, {})),
        ],
    }


def _silent() -> dict[str, Any]:
    return {
        "name": "a silent run fires for as long as the service says so",
        "interval": "1m",
        "input_series": [
            _series("foreshock_alert_firing", "0 1 1 1 1 0 0 0", **_RUN, kind="silence")
        ],
        "alert_rule_test": [
            _at("0m", "TrainingRunSilent"),
            _at("4m", "TrainingRunSilent", _expected("TrainingRunSilent", _RUN)),
            _at("4m", "TrainingDivergenceRisk"),
            _at("7m", "TrainingRunSilent"),
        ],
    }


def _nonfinite() -> dict[str, Any]:
    return {
        "name": "a loss that is not finite is critical, and the loss that rose before stays",
        "interval": "1m",
        "input_series": [
            _series("foreshock_alert_firing", "0 1 1 1 1 1", **_RUN, kind="detection"),
            _series("foreshock_alert_firing", "0 0 1 1 1 1", **_RUN, kind="nonfinite"),
        ],
        "alert_rule_test": [
            _at("1m", "TrainingLossNotFinite"),
            _at("5m", "TrainingLossNotFinite", _expected("TrainingLossNotFinite", _RUN)),
            _at("5m", "TrainingLossDiverging", _expected("TrainingLossDiverging", _RUN)),
        ],
    }


def _slow() -> dict[str, Any]:
    name = "TrainingMonitorSlow"
    return {
        "name": "a monitor that takes a quarter of the time is told of, a short spell is not",
        "interval": "1m",
        "input_series": [_series("foreshock_monitor_overhead_ratio", "0.02x9 0.25x45", **_RUN)],
        "alert_rule_test": [
            _at("20m", name),
            _at("50m", name, _expected(name, _RUN, value="25%")),
        ],
    }


def _late() -> dict[str, Any]:
    name = "ForeshockForecastsLate"
    # From the 10th minute on every answer takes between 30 and 60 seconds.
    return {
        "name": "risks that come late are told of",
        "interval": "1m",
        "input_series": _delays("0+60x10 600x30", "0+60x40"),
        "alert_rule_test": [
            _at("9m", name),
            _at("30m", name, _expected(name, _SCRAPED, value="58.5s")),
        ],
    }


def _troubles() -> list[dict[str, Any]]:
    """Counters of failures: told of while they rise, and no longer."""
    cases: tuple[tuple[str, str, dict[str, str]], ...] = (
        ("ForeshockAnalysisFailing", "foreshock_analysis_errors_total", {}),
        (
            "AlertmanagerNotificationsFailing",
            "alertmanager_notifications_failed_total",
            {"integration": "slack"},
        ),
        (
            "PrometheusRulesFailing",
            "prometheus_rule_evaluation_failures_total",
            {"rule_group": "foreshock"},
        ),
    )
    return [_trouble(*case) for case in cases]


def _trouble(name: str, metric: str, labels: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": f"{metric} fires while it rises",
        "interval": "1m",
        "input_series": [_series(metric, "0 0 0 4 4x30", **labels)],
        "alert_rule_test": [
            _at("2m", name),
            _at("5m", name, _expected(name, {**_SCRAPED, **labels})),
            _at("20m", name),
        ],
    }


def _undelivered() -> dict[str, Any]:
    name = "ForeshockAlertsUndelivered"
    return {
        "name": "a receiver that takes nothing is told of, until it takes something",
        "interval": "1m",
        "input_series": _tries("0+1x40", "0x9 0x10 1x20"),
        "alert_rule_test": [
            _at("1m", name),
            _at("10m", name, _expected(name, {**_SCRAPED, "channel": "slack-1"})),
            _at("25m", name),
        ],
    }


def _delays(quick: str, all_: str) -> list[dict[str, str]]:
    name = "foreshock_risk_delay_seconds_bucket"
    return [
        _series(name, quick, le="30"),
        _series(name, all_, le="60"),
        _series(name, all_, le="+Inf"),
    ]


def _tries(failed: str, delivered: str) -> list[dict[str, str]]:
    name, channel = "foreshock_alert_deliveries_total", "slack-1"
    return [
        _series(name, failed, channel=channel, outcome="failed"),
        _series(name, delivered, channel=channel, outcome="delivered"),
    ]


def _dropped() -> dict[str, Any]:
    firing = _expected("TrainingRecordsDropped", _RUN)
    return {
        "name": "dropped records fire while they are recent",
        "interval": "1m",
        "input_series": [_series("foreshock_records_dropped_total", "0 0 0 40 40x30", **_RUN)],
        "alert_rule_test": [
            _at("2m", "TrainingRecordsDropped"),
            _at("5m", "TrainingRecordsDropped", firing),
            _at("20m", "TrainingRecordsDropped"),
        ],
    }


def _down() -> dict[str, Any]:
    return {
        "name": "a service that does not answer fires, after a while",
        "interval": "1m",
        "input_series": [_series("up", "1 1 0 0 0 0 0")],
        "alert_rule_test": [
            _at("1m", "ForeshockDown"),
            _at("3m", "ForeshockDown"),
            _at("5m", "ForeshockDown", _expected("ForeshockDown", _SCRAPED)),
        ],
    }


def _orphaned() -> dict[str, Any]:
    name = "TrainingLossDiverging"
    return {
        "name": "alerts of a service that died end after it was told of, not before",
        "interval": "1m",
        "input_series": [
            _series("foreshock_alert_firing", "1 1 1 1 stale", **_RUN, kind="detection"),
            _series("up", "1 1 1 1 0 0 0 0 0 0 0 0 0 0"),
        ],
        "alert_rule_test": [
            _at("7m", name, _expected(name, _RUN)),
            _at("7m", "ForeshockDown", _expected("ForeshockDown", _SCRAPED)),
            _at("11m", name),
        ],
    }


def _absent() -> dict[str, Any]:
    job = {"job": "foreshock"}
    return {
        "name": "a service that is not even scraped fires too",
        "interval": "1m",
        "input_series": [{"series": 'up{job="something-else"}', "values": "1x5"}],
        "alert_rule_test": [_at("4m", "ForeshockDown", _expected("ForeshockDown", job))],
    }


def _series(metric: str, values: str, instance: str = "", **labels: str) -> dict[str, str]:
    scraped = {**_SCRAPED, "instance": instance or _SCRAPED["instance"]}
    return {"series": _name(metric, {**scraped, **labels}), "values": values}


def _name(metric: str, labels: Mapping[str, str]) -> str:
    pairs = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{metric}{{{pairs}}}"


def _expected(name: str, labels: Mapping[str, str], *, value: str = "") -> dict[str, Any]:
    """An alert as promtool compares it: all labels and, filled in, all annotations."""
    rule = next(r for r in alert_rules() if r["alert"] == name)
    known = {"$externalURL": "", **{f"$labels.{label}": text for label, text in labels.items()}}
    known |= {"$value | humanizePercentage": value, "$value | humanizeDuration": value}
    annotations = rule["annotations"]
    for what, text in known.items():
        annotations = {
            k: said.replace(f"{{{{ {what} }}}}", text) for k, said in annotations.items()
        }
    return {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": annotations}


def _at(time: str, name: str, *expected: Mapping[str, Any]) -> dict[str, Any]:
    return {"eval_time": time, "alertname": name, "exp_alerts": [dict(e) for e in expected]}
