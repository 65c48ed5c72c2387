"""The dashboard of one run over time: what Prometheus scraped of it, and nothing else.

Works without any plugin. Step axes, every layer and old runs are the numerics dashboard's.
"""

from __future__ import annotations

from typing import Any, Final

from dashboards.parts import (
    FLEET,
    NUMERICS,
    OPERANDS,
    PROMETHEUS,
    RUN,
    Graph,
    Override,
    Stat,
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
from dashboards.runbook import runbook_url
from dashboards.states import STATE_MAP, state_number, state_timeline
from grafana_foundation_sdk.builders import dashboard

from foreshock.api.alert_log import ALERT_NAMES

__all__ = ["run_dashboard"]

_HERE: Final = "${"
_RISKS: Final = Target(
    f"max by (horizon) ({series('foreshock_divergence_risk_ratio', 'run')})",
    "risk, {{horizon}} steps",
)
_BEHIND: Final = Override(
    "byFrameRefID",
    "B",
    {
        "unit": "percentunit",
        "min": 0,
        "max": 1,
        "custom.axisPlacement": "right",
        "custom.axisLabel": "risk",
        "custom.lineWidth": 0,
        "custom.fillOpacity": 25,
    },
)
"""Risks as areas behind the line, on an axis of their own."""


def _over(title: str, description: str, metric: str, legend: str) -> Graph:
    return Graph(
        title=title,
        description=f"{description} Behind it, on the right, the risk per horizon: the probability "
        "that the loss starts to diverge within so many steps. A horizon that the forecaster "
        "cannot support has no area. Marks: alarms and checkpoints.",
        unit="none",
        targets=(Target(_value(metric), legend), _RISKS),
        width=12,
        height=10,
        overrides=(_BEHIND,),
    )


def _value(metric: str) -> str:
    # Over instances: a run that moved to another replica is one line.
    return f"max({series(metric, 'run')})"


def _single(title: str, description: str, unit: str, metric: str, **more: Any) -> Graph:
    legend = title[0].lower() + title[1:]
    return Graph(
        title=title,
        description=description,
        unit=unit,
        targets=(Target(_value(metric), legend),),
        **more,
    )


def _by_role(title: str, description: str, unit: str, metric: str, worst: str = "max") -> Graph:
    return Graph(
        title=title,
        description=f"{description} Worst layer per operand of the GEMMs.",
        unit=unit,
        targets=(
            Target(f"{worst} by (role) ({series(metric, 'run', more=OPERANDS)})", "{{role}}"),
        ),
        links=(_numerics("&var-role=${__field.labels.role}"),),
    )


def _layers(title: str, description: str, unit: str, metric: str, pick: str = "topk") -> Graph:
    over = "max" if pick == "topk" else "min"
    return Graph(
        title=title,
        description=f"{description} The five worst operands of GEMMs; a point leads to the layer's "
        "numerics.",
        unit=unit,
        targets=(
            Target(
                f"{pick}(5, {over} by (layer, role) ({series(metric, 'run', more=OPERANDS)}))",
                "{{layer}} {{role}}",
            ),
        ),
        width=12,
        links=(_numerics("&var-layer=${__field.labels.layer}&var-role=${__field.labels.role}"),),
    )


def _numerics(more: str) -> dashboard.DashboardLink:
    return run_link("Numerics", NUMERICS, _HERE, more)


_STATS: Final = (
    Stat(
        title="Alert",
        description="State of the service's own alert on this run.",
        unit="none",
        targets=(Target(state_number("run"), "alert"),),
        mappings=(STATE_MAP,),
    ),
    Stat(
        title="Risk",
        description="Newest probability per horizon that the loss starts to diverge within so many "
        "steps.",
        unit="percentunit",
        targets=(
            Target(
                f"max by (horizon) ({series('foreshock_divergence_risk_ratio', 'run')})",
                "{{horizon}} steps",
            ),
        ),
        width=8,
        steps=((None, "green"), (0.2, "orange"), (0.5, "red")),
    ),
    Stat(
        title="Expected lead",
        description="Steps until the loss rises, given that it does: how much time there is.",
        unit="none",
        targets=(Target(_value("foreshock_expected_lead_steps"), "steps"),),
    ),
    Stat(
        title="Since checkpoint",
        description="Training since the last checkpoint seen (or the first record): what is lost "
        "if it diverges now.",
        unit="s",
        targets=(Target(_value("foreshock_at_risk_seconds"), "since checkpoint"),),
    ),
    Stat(
        title="Last step",
        description="Newest optimizer step. Standing still while the job runs: records do not "
        "arrive.",
        unit="none",
        targets=(Target(_value("foreshock_step"), "step"),),
    ),
)
_RISK: Final = (
    _over(
        "Loss",
        "Training loss of the newest step, as the run reported it.",
        "foreshock_loss",
        "loss",
    ),
    _over(
        "Gradient norm",
        "Norm of the gradient before clipping.",
        "foreshock_gradient_norm",
        "gradient norm",
    ),
)
_TENSORS: Final = (
    _by_role(
        "Kurtosis by role",
        "Kurtosis about zero. Gaussian is 3; a steady rise means outliers.",
        "none",
        "foreshock_kurtosis",
    ),
    _by_role(
        "Headroom by role",
        "Binades between the largest element and the format's largest value. Below 0 the cast "
        "saturates now.",
        "none",
        "foreshock_fp8_headroom_log2",
        "min",
    ),
    _by_role("Largest magnitude by role", "Largest absolute element.", "none", "foreshock_amax"),
    _by_role(
        "Underflow by role",
        "Share of elements that the cast flushes to zero.",
        "percentunit",
        "foreshock_fp8_underflow_ratio",
    ),
    _by_role(
        "Overflow by role",
        "Share of elements beyond the format's largest value before the cast.",
        "percentunit",
        "foreshock_fp8_overflow_ratio",
    ),
    _single(
        "Learning rate",
        "Learning rate of the newest step, largest parameter group.",
        "none",
        "foreshock_learning_rate",
    ),
)
_LAYERS: Final = (
    _layers(
        "Layers with the largest kurtosis",
        "Where the outliers are.",
        "none",
        "foreshock_layer_kurtosis",
    ),
    _layers(
        "Layers with the least headroom",
        "Which layers saturate first.",
        "none",
        "foreshock_layer_fp8_headroom_log2",
        "bottomk",
    ),
    _layers(
        "Layers with the largest overflow",
        "Which layers saturate most.",
        "percentunit",
        "foreshock_layer_fp8_overflow_ratio",
    ),
    _layers(
        "Layers with the largest underflow",
        "Which layers lose most to zero.",
        "percentunit",
        "foreshock_layer_fp8_underflow_ratio",
    ),
)
_COST: Final = (
    _single(
        "Monitor overhead",
        "Share of step time that the monitor takes, as the monitor measures it.",
        "percentunit",
        "foreshock_monitor_overhead_ratio",
        least=0,
    ),
    _single("Step time", "Duration of the newest optimizer step.", "s", "foreshock_step_seconds"),
    Graph(
        title="Records dropped per second",
        description="Records that this run's monitor had to drop because its spool was full; "
        "forecasts rest on what is left.",
        unit="cps",
        targets=(Target(f"sum({rate('foreshock_records_dropped_total', 'run')})", "dropped"),),
    ),
    _single(
        "Clock behind",
        "How far the run's clock is behind the service's; late delivery looks like it.",
        "s",
        "foreshock_clock_skew_seconds",
    ),
    Graph(
        title="Heard of",
        description="Time since the service heard of the run last. Rising: the job is silent.",
        unit="s",
        targets=(
            Target(
                f"time() - max({series('foreshock_last_received_timestamp_seconds', 'run')})",
                "silent for",
            ),
        ),
        least=0,
    ),
    _single(
        "Step",
        "Newest optimizer step. Flat while the job runs: records do not arrive.",
        "none",
        "foreshock_step",
    ),
)
_ROWS: Final = (
    ("Tensors: worst layer per role", _TENSORS),
    ("Tensors: which layers", _LAYERS),
    ("What watching costs", _COST),
)


def _alarms() -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name("Alarms")
        .datasource(PROMETHEUS)
        .enable(True)
        .icon_color("red")
        .expr(f"max by (project, run, kind) ({series('foreshock_alert_firing', 'run')}) == 1")
        .title_format("{{kind}}")
        .text_format("alert of kind {{kind}} on {{run}}")
        .tag_keys("kind,run")
        .step("5s")
    )


