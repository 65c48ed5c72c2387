"""What the dashboards are put together from: variables, links, panels as rows of a table.

Selectors and links are made here alone, so that every dashboard asks and leads in the same way.
Metric names are looked up in the service's `METRICS`: one that it no longer has fails here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog import builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from foreshock.api.exposition import METRICS

__all__ = [
    "FLEET",
    "NUMERICS",
    "OPERANDS",
    "PROMETHEUS",
    "REFRESH",
    "RUN",
    "Graph",
    "Override",
    "Scope",
    "Stat",
    "Table",
    "Target",
    "data_link",
    "document",
    "new_dashboard",
    "organize",
    "page_link",
    "prometheus_variables",
    "query",
    "rate",
    "run_link",
    "series",
]

FLEET: Final = "foreshock-fleet"
RUN: Final = "foreshock-run"
NUMERICS: Final = "foreshock-numerics"

REFRESH: Final = "5s"
"""How often a dashboard asks again; Prometheus scrapes as often."""

PROMETHEUS: Final = common.DataSourceRef(type_val="prometheus", uid="${prometheus_datasource}")

OPERANDS: Final = 'role=~"input|weight|grad_output"'
"""Matcher of the GEMMs' operands. Adam's moments have far heavier tails by nature, and would push
every operand off a list of the worst."""

Scope = Literal["service", "projects", "run"]
_SCOPES: Final[Mapping[Scope, str]] = {
    "service": 'job=~"$job", instance=~"$instance"',
    "projects": 'job=~"$job", instance=~"$instance", project=~"$project"',
    # Not by a pattern: a dot in a name stands for itself.
    "run": 'job=~"$job", instance=~"$instance", project="$project", run="$run"',
}


def series(name: str, scope: Scope, *, more: str = "", suffix: str = "") -> str:
    """A selector.

    Args:
        name: A metric of the service.
        scope: Which of its series; those of the service itself have no project.
        more: Further matchers.
        suffix: Of a histogram, e.g. `_bucket`.

    Raises:
        KeyError: The service has no such metric.
    """
    if "run" not in METRICS[name].labels:
        scope = "service"
    return f"{name}{suffix}{{{_SCOPES[scope]}{', ' + more if more else ''}}}"


def rate(name: str, scope: Scope, *, suffix: str = "") -> str:
    """Increase per second of a counter."""
    return f"rate({series(name, scope, suffix=suffix)}[$__rate_interval])"


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel.

    Attributes:
        expression: PromQL.
        legend: Legend format.
        instant: Only the newest value, as a table.
    """

    expression: str
    legend: str = ""
    instant: bool = False


