"""The dashboards hold to dashboard-linter's rules, and each rule would notice if they did not."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards.build import DASHBOARDS
from dashboards.parts import RUN
from dashboards.queries import PanelQuery, annotation_queries, panel_queries

from tests.dashboards.linter import RULES

BOARDS: dict[str, dict[str, Any]] = {board["uid"]: board for board in (m() for m in DASHBOARDS)}
FILLED = dict.fromkeys(
    ("job", "instance", "project", "run", "role", "layer", "format", "first_step", "last_step"), "x"
) | {"__rate_interval": "20s"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("uid", BOARDS)
def test_dashboard_holds_to_the_rule(uid: str, rule: str) -> None:
    assert list(RULES[rule](BOARDS[uid])) == []


def first_query(board: dict[str, Any], **members: Any) -> None:
    next(p for p in board["panels"] if p["type"] == "timeseries")["targets"][0].update(members)


def first_panel(board: dict[str, Any], **members: Any) -> None:
    next(p for p in board["panels"] if p["type"] == "timeseries").update(members)


def variable(board: dict[str, Any], which: str, **members: Any) -> None:
    next(v for v in board["templating"]["list"] if v["name"] == which).update(members)


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "template-datasource-rule": lambda b: variable(b, "prometheus_datasource", name="source"),
    "template-job-rule": lambda b: variable(b, "job", multi=False),
    "template-instance-rule": lambda b: variable(b, "instance", allValue=".*"),
    "template-label-promql-rule": lambda b: variable(b, "run", query={"query": "up"}),
    "template-on-time-change-reload-rule": lambda b: variable(b, "run", refresh=1),
    "panel-datasource-rule": lambda b: first_panel(b, datasource={"uid": "abc"}),
    "panel-title-description-rule": lambda b: first_panel(b, description=""),
    "panel-units-rule": lambda b: first_panel(
        b, fieldConfig={"defaults": {"unit": "binades"}, "overrides": []}
    ),
    "panel-no-targets-rule": lambda b: first_panel(b, targets=[]),
    "target-logql-rule": lambda b: first_query(b, datasource={"type": "loki"}),
    "target-logql-auto-rule": lambda b: first_query(b, datasource={"type": "loki"}),
    "target-promql-rule": lambda b: first_query(b, expr=" "),
    "target-rate-interval-rule": lambda b: first_query(b, expr='rate(x{job=~"$job"}[5m])'),
    "target-job-rule": lambda b: first_query(b, expr='foreshock_loss{instance=~"$instance"}'),
    "target-instance-rule": lambda b: first_query(b, expr="foreshock_loss"),
    "target-counter-agg-rule": lambda b: first_query(b, expr="sum(x_total{})"),
    "uneditable-dashboard": lambda b: b.update(editable=True),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_notices(rule: str) -> None:
    board = copy.deepcopy(BOARDS[RUN])
    BREAKS[rule](board)
    assert list(RULES[rule](board)) != []


@pytest.mark.debian
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_every_expression_is_promql(tmp_path: Path) -> None:
    """Each as a recording rule, which is how promtool parses one."""
    queries = [
        query
        for board in BOARDS.values()
        for query in (*panel_queries(board, FILLED), *annotation_queries(board, FILLED))
        if isinstance(query, PanelQuery)
    ]
    assert len(queries) > 50
    rules = [{"record": f"panel:n{i}", "expr": q.expression} for i, q in enumerate(queries)]
    document = {"groups": [{"name": "panels", "rules": rules}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=none", str(tmp_path / "rules.yml")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