def _checkpoints() -> dashboard.AnnotationQuery:
    """The value is when it was saved, in milliseconds, however late a scrape saw it."""
    saved = series("foreshock_last_checkpoint_timestamp_seconds", "run")
    return (
        dashboard.AnnotationQuery()
        .name("Checkpoints")
        .datasource(PROMETHEUS)
        .enable(True)
        .icon_color("green")
        .expr(f"max by (project, run) ({saved}) * 1000")
        .title_format("checkpoint")
        .text_format("checkpoint of {{run}}")
        .tag_keys("run")
        .step("5s")
        .use_value_for_time(True)
    )


def run_dashboard() -> dict[str, Any]:
    """The dashboard as JSON."""
    built = new_dashboard(
        RUN,
        "foreshock run",
        "One training run: divergence risk, loss and FP8 tensor statistics over time.",
    )
    built = built.variables(prometheus_variables(one_run=True)).links(
        [
            data_link("All runs", f"/d/{FLEET}/{FLEET}?${{__url_time_range}}"),
            run_link("Numerics of this run", NUMERICS, _HERE),
            page_link("Diagnosis of this run", _HERE),
            data_link("Runbook", runbook_url(ALERT_NAMES["forecast"])),
        ]
    )
    built = built.annotation(_alarms()).annotation(_checkpoints())
    built = built.with_row(dashboard.Row("Is it going to diverge?"))
    for panel in (*_STATS, *_RISK):
        built = built.with_panel(panel)
    built = built.with_panel(state_timeline("run"))
    for title, graphs in _ROWS:
        built = built.with_row(dashboard.Row(title))
        for graph in graphs:
            built = built.with_panel(graph)
    return document(built)
