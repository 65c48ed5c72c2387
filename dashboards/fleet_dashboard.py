"""The dashboard of all runs: risk, state, what fires, the worst layers, the service itself."""

from __future__ import annotations

from typing import Any, Final

from dashboards.parts import (
    FLEET,
    NUMERICS,
    OPERANDS,
    RUN,
    Graph,
    Override,
    Stat,
    Table,
    Target,
    data_link,
    document,
    new_dashboard,
    page_link,
    prometheus_variables,
    rate,
    run_link,
    series,
)
from dashboards.runbook import runbook_panels, runbook_row
from dashboards.states import STATE_MAP, state_number, state_timeline
from grafana_foundation_sdk.builders import dashboard

from foreshock.api.alert_log import ALERT_NAMES

__all__ = ["fleet_dashboard"]

_POINT: Final = "${__field.labels."
_ROW: Final = "${__data.fields."
_OF_RUN: Final = (
    run_link("Dashboard of this run", RUN, _ROW),
    run_link("Numerics of this run", NUMERICS, _ROW),
    page_link("Page and diagnosis", _ROW),
)
_TO_RUN: Final = (run_link("Dashboard of this run", RUN, _POINT),)
_TO_LAYER: Final = (
    run_link("Numerics of this layer", NUMERICS, _ROW, "&var-layer=${__data.fields.Layer}"),
    run_link("Dashboard of this run", RUN, _ROW),
)


def _by_run(expression: str) -> str:
    # Over instances: two replicas that show one run in turn make no two of it.
    return f"max by (project, run) ({expression})"


def _now(name: str, more: str = "") -> Target:
    return Target(_by_run(series(name, "projects", more=more)), instant=True)


def _count(state: str) -> str:
    return f"sum({series('foreshock_run_state', 'projects', more=_equal('state', state))})"


def _equal(label: str, value: str) -> str:
    return f'{label}="{value}"'


_RISK: Final = series("foreshock_divergence_risk_ratio", "projects", more=_equal("horizon", "100"))
_HEARD: Final = _by_run(series("foreshock_last_received_timestamp_seconds", "projects"))

_STATS: Final = (
    Stat(
        title="Live runs",
        description="Runs that send records as often as they usually do.",
        unit="none",
        targets=(Target(_count("live"), "live"),),
    ),
    Stat(
        title="Alerts firing",
        description="Alerts of the service that are firing now, of every kind.",
        unit="none",
        targets=(Target(f"sum({series('foreshock_alert_firing', 'projects')})", "firing"),),
        steps=((None, "green"), (1, "red")),
    ),
    Stat(
        title="Silent runs",
        description="Runs that have sent nothing for far longer than usual and did not say that "
        "they are over.",
        unit="none",
        targets=(Target(_count("stale"), "silent"),),
        steps=((None, "green"), (1, "orange")),
    ),
    Stat(
        title="Largest risk",
        description="Largest probability over all runs that the loss starts to diverge within 100 "
        "steps.",
        unit="percentunit",
        targets=(Target(f"max({_RISK})", "100 steps"),),
        steps=((None, "green"), (0.2, "orange"), (0.5, "red")),
    ),
    Stat(
        title="Training at risk",
        description="Time since the last checkpoint, summed over the runs: what is lost if all of "
        "them diverge now.",
        unit="s",
        targets=(
            Target(f"sum({_by_run(series('foreshock_at_risk_seconds', 'projects'))})", "at risk"),
        ),
    ),
    Stat(
        title="Steps per second",
        description="Optimizer steps of all runs per second, as far as they are scored.",
        unit="cps",
        targets=(Target(f"sum({rate('foreshock_scored_records_total', 'projects')})", "scored"),),
    ),
)

_RUNS: Final = Table(
    title="Runs",
    description="One row per run, the riskiest first. The name leads to its dashboards.",
    unit="none",
    width=24,
    height=9,
    targets=(
        _now("foreshock_divergence_risk_ratio", _equal("horizon", "100")),
        _now("foreshock_divergence_risk_ratio", _equal("horizon", "10")),
        Target(state_number("projects"), instant=True),
        _now("foreshock_expected_lead_steps"),
        _now("foreshock_at_risk_seconds"),
        _now("foreshock_loss"),
        _now("foreshock_step"),
        Target(f"time() - {_HEARD}", instant=True),
    ),
    columns={
        "run": "Run",
        "project": "Project",
        "Value #A": "Risk, 100 steps",
        "Value #B": "Risk, 10 steps",
        "Value #C": "Alert",
        "Value #D": "Expected lead, steps",
        "Value #E": "Since checkpoint",
        "Value #F": "Loss",
        "Value #G": "Step",
        "Value #H": "Last heard",
    },
    sort="Risk, 100 steps",
    links=_OF_RUN,
    overrides=(
        Override(
            "byRegexp",
            "/^Risk/",
            {
                "unit": "percentunit",
                "min": 0,
                "max": 1,
                "custom.cellOptions": {"type": "gauge", "mode": "basic"},
            },
        ),
        Override(
            "byName",
            "Alert",
            {
                "mappings": [STATE_MAP],
                "custom.cellOptions": {"type": "color-text"},
            },
        ),
        Override("byRegexp", "/^(Since checkpoint|Last heard)$/", {"unit": "s"}),
    ),
)


def _with_runbook(expression: str) -> str:
    """Adds a label `runbook`: the panel of this dashboard that says what to do."""
    panels = runbook_panels()
    for kind, name in ALERT_NAMES.items():
        expression = (
            f'label_replace({expression}, "runbook", "panel-{panels[name]}", "kind", "{kind}")'
        )
    return expression


