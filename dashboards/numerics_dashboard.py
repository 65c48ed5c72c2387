"""The dashboard of one run on its step axis: every layer and statistic, live or long over.

Asks the service itself, through the Infinity data source; Prometheus has no part in it.
"""

from __future__ import annotations

from typing import Any, Final

from dashboards.infinity import INFINITY, PLUGIN, Read
from dashboards.numerics_panels import ROWS
from dashboards.parts import FLEET, NUMERICS, RUN, data_link, document, new_dashboard, run_link
from dashboards.runbook import runbook_url
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from foreshock.api.alert_log import ALERT_NAMES

__all__ = ["REFRESH", "numerics_dashboard"]

REFRESH: Final = "30s"
"""Slower than Prometheus's dashboards: each of these reads looks at all steps."""

_RUN: Final = "/runs/${run:percentencode}"
_OF: Final = {"project": "${project}"}


def _variable(name: str, read: Read, text: str) -> dashboard.QueryVariable:
    asked: dict[str, object] = {
        "refId": "variable",
        "queryType": "infinity",
        "query": "",
        "infinityQuery": read.query("variable"),
    }
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .description(text)
        .query(asked)
        .definition(f"{read.path} {read.root}")
        .datasource(INFINITY)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )


def _members(name: str) -> Read:
    return Read(path=_RUN, parameters=_OF, root=name)


def _variables() -> list[Any]:
    everything = {"order": "created", "limit": "1000"}
    projects = Read(path="/runs", parameters=everything, root="runs.#.project")
    runs = Read(path="/runs", parameters=everything | _OF, root="runs.#.run")
    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type(PLUGIN),
        _variable("project", projects, "Project of the run."),
        _variable("run", runs, "The run; the newest first."),
        _variable("role", _members("roles"), "What the tensors are."),
        _variable("layer", _members("layers"), "For panels of one layer; in model order."),
        _variable("format", _members("formats"), "For the heatmaps of what a format would do."),
        dashboard.TextBoxVariable("first_step").label("From step").default_value("0"),
        dashboard.TextBoxVariable("last_step").label("To step").default_value("1000000000000"),
    ]


def numerics_dashboard() -> dict[str, Any]:
    """The dashboard as JSON."""
    built = new_dashboard(
        NUMERICS,
        "foreshock numerics",
        "One run on its step axis: layers by steps, outlier channels, scales, optimizer states, "
        "what other formats would do.",
    )
    built = built.refresh(REFRESH).variables(_variables())
    built = built.links(
        [
            data_link("All runs", f"/d/{FLEET}/{FLEET}?${{__url_time_range}}"),
            run_link("This run over time", RUN, "${"),
            data_link("Runbook", runbook_url(ALERT_NAMES["forecast"])),
        ]
    )
    for place, (title, panels) in enumerate(ROWS):
        row = dashboard.Row(title)
        if place < 2:
            built = built.with_row(row)
            for panel in panels:
                built = built.with_panel(panel)
            continue
        # Closed rows ask nothing until somebody opens them.
        row = row.collapsed(True)
        for panel in panels:
            row = row.with_panel(panel)
        built = built.with_row(row)
    return document(built)
