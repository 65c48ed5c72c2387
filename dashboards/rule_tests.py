"""Unit tests of the rules, for `promtool test rules`: each alert firing, and not firing.

Only series in and alerts out; nothing here knows how a rule is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dashboards.rules import rules

__all__ = ["rule_tests"]

_RUN: Final = {"project": "default", "run": "llama-1b"}
_SCRAPED: Final = {"job": "foreshock", "instance": "api:8420"}


def rule_tests() -> dict[str, Any]:
    """The file for promtool; series are a sample a minute."""
    return {
        "rule_files": ["../rules/foreshock.yml"],
        "evaluation_interval": "1m",
        "tests": [_forecast(), _detection(), _quiet(), _silent(), _dropped(), _down(), _absent()],
    }


def _forecast() -> dict[str, Any]:
    firing = _expected("TrainingDivergenceRisk", _RUN)
    series = [
        _series("foreshock_alert_firing", "0 0 1 1 1 0 0", **_RUN, kind="forecast"),
        _series("foreshock_alert_firing", "0x6", **_RUN, kind="detection"),
        # The same run, seen through a second address: still one alert.
        _series("foreshock_alert_firing", "0 0 1 1 1 0 0", "old:8420", **_RUN, kind="forecast"),
        # Another run, calm throughout.
        _series("foreshock_alert_firing", "0x6", project="default", run="calm", kind="forecast"),
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
            _at("3m", "TrainingDivergenceRisk", firing),
            _at("3m", "TrainingLossDiverging"),
            _at("6m", "TrainingDivergenceRisk"),
        ],
    }


def _detection() -> dict[str, Any]:
    return {
        "name": "a loss that diverges is critical",
        "interval": "1m",
        "input_series": [
            _series("foreshock_alert_firing", "0 1 1", **_RUN, kind="detection"),
            _series("foreshock_alert_firing", "0x2", **_RUN, kind="forecast"),
        ],
        "alert_rule_test": [
            _at("0m", "TrainingLossDiverging"),
            _at("2m", "TrainingLossDiverging", _expected("TrainingLossDiverging", _RUN)),
            _at("2m", "TrainingDivergenceRisk"),
        ],
    }


def _quiet() -> dict[str, Any]:
    names = [rule["alert"] for rule in rules()["groups"][1]["rules"]]
    return {
        "name": "a healthy run and service fire nothing",
        "interval": "1m",
        "input_series": [
            _series("up", "1x30"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="forecast"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="detection"),
            _series("foreshock_divergence_risk_ratio", "0.02x30", **_RUN, horizon="100"),
            _series("foreshock_alert_firing", "0x30", **_RUN, kind="silence"),
            _series("foreshock_records_dropped_total", "3x30", **_RUN),
        ],
        "alert_rule_test": [_at("25m", name) for name in names],
    }


def _silent() -> dict[str, Any]:
    return {
        "name": "a silent run fires for as long as the service says so",
        "interval": "1m",
        "input_series": [_series("foreshock_alert_firing", "0 1 1 1 0", **_RUN, kind="silence")],
        "alert_rule_test": [
            _at("0m", "TrainingRunSilent"),
            _at("2m", "TrainingRunSilent", _expected("TrainingRunSilent", _RUN)),
            _at("2m", "TrainingDivergenceRisk"),
            _at("5m", "TrainingRunSilent"),
        ],
    }


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


def _expected(
    name: str, labels: Mapping[str, str], said: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """An alert as promtool compares it: all labels and, filled in, all annotations."""
    rule = next(r for r in rules()["groups"][1]["rules"] if r["alert"] == name)
    annotations = rule["annotations"] | dict(said or {})
    for label, value in labels.items():
        annotations = {
            key: text.replace(f"{{{{ $labels.{label} }}}}", value)
            for key, text in annotations.items()
        }
    return {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": annotations}


def _at(time: str, name: str, *expected: Mapping[str, Any]) -> dict[str, Any]:
    return {"eval_time": time, "alertname": name, "exp_alerts": [dict(e) for e in expected]}
