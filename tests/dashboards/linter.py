"""The published rules of Grafana's dashboard-linter, each as a check of a dashboard's JSON.

The linter itself is a Go program that no registry here carries. A rule looks at what the linter's
does (docs/rules of github.com/grafana/dashboard-linter, version 0.2), so what it lets pass passes
here too; validity of PromQL is left to promtool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from dashboards.queries import panels

__all__ = ["RULES", "UNITS"]

Document = Mapping[str, Any]
Problems = Iterator[str]

_DRAWN: Final = ("stat", "singlestat", "graph", "table", "timeseries", "gauge")
_QUERIED: Final = ("singlestat", "gauge", "table", "stat", "state-timeline", "timeseries")
_TEMPLATED: Final = ("singlestat", "graph", "table", "timeseries")
UNITS: Final = frozenset({"none", "short", "percentunit", "s", "cps", "dB", "sci", "string"})
"""Of the linter's list of units, those that these dashboards may use."""


def _variables(document: Document, kind: str | None = None) -> list[Mapping[str, Any]]:
    return [v for v in document["templating"]["list"] if kind in (None, v["type"])]


def _is_prometheus(document: Document) -> bool:
    """Rules about PromQL hold where the first data source variable is Prometheus's."""
    sources = _variables(document, "datasource")
    return bool(sources) and sources[0]["query"] == "prometheus"


def _targets(document: Document) -> Iterator[tuple[str, str]]:
    if _is_prometheus(document):
        for panel in panels(document):
            for target in panel.get("targets", ()):
                yield panel["title"], target["expr"]


def _template_datasource(document: Document) -> Problems:
    sources = _variables(document, "datasource")
    if not sources:
        yield "does not have a templated data source"
    for source in sources:
        kind = source["query"]
        names, labels = {f"{kind.lower()}_datasource"}, {f"{kind.title()} data source"}
        if len(sources) == 1:
            names.add("datasource")
            labels.add("Data source")
        if source["name"] not in names:
            yield f"data source variable is named {source['name']!r}, not one of {names}"
        if source["label"] not in labels:
            yield f"data source variable is labelled {source['label']!r}, not one of {labels}"


def _template(name: str) -> Callable[[Document], Problems]:
    def check(document: Document) -> Problems:
        if not _is_prometheus(document):
            return
        found = [v for v in _variables(document) if v["name"] == name]
        if not found:
            yield f"is missing the {name} template"
            return
        wanted = {
            "type": "query",
            "label": name.title(),
            "multi": True,
            "allValue": ".+",
        }
        for member, value in wanted.items():
            if found[0].get(member) != value:
                yield f"{name}: {member} is {found[0].get(member)!r}, not {value!r}"
        source = found[0]["datasource"]["uid"]
        if not re.fullmatch(r"\$\{?(prometheus_)?datasource\}?", source):
            yield f"{name}: asks {source!r}"

    return check


def _template_label_promql(document: Document) -> Problems:
    if not _is_prometheus(document):
        return
    for variable in _variables(document, "query"):
        asked = variable["query"]["query"]
        if not re.fullmatch(r"(label_names|label_values|metrics|query_result)\(.+\)", asked):
            yield f"{variable['name']}: {asked!r} is no query of labels"


def _template_on_time_change_reload(document: Document) -> Problems:
    for variable in _variables(document, "query"):
        if variable["refresh"] != 2:
            yield f"{variable['name']} is not refreshed on time range change"


def _panel_datasource(document: Document) -> Problems:
    names = [variable["name"] for variable in _variables(document, "datasource")]
    allowed = {f"${name}" for name in names} | {f"${{{name}}}" for name in names}
    for panel in panels(document):
        if panel["type"] in _TEMPLATED and panel["datasource"]["uid"] not in allowed:
            yield f"{panel['title']}: uses {panel['datasource']['uid']!r}"


def _panel_title_description(document: Document) -> Problems:
    for panel in panels(document):
        if panel["type"] in _DRAWN and not (panel.get("title") and panel.get("description")):
            yield f"panel {panel['id']} lacks title or description"


def _panel_units(document: Document) -> Problems:
    for panel in panels(document):
        if panel["type"] not in _DRAWN:
            continue
        config = panel["fieldConfig"]
        properties = [p for o in config["overrides"] for p in o["properties"]]
        # A mapping says what a value is.
        if config["defaults"].get("mappings") or any(p["id"] == "mappings" for p in properties):
            continue
        given = [p["value"] for p in properties if p["id"] == "unit"]
        unit = given[-1] if given else config["defaults"].get("unit")
        if unit not in UNITS:
            yield f"{panel['title']}: unit {unit!r}"


def _panel_no_targets(document: Document) -> Problems:
    for panel in panels(document):
        if panel["type"] in _DRAWN and not panel.get("targets"):
            yield f"{panel['title']} has no targets"


def _target_promql(document: Document) -> Problems:
    for title, expression in _targets(document):
        if not expression.strip():
            yield f"{title}: an empty query"


def _target_rate_interval(document: Document) -> Problems:
    for title, expression in _targets(document):
        for name, interval in re.findall(r"(\w+)\([^()]*\[([^\]]+)\]", expression):
            if name in ("rate", "irate") and interval != "$__rate_interval":
                yield f"{title}: {name} over {interval}"


def _target_matcher(label: str) -> Callable[[Document], Problems]:
    def check(document: Document) -> Problems:
        for title, expression in _targets(document):
            for selector in re.findall(r"\w+\{[^}]*\}", expression):
                if f'{label}=~"${label}"' not in selector:
                    yield f"{title}: {selector} does not match {label}"
            for bare in re.findall(r"\bforeshock_\w+(?!\w|\{)", expression):
                yield f"{title}: {bare} has no matchers"

    return check


def _target_counter_agg(document: Document) -> Problems:
    for title, expression in _targets(document):
        for found in re.finditer(r"\w+_total\b", expression):
            if not re.search(r"(rate|irate|increase)\($", expression[: found.start()]):
                yield f"{title}: counter {found[0]} is not aggregated"


def _loki(document: Document) -> Problems:
    for panel in panels(document):
        for target in panel.get("targets", ()):
            if target["datasource"]["type"] == "loki":
                yield f"{panel['title']}: LogQL, for which nothing is checked here"


def _uneditable(document: Document) -> Problems:
    if document["editable"]:
        yield "is editable"


RULES: Final[Mapping[str, Callable[[Document], Problems]]] = {
    "template-datasource-rule": _template_datasource,
    "template-job-rule": _template("job"),
    "template-instance-rule": _template("instance"),
    "template-label-promql-rule": _template_label_promql,
    "template-on-time-change-reload-rule": _template_on_time_change_reload,
    "panel-datasource-rule": _panel_datasource,
    "panel-title-description-rule": _panel_title_description,
    "panel-units-rule": _panel_units,
    "panel-no-targets-rule": _panel_no_targets,
    "target-logql-rule": _loki,
    "target-logql-auto-rule": _loki,
    "target-promql-rule": _target_promql,
    "target-rate-interval-rule": _target_rate_interval,
    "target-job-rule": _target_matcher("job"),
    "target-instance-rule": _target_matcher("instance"),
    "target-counter-agg-rule": _target_counter_agg,
    "uneditable-dashboard": _uneditable,
}
"""What each rule finds wrong, by the name that the linter gives it."""