def _firing() -> Table:
    firing = f"max by (project, run, kind) ({series('foreshock_alert_firing', 'projects')}) == 1"
    return Table(
        title="Firing now",
        description="Alerts that fire: forecast (the loss looks normal yet), detection (it is "
        "rising), silence. The name leads to the run; the kind to what to do.",
        unit="none",
        targets=(Target(_with_runbook(firing), instant=True),),
        columns={"run": "Run", "project": "Project", "kind": "Kind", "runbook": "Runbook"},
        sort="Run",
        ascending=True,
        width=10,
        links=_OF_RUN,
        overrides=(
            Override(
                "byName",
                "Kind",
                {
                    "links": [
                        data_link(
                            "What to do", f"/d/{FLEET}/{FLEET}?viewPanel=${{__data.fields.Runbook}}"
                        ).build()
                    ]
                },
            ),
            Override("byName", "Runbook", {"custom.hidden": True}),
        ),
    )


def _worst(title: str, description: str, unit: str, metric: str, pick: str = "topk") -> Table:
    over = "max" if pick == "topk" else "min"
    layers = f"{over} by (project, run, layer, role) ({series(metric, 'projects', more=OPERANDS)})"
    return Table(
        title=title,
        description=f"{description} Over all runs and the operands of their GEMMs; the layer leads "
        "to its numerics.",
        unit=unit,
        targets=(Target(f"{pick}(10, {layers})", instant=True),),
        columns={
            "layer": "Layer",
            "role": "Role",
            "run": "Run",
            "project": "Project",
            "Value": "Value",
        },
        sort="Value",
        ascending=pick == "bottomk",
        links=_TO_LAYER,
    )


_LAYERS: Final = (
    _worst(
        "Largest kurtosis",
        "Layers with the heaviest outliers (Gaussian is 3).",
        "none",
        "foreshock_layer_kurtosis",
    ),
    _worst(
        "Least headroom",
        "Layers that saturate first: binades between the largest element and the format's largest "
        "value, below 0 it saturates now.",
        "none",
        "foreshock_layer_fp8_headroom_log2",
        "bottomk",
    ),
    _worst(
        "Largest overflow",
        "Layers with the largest share of elements beyond the format.",
        "percentunit",
        "foreshock_layer_fp8_overflow_ratio",
    ),
    _worst(
        "Largest underflow",
        "Layers with the largest share of elements flushed to zero.",
        "percentunit",
        "foreshock_layer_fp8_underflow_ratio",
    ),
)

_RISKS: Final = Graph(
    title="Risk of every run",
    description="Probability that the loss starts to diverge within 100 steps.",
    unit="percentunit",
    targets=(
        Target(
            _by_run(_RISK),
            "{{run}}",
        ),
    ),
    width=14,
    least=0,
    most=1,
    links=_TO_RUN,
)

_SERVICE: Final = (
    Graph(
        title="Records per second",
        description="Records made durable and records scored by the service.",
        unit="cps",
        targets=(
            Target(rate("foreshock_ingest_records_total", "service"), "durable {{instance}}"),
            Target(rate("foreshock_scored_records_total", "service"), "scored {{instance}}"),
        ),
    ),
    Graph(
        title="Scoring time",
        description="Time to score one record, mean and 95th percentile.",
        unit="s",
        targets=(
            Target(
                "histogram_quantile(0.95, sum by (le) "
                f"({rate('foreshock_scoring_seconds', 'service', suffix='_bucket')}))",
                "95 %",
            ),
            Target(
                f"sum({rate('foreshock_scoring_seconds', 'service', suffix='_sum')}) / "
                f"sum({rate('foreshock_scoring_seconds', 'service', suffix='_count')})",
                "mean",
            ),
        ),
    ),
    Graph(
        title="Waiting to be scored",
        description="Batches that are stored and not yet scored; a rising line means that risks "
        "lag behind.",
        unit="none",
        targets=(Target(series("foreshock_scoring_queue_length", "service"), "{{instance}}"),),
    ),
    Graph(
        title="Alert deliveries per second",
        description="Tries to deliver an alert, by channel and outcome.",
        unit="cps",
        targets=(
            Target(rate("foreshock_alert_deliveries_total", "service"), "{{channel}} {{outcome}}"),
        ),
        width=12,
    ),
    Graph(
        title="Records dropped per second",
        description="Records that monitors had to drop because their spools were full.",
        unit="cps",
        targets=(
            Target(
                f"sum by (project, run) ({rate('foreshock_records_dropped_total', 'projects')})",
                "{{run}}",
            ),
        ),
        width=12,
        links=_TO_RUN,
    ),
)


def fleet_dashboard() -> dict[str, Any]:
    """The dashboard as JSON."""
    built = new_dashboard(
        FLEET, "foreshock fleet", "All runs: risk, state, what is firing, the worst layers."
    )
    built = built.variables(prometheus_variables(one_run=False))
    built = built.with_row(dashboard.Row("Who needs a look?"))
    for one in _STATS:
        built = built.with_panel(one)
    built = built.with_panel(_RUNS)
    for other in (_RISKS, _firing()):
        built = built.with_panel(other)
    built = built.with_panel(state_timeline("projects"))
    built = built.with_row(dashboard.Row("Worst layers"))
    for worst in _LAYERS:
        built = built.with_panel(worst)
    built = built.with_row(dashboard.Row("The service"))
    for graph in _SERVICE:
        built = built.with_panel(graph)
    return document(built.with_row(runbook_row()))
