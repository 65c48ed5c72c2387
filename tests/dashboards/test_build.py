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
from dashboards.configs import alertmanager_config, prometheus_config
from dashboards.parts import FLEET, NUMERICS, RUN
from dashboards.queries import PanelQuery, panel_queries, panels
from dashboards.rules import WATCHDOG, alert_rules

from foreshock.api.alert_log import ALERT_NAMES, SEVERITIES
from foreshock.api.alert_samples import sample_alert
from foreshock.api.alert_text import alert_annotations, alert_labels
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
    assert kept == {name for name in files() if not name.startswith("../")}


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
    alerts = [rule["alert"] for rule in alert_rules()]
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
    alerts = {rule["alert"]: rule for rule in alert_rules()}
    for kind, name in ALERT_NAMES.items():
        assert alerts[name]["labels"]["severity"] == SEVERITIES[kind]
    for name, rule in alerts.items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        # A value in a label would make a new alert of every sample.
        assert not [text for text in rule["labels"].values() if "{{" in text], name


def test_every_alert_has_a_runbook_entry_and_every_entry_an_alert() -> None:
    text = (FOLDER / "runbook.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert headings == [rule["alert"] for rule in alert_rules()]
    for section in text.split("\n## ")[1:]:
        for part in ("**Means.**", "**Look.**", "**Do.**"):
            assert part in section, section[:40]


def test_every_runbook_link_ends_at_its_anchor_wherever_the_page_is_served() -> None:
    page = files()["prometheus/consoles/runbook.html"]
    assert "{{" not in page, "Prometheus would take it for a template"
    anchors = set(re.findall(r'<h2 id="(\w+)"', page))
    for rule in alert_rules():
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert path == "{{ $externalURL }}/consoles/runbook.html"
        assert anchor in anchors, rule["alert"]
    assert (ROOT / "api/foreshock/api/page/runbook.html").read_text(encoding="utf-8") == page


def test_every_alert_is_tested_firing_and_not_firing() -> None:
    document = yaml.safe_load(files()["prometheus/tests/foreshock.yml"])
    cases = [case for each in document["tests"] for case in each.get("alert_rule_test", [])]
    for rule in alert_rules():
        found = [bool(c["exp_alerts"]) for c in cases if c["alertname"] == rule["alert"]]
        # The one that fires always cannot be seen not to.
        expected = {True} if rule["alert"] == WATCHDOG else {True, False}
        assert set(found) == expected, rule["alert"]


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


def test_one_mistake_is_one_page_and_the_worse_hides_the_lesser() -> None:
    config = alertmanager_config()
    assert config["route"]["group_by"] == ["project", "run"]
    known = {rule["alert"] for rule in alert_rules()}
    for rule in config["inhibit_rules"]:
        (source,) = (re.fullmatch(r'alertname="(\w+)"', m)[1] for m in rule["source_matchers"])  # type: ignore[index]
        (target,) = (re.fullmatch(r'alertname=~"(.+)"', m)[1] for m in rule["target_matchers"])  # type: ignore[index]
        hidden = {name for name in known if re.fullmatch(target, name)}
        assert source in known
        assert hidden
        assert source not in hidden


@pytest.mark.debian
@needs("amtool")
@pytest.mark.parametrize("told", ["service", "rule"])
def test_alertmanager_s_templates_read_well(told: str, tmp_path: Path) -> None:
    alert = sample_alert("forecast")
    rule = next(r for r in alert_rules() if r["alert"] == alert.name)
    said = alert_annotations(alert, "firing", "https://watch.example")
    annotations = said if told == "service" else rule["annotations"]
    one = {"status": "firing", "labels": alert_labels(alert), "annotations": annotations}
    (tmp_path / "data.json").write_text(json.dumps({"status": "firing", "alerts": [one, one]}))

    def rendered(name: str) -> str:
        done = run(
            "amtool",
            "template",
            "render",
            f"--template.glob={FOLDER / 'alertmanager/*.tmpl'}",
            f'--template.text={{{{ template "{name}" . }}}}',
            f"--template.data={tmp_path / 'data.json'}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    headline = said["headline"] if told == "service" else rule["annotations"]["summary"]
    assert rendered("foreshock.title") == f"[firing] {headline} (and 1 more)"
    text = rendered("foreshock.text")
    assert annotations["description"] in text
    assert f"Runbook: {annotations['runbook_url']}" in text
    assert ("Page: https://watch.example/?run=" in text) == (told == "service")
    assert annotations["runbook_url"].partition("#")[2] in rendered("foreshock.html")


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
