"""The Grafana dashboard of a run, as a table of panels.

Metric names are looked up in the service's `exposition.METRICS`: one that the service no longer has
fails here. Writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard, prometheus, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from foreshock.api.exposition import METRICS
from foreshock.monitor.record import AlertState

__all__ = ["REFRESH", "PanelQuery", "panel_queries", "run_dashboard"]

REFRESH: Final = "5s"
"""How often the dashboard asks again; Prometheus scrapes as often."""

_DATASOURCE: Final = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
_SERVICE: Final = 'job=~"$job", instance=~"$instance"'
_RUN: Final = f'{_SERVICE}, project=~"$project", run=~"$run"'
_STATES: Final[Mapping[AlertState, tuple[int, str]]] = {
    "ok": (0, "green"),
    "pending": (1, "yellow"),
    "firing": (2, "red"),
    "resolved": (3, "blue"),
}


def _series(name: str, *, more: str = "", suffix: str = "") -> str:
    """A selector of the chosen runs (or of the service, for metrics without a run).

    Raises:
        KeyError: The service has no such metric.
    """
    scope = _RUN if "run" in METRICS[name].labels else _SERVICE
    return f"{name}{suffix}{{{scope}{', ' + more if more else ''}}}"


def _rate(name: str, *, suffix: str = "") -> str:
    return f"rate({_series(name, suffix=suffix)}[$__rate_interval])"


@dataclass(frozen=True, slots=True)
class _Graph:
    """A time series panel, in one line of the table below."""

    title: str
    description: str
    unit: str
    targets: tuple[tuple[str, str], ...]
    width: int = 12
    least: float | None = None
    most: float | None = None


def _by_role(title: str, description: str, unit: str, metric: str) -> _Graph:
    return _Graph(title, description, unit, ((_series(metric), "{{run}} {{role}}"),), 8)


def _worst(title: str, description: str, unit: str, metric: str, pick: str = "topk") -> _Graph:
    expression = f"{pick}(5, {_series(metric)})"
    return _Graph(title, description, unit, ((expression, "{{run}} {{layer}} {{role}}"),), 12)


_RISK: Final = (
    _Graph(
        "Divergence risk",
        "Probability that the loss starts to diverge within so many optimizer steps. "
        "A horizon that the forecaster cannot support has no line.",
        "percentunit",
        ((_series("foreshock_divergence_risk_ratio"), "{{run}} {{horizon}} steps"),),
        least=0,
        most=1,
    ),
    _Graph(
        "Loss",
        "Training loss of the newest step, as the run reported it.",
        "none",
        ((_series("foreshock_loss"), "{{run}}"),),
    ),
)
_OPTIMIZER: Final = (
    _Graph(
        "Gradient norm",
        "Norm of the gradient before clipping.",
        "none",
        ((_series("foreshock_gradient_norm"), "{{run}}"),),
        8,
    ),
    _Graph(
        "Learning rate",
        "Learning rate of the newest step.",
        "none",
        ((_series("foreshock_learning_rate"), "{{run}}"),),
        8,
    ),
    _Graph(
        "Step",
        "Newest optimizer step. Flat while the job runs: records do not arrive.",
        "none",
        ((_series("foreshock_step"), "{{run}}"),),
        8,
    ),
)
_TENSORS: Final = (
    _by_role(
        "Kurtosis by role",
        "Kurtosis about zero of the worst layer, per operand of the GEMMs. Gaussian is 3; "
        "a steady rise means outliers.",
        "none",
        "foreshock_kurtosis",
    ),
    _by_role(
        "Headroom by role",
        "Binades between the largest element and the format's largest value, worst layer. "
        "Below 0 the cast saturates now.",
        "none",
        "foreshock_fp8_headroom_log2",
    ),
    _by_role(
        "Largest magnitude by role",
        "Largest absolute element, worst layer.",
        "none",
        "foreshock_amax",
    ),
    _by_role(
        "Underflow by role",
        "Share of elements that the cast flushes to zero, worst layer.",
        "percentunit",
        "foreshock_fp8_underflow_ratio",
    ),
    _by_role(
        "Overflow by role",
        "Share of elements beyond the format's largest value before the cast, worst layer.",
        "percentunit",
        "foreshock_fp8_overflow_ratio",
    ),
)
_LAYERS: Final = (
    _worst(
        "Layers with the largest kurtosis",
        "Where the outliers are. All layers are on the service's own page.",
        "none",
        "foreshock_layer_kurtosis",
    ),
    _worst(
        "Layers with the least headroom",
        "Which layers saturate first.",
        "none",
        "foreshock_layer_fp8_headroom_log2",
        "bottomk",
    ),
)
_COST: Final = (
    _Graph(
        "Monitor overhead",
        "Share of step time that the monitor takes, as the monitor measures it.",
        "percentunit",
        ((_series("foreshock_monitor_overhead_ratio"), "{{run}}"),),
        8,
        least=0,
    ),
    _Graph(
        "Step time",
        "Duration of the newest optimizer step.",
        "s",
        ((_series("foreshock_step_seconds"), "{{run}}"),),
        8,
    ),
    _Graph(
        "Records per second",
        "Records made durable and records scored by the service.",
        "none",
        (
            (_rate("foreshock_ingest_records_total"), "durable"),
            (_rate("foreshock_scored_records_total"), "scored"),
        ),
        8,
    ),
    _Graph(
        "Records dropped per second",
        "Records that a monitor had to drop because its spool was full.",
        "none",
        ((_rate("foreshock_records_dropped_total"), "{{run}}"),),
        8,
    ),
    _Graph(
        "Scoring time",
        "Time to score one record, mean and 95th percentile.",
        "s",
        (
            (
                "histogram_quantile(0.95, sum by (le) "
                f"({_rate('foreshock_scoring_seconds', suffix='_bucket')}))",
                "95 %",
            ),
            (
                f"sum({_rate('foreshock_scoring_seconds', suffix='_sum')}) / "
                f"sum({_rate('foreshock_scoring_seconds', suffix='_count')})",
                "mean",
            ),
        ),
        8,
    ),
    _Graph(
        "Waiting to be scored",
        "Batches that are stored and not yet scored; a rising line means the risk lags behind.",
        "none",
        ((_series("foreshock_scoring_queue_length"), "batches"),),
        8,
    ),
)
_ROWS: Final = (
    ("Is it going to diverge?", _RISK),
    ("Optimizer", _OPTIMIZER),
    ("Tensors: worst layer per role", _TENSORS),
    ("Tensors: which layers", _LAYERS),
    ("What watching costs", _COST),
)


def run_dashboard() -> dict[str, Any]:
    """The dashboard as the JSON that Grafana provisions (classic schema)."""
    built = (
        dashboard.Dashboard("foreshock run")
        .uid("foreshock-run")
        .description("Divergence risk, loss and FP8 tensor statistics of training runs.")
        .tags(["foreshock", "training", "fp8"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh(REFRESH)
        .time("now-30m", "now")
        .timezone("browser")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
    )
    for name, metric in _VARIABLES.items():
        built = built.with_variable(_variable(name, metric))
    for place, (title, graphs) in enumerate(_ROWS):
        built = built.with_row(dashboard.Row(title))
        for graph in graphs:
            built = built.with_panel(_timeseries(graph))
        if place == 0:
            built = built.with_panel(_states())
    document: dict[str, Any] = json.loads(JSONEncoder().encode(built.build()))
    return document


_VARIABLES: Final = {
    "job": "label_values(foreshock_step, job)",
    "instance": 'label_values(foreshock_step{job=~"$job"}, instance)',
    "project": f"label_values(foreshock_step{{{_SERVICE}}}, project)",
    "run": f'label_values(foreshock_step{{{_SERVICE}, project=~"$project"}}, run)',
}


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query({"query": query, "refId": name})
        .definition(query)
        .datasource(_DATASOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(models.VariableOption(text="All", value="$__all"))
    )


def _target(place: int, expression: str, legend: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .expr(expression)
        .legend_format(legend)
        .format(PromQueryFormat.TIME_SERIES)
        .range()
        .ref_id(chr(ord("A") + place))
        .datasource(_DATASOURCE)
    )


def _timeseries(graph: _Graph) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(graph.title)
        .description(graph.description)
        .datasource(_DATASOURCE)
        .unit(graph.unit)
        .height(8)
        .span(graph.width)
        .line_width(2)
        .fill_opacity(6)
        .show_points(common.VisibilityMode.NEVER)
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .targets([_target(i, *target) for i, target in enumerate(graph.targets)])
    )
    if graph.least is not None:
        panel = panel.min(graph.least)
    return panel if graph.most is None else panel.max(graph.most)


def _states() -> statetimeline.Panel:
    """The alert state of each run as a band: the four states as numbers, then as words."""
    name = "foreshock_alert_state"
    terms = [
        f"{number} * sum by (project, run) ({_series(name, more=_equal('state', state))})"
        for state, (number, _) in _STATES.items()
        if number
    ]
    words = {
        str(number): models.ValueMappingResult(text=state, color=colour, index=number)
        for state, (number, colour) in _STATES.items()
    }
    return (
        statetimeline.Panel()
        .title("Alert state")
        .description("State of the service's own alert, per run.")
        .datasource(_DATASOURCE)
        .unit("none")
        .height(6)
        .span(24)
        .mappings([models.ValueMap(options=words)])
        .targets([_target(0, " + ".join(terms), "{{run}}")])
    )


def _equal(label: str, value: str) -> str:
    return f'{label}="{value}"'


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One PromQL expression of one panel, ready to be asked.

    Attributes:
        panel: Title of the panel.
        legend: Legend format.
        expression: PromQL without variables.
    """

    panel: str
    legend: str
    expression: str


def panel_queries(
    document: Mapping[str, Any], *, rate_interval: str, variables: Mapping[str, str] | None = None
) -> Iterator[PanelQuery]:
    """Every expression of a dashboard's JSON, as Grafana would send it.

    Args:
        document: The dashboard as JSON, panels in rows included.
        rate_interval: What `$__rate_interval` stands for, e.g. "20s".
        variables: Value of each template variable; those left out stand for everything.
    """
    values = {name: ".+" for name in _VARIABLES} | dict(variables or {})
    for panel in document["panels"]:
        if panel.get("panels"):
            yield from panel_queries(panel, rate_interval=rate_interval, variables=variables)
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", rate_interval)
            for name, value in values.items():
                text = text.replace(f"${name}", value)
            yield PanelQuery(panel["title"], target.get("legendFormat", ""), text)