@dataclass(frozen=True, slots=True)
class Override:
    """Properties of some fields of a panel.

    Attributes:
        matcher: `byName`, `byFrameRefID` or `byRegexp`.
        value: What it compares with.
        properties: By their id.
    """

    matcher: str
    value: str
    properties: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph(builder.Builder[models.Panel]):
    """A panel over time.

    Attributes:
        title: Its name, unique in its dashboard.
        description: What it shows and how to read it.
        unit: As Grafana knows it.
        targets: Its queries.
        width: Of 24 columns.
        height: In grid rows.
        least: Lower end of the axis; None fits the data.
        most: Upper end, likewise.
        links: Where a click on a point leads.
        overrides: Fields that look different.
    """

    title: str
    description: str
    unit: str
    targets: tuple[Target, ...]
    width: int = 8
    height: int = 8
    least: float | None = None
    most: float | None = None
    links: tuple[dashboard.DashboardLink, ...] = ()
    overrides: tuple[Override, ...] = ()

    def build(self) -> models.Panel:
        """The panel."""
        panel = timeseries.Panel().line_width(2).fill_opacity(6)
        panel = panel.show_points(common.VisibilityMode.NEVER)
        panel = panel.tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI)
        )
        if self.least is not None:
            panel = panel.min(self.least)
        if self.most is not None:
            panel = panel.max(self.most)
        panel = panel.unit(self.unit).data_links(list(self.links))
        return _finished(panel, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat(builder.Builder[models.Panel]):
    """One number, with the words or colours that its values stand for.

    Attributes (others as for `Graph`):
        steps: Colour from a value on; the first from minus infinity.
        mappings: Words for values.
    """

    title: str
    description: str
    unit: str
    targets: tuple[Target, ...]
    width: int = 4
    height: int = 4
    steps: tuple[tuple[float | None, str], ...] = ((None, "blue"),)
    mappings: tuple[models.ValueMap, ...] = ()
    links: tuple[dashboard.DashboardLink, ...] = ()
    overrides: tuple[Override, ...] = ()

    def build(self) -> models.Panel:
        """The panel."""
        reduced = common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
        panel = stat.Panel().unit(self.unit).reduce_options(reduced).no_value("-")
        panel = panel.thresholds(thresholds(self.steps)).data_links(list(self.links))
        if self.mappings:
            panel = panel.mappings(list(self.mappings))
        return _finished(panel, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(builder.Builder[models.Panel]):
    """Rows of the newest values, merged over the queries by their labels.

    Attributes (others as for `Graph`):
        columns: Field names in order, with the names that people read.
        sort: Name of the column that is sorted by, worst first.
    """

    title: str
    description: str
    unit: str
    targets: tuple[Target, ...]
    columns: Mapping[str, str]
    sort: str
    width: int = 12
    height: int = 8
    ascending: bool = False
    links: tuple[dashboard.DashboardLink, ...] = ()
    overrides: tuple[Override, ...] = ()

    def build(self) -> models.Panel:
        """The panel."""
        merge = models.DataTransformerConfig(id_val="merge", options={})
        panel = table.Panel().unit(self.unit).filterable(True)
        panel = panel.cell_options(common.TableAutoCellOptions())
        panel = panel.transformations([merge, organize(self.columns)])
        order = common_builders.TableSortByFieldState().display_name(self.sort)
        order = order.desc(not self.ascending)
        panel = panel.sort_by([order])
        if self.links:
            first = next(iter(self.columns.values()))
            panel = panel.override_by_name(
                first, [models.DynamicConfigValue("links", [link.build() for link in self.links])]
            )
        return _finished(panel, self)


def organize(columns: Mapping[str, str]) -> models.DataTransformerConfig:
    """Keeps some fields, in this order and under these names."""
    options = {
        "includeByName": dict.fromkeys(columns, True),
        "indexByName": {name: place for place, name in enumerate(columns)},
        "renameByName": {name: shown for name, shown in columns.items() if shown != name},
    }
    return models.DataTransformerConfig(id_val="organize", options=options)


def thresholds(steps: Sequence[tuple[float | None, str]]) -> dashboard.ThresholdsConfig:
    """Colours from values on."""
    made = [models.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def _finished(panel: Any, of: Graph | Stat | Table) -> models.Panel:
    panel = (
        panel.title(of.title)
        .description(of.description)
        .datasource(PROMETHEUS)
        .height(of.height)
        .span(of.width)
        .targets([query(place, target) for place, target in enumerate(of.targets)])
    )
    for override in of.overrides:
        values = [models.DynamicConfigValue(k, v) for k, v in override.properties.items()]
        panel = panel.with_override(models.MatcherConfig(override.matcher, override.value), values)
    built: models.Panel = panel.build()
    return built


def query(place: int, target: Target) -> prometheus.Dataquery:
    """A query for Prometheus, named A, B, ... by its place."""
    made = prometheus.Dataquery().expr(target.expression).legend_format(target.legend)
    made = made.ref_id(chr(ord("A") + place)).datasource(PROMETHEUS)
    if target.instant:
        return made.instant().format(PromQueryFormat.TABLE)
    return made.range().format(PromQueryFormat.TIME_SERIES)


def page_link(title: str, fields: str) -> dashboard.DashboardLink:
    """A link to a run's page on the service; `fields` as for `run_link`."""
    return data_link(title, f"${{service}}/?{_run_of(fields, '')}", blank=True)


def data_link(title: str, url: str, *, blank: bool = False) -> dashboard.DashboardLink:
    """A link of a field or of a dashboard to an address of this Grafana or of another place."""
    link = dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK).url(url)
    return link.target_blank(blank)


def run_link(title: str, board: str, fields: str, more: str = "") -> dashboard.DashboardLink:
    """A link to the run that a point, a row or this dashboard speaks of.

    Args:
        title: What it says.
        board: `RUN` or `NUMERICS`.
        fields: Where project and run stand: `${__field.labels.` of a point, `${__data.fields.` of a
            row, `${` of the dashboard.
        more: Further parameters, each with `&` before it.
    """
    run = _run_of(fields, "var-")
    return data_link(title, f"/d/{board}/{board}?{run}{more}&${{__url_time_range}}")


def _run_of(fields: str, prefix: str) -> str:
    end = ":percentencode}" if fields == "${" else "}"
    names = ("Project", "Run") if fields == _ROW else ("project", "run")
    return "&".join(f"{prefix}{name.lower()}={fields}{name}{end}" for name in names)


_ROW: Final = "${__data.fields."


def new_dashboard(uid: str, title: str, description: str) -> dashboard.Dashboard:
    """A dashboard that nobody edits, because it is written by code."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["foreshock", "training", "fp8"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh(REFRESH)
        .time("now-30m", "now")
        .timezone("browser")
    )


def prometheus_variables(*, one_run: bool) -> list[Any]:
    """Data source, job, instance, project and, for the dashboard of a run, run and the page."""
    service, projects = _SCOPES["service"], f'{_SCOPES["service"]}, project="$project"'
    made = [
        dashboard.DatasourceVariable("prometheus_datasource")
        .label("Prometheus data source")
        .type("prometheus"),
        _many("job", "label_values(foreshock_live_runs, job)"),
        _many("instance", 'label_values(foreshock_live_runs{job=~"$job"}, instance)'),
    ]
    project = f"label_values(foreshock_step{{{service}}}, project)"
    page = f"label_values(foreshock_service_info{{{service}}}, url)"
    if one_run:
        made.append(_one("project", project))
        made.append(_one("run", f"label_values(foreshock_step{{{projects}}}, run)"))
    else:
        made.append(_many("project", project))
    return [*made, _one("service", page).hide(models.VariableHide.HIDE_VARIABLE)]


def _one(name: str, asked: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query({"query": asked, "refId": name})
        .definition(asked)
        .datasource(PROMETHEUS)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def _many(name: str, asked: str) -> dashboard.QueryVariable:
    return (
        _one(name, asked)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(models.VariableOption(text="All", value="$__all"))
    )


def document(built: dashboard.Dashboard) -> dict[str, Any]:
    """The JSON that Grafana provisions (classic schema); panels without a number get the next."""
    made: dict[str, Any] = _shown(json.loads(JSONEncoder().encode(built.build())))
    for number, panel in enumerate(made["panels"], start=1):
        panel["id"] = panel.get("id") or number
        for place, inner in enumerate(panel.get("panels", ())):
            inner["id"] = inner.get("id") or 100 * number + place
    return made


def _shown(value: Any) -> Any:
    """Without what the SDK adds unasked.

    That is the place of every link and mark, a closed menu, and for every variable the `auto` that
    only intervals have.
    """
    if isinstance(value, list):
        return [_shown(each) for each in value]
    if isinstance(value, dict):
        return {k: _shown(v) for k, v in value.items() if (k, v) not in _UNASKED}
    return value


_UNASKED: Final = (
    ("placement", "inControlsMenu"),
    ("auto", False),
    ("auto_min", "10s"),
    ("auto_count", 30),
)
