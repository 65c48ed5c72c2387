"""What is committed below dashboards/ is what build.py writes, and it holds to the rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards.build import DASHBOARDS, FOLDER, files
from dashboards.parts import FLEET, NUMERICS, RUN
from dashboards.queries import PanelQuery, panel_queries, panels
from dashboards.rules import prometheus_config, rules

from foreshock.api.alert_log import ALERT_NAMES, SEVERITIES
from foreshock.api.exposition import METRICS
from foreshock.monitor.record import STATISTICS

ROOT = FOLDER.parent
BOARDS: dict[str, dict[str, Any]] = {board["uid"]: board for board in (m() for m in DASHBOARDS)}
FILLED = dict.fromkeys(
    ("job", "instance", "project", "run", "role", "layer", "format", "first_step", "last_step"), "x"
) | {"__rate_interval": "20s"}
QUERIES = [query for board in BOARDS.values() for query in panel_queries(board, FILLED)]
EXPRESSIONS = [query.expression for query in QUERIES if isinstance(query, PanelQuery)]


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


@pytest.mark.parametrize("uid", BOARDS)
def test_every_panel_says_what_it_shows_in_which_unit(uid: str) -> None:
    for panel in panels(BOARDS[uid]):
        assert panel["title"], panel
        assert len(panel["description"]) > 20, panel["title"]
        if panel["type"] == "text":
            continue
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"], panel["title"]
    titles = [panel["title"] for panel in panels(BOARDS[uid])]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("uid", BOARDS)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(uid: str) -> None:
    rows = [p for row in BOARDS[uid]["panels"] for p in (row, *row.get("panels", ()))]
    numbers = [panel["id"] for panel in rows]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in BOARDS[uid]["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def variables(uid: str) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in BOARDS[uid]["templating"]["list"]}


def test_dashboards_over_time_need_no_plugin() -> None:
    for uid in (FLEET, RUN):
        kinds = {t["datasource"]["type"] for p in panels(BOARDS[uid]) for t in p.get("targets", ())}
        assert kinds == {"prometheus"}
    assert list(variables(FLEET)) == [
        "prometheus_datasource",
        "job",
        "instance",
        "project",
        "service",
    ]
    # One run at a time: risks of several would lie over each other.
    assert [variables(RUN)[name]["multi"] for name in ("project", "run")] == [False, False]


def test_every_statistic_of_the_record_is_on_the_numerics_dashboard() -> None:
    shown = json.dumps(BOARDS[NUMERICS])
    for statistic in STATISTICS:
        assert f'"{statistic}"' in shown, statistic


def links(value: Any) -> Iterator[str]:
    """Every address in a part of a dashboard."""
    if isinstance(value, dict):
        if isinstance(value.get("url"), str) and "url_options" not in value:
            yield value["url"]
        yield from (url for each in value.values() for url in links(each))
    elif isinstance(value, list):
        yield from (url for each in value for url in links(each))


@pytest.mark.parametrize("uid", BOARDS)
def test_links_lead_somewhere_with_what_is_there(uid: str) -> None:
    found = set(links(BOARDS[uid]))
    assert found
    for url in found:
        if url.startswith("${service}/"):
            assert "service" in variables(uid)
            continue
        target, _, query = url.removeprefix("/d/").partition("?")
        board = target.partition("/")[0]
        for parameter in query.split("&"):
            name, _, value = parameter.partition("=")
            if name.startswith("var-"):
                assert name.removeprefix("var-") in variables(board), url
            elif name == "viewPanel" and "$" not in value:
                numbers = {f"panel-{panel['id']}" for panel in panels(BOARDS[board])}
                assert value in numbers, url
        for known in re.findall(r"\$\{(\w+)(?::percentencode)?\}", query):
            assert known in {*variables(uid), "__url_time_range"}, url


@pytest.mark.parametrize("uid", BOARDS)
def test_links_name_columns_and_labels_that_a_panel_has(uid: str) -> None:
    for panel in panels(BOARDS[uid]):
        text = " ".join(links(panel))
        columns = {
            name
            for step in panel.get("transformations", ())
            if step["id"] == "organize"
            for name in step["options"]["indexByName"]
            for name in [step["options"]["renameByName"].get(name, name)]
        }
        assert set(re.findall(r"__data\.fields\.(\w+)", text)) <= columns, panel["title"]
        for label in re.findall(r"__field\.labels\.(\w+)", text):
            for target in panel["targets"]:
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), panel["title"]


def test_every_alert_has_its_panel_of_the_runbook() -> None:
    alerts = [rule["alert"] for rule in rules()["groups"][1]["rules"]]
    shown = {
        p["title"]: p["options"]["content"] for p in panels(BOARDS[FLEET]) if p["type"] == "text"
    }
    assert list(shown) == alerts
    for name in alerts:
        assert "**Do.**" in shown[name]
    assert f"viewPanel=panel-{_panel(ALERT_NAMES['forecast'])}" in " ".join(links(BOARDS[RUN]))


def _panel(title: str) -> int:
    (panel,) = [panel for panel in panels(BOARDS[FLEET]) if panel["title"] == title]
    return int(panel["id"])


def test_counters_are_rates_and_gauges_are_not() -> None:
    for expression in EXPRESSIONS:
        for inside in re.findall(r"rate\((foreshock_\w+)", expression):
            known = METRICS[re.sub(r"_(bucket|sum|count)$", "", inside)]
            assert known.kind != "gauge", expression


def test_every_metric_is_one_of_the_service() -> None:
    text = "\n".join([*EXPRESSIONS, files()["prometheus/rules/foreshock.yml"]])
    for name in set(re.findall(r"(?<![:\w])foreshock_[a-z0-9_]+", text)):
        assert name in METRICS or re.sub(r"_(bucket|sum|count)$", "", name) in METRICS, name


def test_queries_have_no_variable_left() -> None:
    assert not [each for each in EXPRESSIONS if "$" in each]
    (query, *_) = panel_queries(BOARDS[RUN], FILLED | {"run": "llama-1b"})
    assert 'run="llama-1b"' in str(query)
    with pytest.raises(KeyError, match="run"):
        list(panel_queries(BOARDS[RUN], {"job": "x", "instance": "x", "project": "x"}))


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


@pytest.mark.parametrize("uid", BOARDS)
def test_dashboard_json_is_classic(uid: str) -> None:
    document = json.loads((FOLDER / f"grafana/dashboards/{uid}.json").read_text())
    assert document["schemaVersion"] >= 36
    assert "elements" not in document, "the V2 schema cannot be provisioned before Grafana 13"
