"""What is committed below dashboards/ is what build.py writes, and it holds to the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards.build import FOLDER, files, panel_queries, run_dashboard
from dashboards.rules import prometheus_config, rules

from foreshock.api.alert_log import ALERT_NAMES, SEVERITIES
from foreshock.api.exposition import METRICS

ROOT = FOLDER.parent
DASHBOARD = run_dashboard()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [query.expression for query in panel_queries(DASHBOARD, rate_interval="20s")]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.mark.parametrize("name", sorted(files()))
def test_committed_files_are_what_build_writes(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == files()[name], "run: make dashboards"


def test_no_file_stands_beside_the_generated_ones() -> None:
    kept = {
        str(path.relative_to(FOLDER))
        for folder in ("grafana", "prometheus", "alertmanager")
        for path in (FOLDER / folder).rglob("*")
        if path.is_file()
    }
    assert kept == set(files())


def test_every_panel_says_what_it_shows_in_which_unit() -> None:
    for panel in PANELS:
        assert panel["title"], panel
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_dashboard_is_read_only_and_templated() -> None:
    assert DASHBOARD["editable"] is False
    assert DASHBOARD["uid"] == "foreshock-run"
    variables: dict[str, Any] = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "project", "run"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "instance", "project", "run"):
        one = variables[name]
        assert (one["type"], one["multi"], one["allValue"]) == ("query", True, ".+")
        assert one["refresh"] == 2, "follows the time range"
        assert one["label"]


def test_every_selector_carries_job_and_instance() -> None:
    raw = [target["expr"] for panel in PANELS for target in panel["targets"]]
    for expression in raw:
        for selector in re.findall(r"foreshock_\w+(?:\{[^}]*\})?", expression):
            assert 'job=~"$job", instance=~"$instance"' in selector, expression
        assert not re.search(r"\[\d", expression), f"a fixed range in {expression}"


def test_counters_are_rates_and_gauges_are_not() -> None:
    counters = [name for name, spec in METRICS.items() if spec.kind == "counter"]
    for expression in EXPRESSIONS:
        for name in counters:
            if name in expression:
                assert f"rate({name}{{" in expression
        for inside in re.findall(r"rate\((foreshock_\w+)", expression):
            known = METRICS[re.sub(r"_(bucket|sum|count)$", "", inside)]
            assert known.kind != "gauge", expression


def test_every_metric_is_one_of_the_service() -> None:
    text = "\n".join([*EXPRESSIONS, files()["prometheus/rules/foreshock.yml"]])
    for name in set(re.findall(r"(?<![:\w])foreshock_[a-z0-9_]+", text)):
        assert name in METRICS or re.sub(r"_(bucket|sum|count)$", "", name) in METRICS, name


def test_queries_have_no_variable_left() -> None:
    assert not [each for each in EXPRESSIONS if "$" in each]
    chosen = panel_queries(DASHBOARD, rate_interval="20s", variables={"run": "llama-1b"})
    assert any('run=~"llama-1b"' in query.expression for query in chosen)


def test_rules_name_alerts_as_the_service_does() -> None:
    alerts = {rule["alert"]: rule for rule in rules()["groups"][1]["rules"]}
    for kind, name in ALERT_NAMES.items():
        assert alerts[name]["labels"]["severity"] == SEVERITIES[kind]
    for name, rule in alerts.items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        # A value in a label would make a new alert of every sample.
        assert not [text for text in rule["labels"].values() if "{{" in text], name


def test_every_alert_has_a_runbook_entry_and_every_entry_an_alert() -> None:
    headings = re.findall(r"^## (\w+)$", (FOLDER / "runbook.md").read_text(), re.MULTILINE)
    alerts = [rule["alert"] for rule in rules()["groups"][1]["rules"]]
    assert headings == alerts
    for rule in rules()["groups"][1]["rules"]:
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (ROOT / path).is_file()
        assert anchor == rule["alert"].lower()


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    document = yaml.safe_load(files()["prometheus/tests/foreshock.yml"])
    cases = [case for each in document["tests"] for case in each.get("alert_rule_test", [])]
    for rule in rules()["groups"][1]["rules"]:
        found = [bool(c["exp_alerts"]) for c in cases if c["alertname"] == rule["alert"]]
        assert set(found) == {True, False}, rule["alert"]


@pytest.mark.debian
@needs("promtool")
def test_promtool_accepts_rules_and_their_tests() -> None:
    folder = FOLDER / "prometheus"
    for command in (
        ("check", "rules", "rules/foreshock.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "tests/foreshock.yml"),
    ):
        done = run("promtool", *command, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.debian
@needs("promtool")
def test_promtool_reads_the_config_with_a_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    config = prometheus_config(
        token_file=str(tmp_path / "token"), rule_files=[str(FOLDER / "prometheus/rules/*.yml")]
    )
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    done = run("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout


@pytest.mark.debian
@needs("amtool")
def test_amtool_accepts_alertmanager_config() -> None:
    done = run("amtool", "check-config", str(FOLDER / "alertmanager/alertmanager.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_json_is_classic() -> None:
    document = json.loads((FOLDER / "grafana/dashboards/foreshock-run.json").read_text())
    assert document["schemaVersion"] >= 36
    assert "elements" not in document, "the V2 schema cannot be provisioned before Grafana 13"
