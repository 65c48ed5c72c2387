"""Writes every dashboard, rule and configuration file below `dashboards/`; their only source.

Run `make dashboards` after a change and commit what it writes; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from dashboards.alert_template import TEMPLATE
from dashboards.configs import SCRAPE_INTERVAL, alertmanager_config, prometheus_config
from dashboards.fleet_dashboard import fleet_dashboard
from dashboards.infinity import PLUGIN
from dashboards.numerics_dashboard import numerics_dashboard
from dashboards.rule_tests import rule_tests
from dashboards.rules import rules
from dashboards.run_dashboard import run_dashboard
from dashboards.runbook_page import runbook_page

__all__ = ["DASHBOARDS", "files", "write"]

FOLDER: Final = Path(__file__).resolve().parent
DASHBOARDS: Final = (fleet_dashboard, run_dashboard, numerics_dashboard)
_NOTE: Final = "# Written by `make dashboards`; change dashboards/*.py, not this file.\n"


def files() -> Mapping[str, str]:
    """Path below `dashboards/` and text of every file."""
    boards = [make() for make in DASHBOARDS]
    return {
        f"grafana/dashboards/{board['uid']}.json": json.dumps(board, indent=2) + "\n"
        for board in boards
    } | {
        "grafana/provisioning/dashboards/foreshock.yaml": _yaml(_dashboard_provider()),
        "grafana/provisioning/datasources/foreshock.yaml": _yaml(_datasources()),
        "prometheus/prometheus.yml": _yaml(prometheus_config()),
        "prometheus/rules/foreshock.yml": _yaml(rules()),
        "prometheus/tests/foreshock.yml": _yaml(rule_tests()),
        "prometheus/consoles/runbook.html": runbook_page(),
        "alertmanager/alertmanager.yml": _yaml(alertmanager_config()),
        "alertmanager/foreshock.tmpl": TEMPLATE,
        "../api/foreshock/api/page/runbook.html": runbook_page(),
    }


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all files below `folder` and say which."""
    written = []
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _dashboard_provider() -> dict[str, Any]:
    provider = {
        "name": "foreshock",
        "type": "file",
        "folder": "foreshock",
        "allowUiUpdates": False,
        "updateIntervalSeconds": 30,
        "options": {"path": "/var/lib/grafana/dashboards"},
    }
    return {"apiVersion": 1, "providers": [provider]}


def _datasources() -> dict[str, Any]:
    ours = {
        "name": "Prometheus",
        "uid": "foreshock-prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "http://prometheus:9090",
        "isDefault": True,
        "jsonData": {"httpMethod": "POST", "timeInterval": SCRAPE_INTERVAL},
    }
    alertmanager = {
        "name": "Alertmanager",
        "uid": "foreshock-alertmanager",
        "type": "alertmanager",
        "access": "proxy",
        "url": "http://alertmanager:9093",
        "jsonData": {"implementation": "prometheus"},
    }
    # A token that only reads: whoever may look at a dashboard may send any query of their own.
    service = {
        "name": "foreshock",
        "uid": "foreshock-service",
        "type": PLUGIN,
        "access": "proxy",
        "url": "http://api:8420",
        "jsonData": {"auth_method": "bearerToken", "allowedHosts": ["http://api:8420"]},
        "secureJsonData": {"bearerToken": "$__file{/etc/foreshock/token}"},
    }
    return {"apiVersion": 1, "prune": True, "datasources": [ours, alertmanager, service]}


def _yaml(document: Mapping[str, Any]) -> str:
    return _NOTE + yaml.safe_dump(document, sort_keys=False, width=100, allow_unicode=True)


if __name__ == "__main__":
    for path in write():
        print(path.resolve().relative_to(FOLDER.parent))
