"""Names, labels and help texts of every metric of the service; holds no values.

Dashboards and rules take them from here too, so that a metric that the service no longer has fails
there. Everything that labels could multiply is bounded: `TOP_LAYERS`, and `MOST_RUNS` in
`exposition.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

__all__ = [
    "LAYER_METRICS",
    "LAYER_STATISTICS",
    "METRICS",
    "RUN_METRICS",
    "SERVICE_METRICS",
    "TOP_LAYERS",
    "WORST_METRICS",
    "LayerStatistic",
    "MetricSpec",
]

MetricKind = Literal["gauge", "counter", "histogram"]

TOP_LAYERS: Final = 5
"""Layers by name per run, role and statistic."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: As it stands in PromQL.
        kind: gauge, counter or histogram.
        help: One line.
        labels: Label names.
    """

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerStatistic:
    """A statistic of tensors that is exposed.

    Attributes:
        statistic: Its name in the record.
        suffix: Its name in metrics, after `foreshock_` or `foreshock_layer_`.
        worst: Which end is bad.
        meaning: For the help text.
    """

    statistic: str
    suffix: str
    worst: Literal["largest", "smallest"]
    meaning: str


LAYER_STATISTICS: Final = (
    LayerStatistic(
        "underflow_ratio", "fp8_underflow_ratio", "largest", "Share of elements flushed to zero"
    ),
    LayerStatistic(
        "overflow_ratio", "fp8_overflow_ratio", "largest", "Share of elements beyond the format"
    ),
    LayerStatistic(
        "headroom_log2", "fp8_headroom_log2", "smallest", "Binades left above the largest element"
    ),
    LayerStatistic("kurtosis", "kurtosis", "largest", "Kurtosis about zero, Gaussian is 3"),
    LayerStatistic("amax", "amax", "largest", "Largest magnitude"),
)

_RUN: Final = ("project", "run")

RUN_METRICS: Final = (
    MetricSpec(
        "foreshock_divergence_risk_ratio",
        "gauge",
        "Probability that the loss starts to diverge within so many steps",
        (*_RUN, "horizon"),
    ),
    MetricSpec("foreshock_loss", "gauge", "Training loss of the newest step", _RUN),
    MetricSpec("foreshock_gradient_norm", "gauge", "Gradient norm before clipping", _RUN),
    MetricSpec("foreshock_learning_rate", "gauge", "Learning rate of the newest step", _RUN),
    MetricSpec("foreshock_step", "gauge", "Newest optimizer step", _RUN),
    MetricSpec("foreshock_step_seconds", "gauge", "Duration of the newest step", _RUN),
    MetricSpec(
        "foreshock_expected_lead_steps", "gauge", "Steps until the loss rises, given it does", _RUN
    ),
    MetricSpec(
        "foreshock_at_risk_seconds",
        "gauge",
        "Training since the last checkpoint (or the first record) seen, lost if it diverges now",
        _RUN,
    ),
    MetricSpec(
        "foreshock_last_checkpoint_timestamp_seconds",
        "gauge",
        "When the newest checkpoint seen was saved, by the run's clock",
        _RUN,
    ),
    MetricSpec(
        "foreshock_last_record_timestamp_seconds", "gauge", "When the newest step ended", _RUN
    ),
    MetricSpec(
        "foreshock_last_received_timestamp_seconds",
        "gauge",
        "When the run was heard of last, on the service's clock",
        _RUN,
    ),
    MetricSpec(
        "foreshock_clock_skew_seconds",
        "gauge",
        "How far the run's clock is behind the service's; late delivery looks like it",
        _RUN,
    ),
    MetricSpec(
        "foreshock_run_state",
        "gauge",
        "1 for what the run is doing (live, stale, finished), 0 for the others",
        (*_RUN, "state"),
    ),
    MetricSpec(
        "foreshock_monitor_overhead_ratio", "gauge", "Share of step time spent monitoring", _RUN
    ),
    MetricSpec(
        "foreshock_alert_state",
        "gauge",
        "1 for the state the run's alert is in, 0 for the others",
        (*_RUN, "state"),
    ),
    MetricSpec(
        "foreshock_alert_firing",
        "gauge",
        "1 while the run's alert of this kind (forecast, detection, nonfinite, silence) is firing",
        (*_RUN, "kind"),
    ),
    MetricSpec(
        "foreshock_alert_muted",
        "gauge",
        "1 while the run's firing alert of this kind is acknowledged or snoozed",
        (*_RUN, "kind"),
    ),
    MetricSpec(
        "foreshock_records_dropped_total",
        "counter",
        "Records the run's monitor had to drop, as it reported them",
        _RUN,
    ),
)

WORST_METRICS: Final = tuple(
    MetricSpec(
        f"foreshock_{known.suffix}", "gauge", f"{known.meaning}, worst layer", (*_RUN, "role")
    )
    for known in LAYER_STATISTICS
)

LAYER_METRICS: Final = tuple(
    MetricSpec(
        f"foreshock_layer_{known.suffix}",
        "gauge",
        f"{known.meaning}, the {TOP_LAYERS} worst layers",
        (*_RUN, "role", "layer"),
    )
    for known in LAYER_STATISTICS
)

SERVICE_METRICS: Final = (
    MetricSpec(
        "foreshock_service_info",
        "gauge",
        "Always 1; version of the service, and where people reach its page",
        ("version", "url"),
    ),
    MetricSpec("foreshock_live_runs", "gauge", "Runs in the memory of the live analysis"),
    MetricSpec("foreshock_event_readers", "gauge", "Readers of the event stream"),
    MetricSpec("foreshock_scoring_queue_length", "gauge", "Batches waiting to be scored"),
    MetricSpec("foreshock_ingest_batches_total", "counter", "Batches made durable"),
    MetricSpec("foreshock_ingest_records_total", "counter", "Records made durable"),
    MetricSpec("foreshock_ingest_tensors_total", "counter", "Tensor rows made durable"),
    MetricSpec("foreshock_scored_records_total", "counter", "Records scored"),
    MetricSpec(
        "foreshock_late_records_total",
        "counter",
        "Records that came after a later step had been scored; stored, not scored",
    ),
    MetricSpec(
        "foreshock_analysis_rereads_total",
        "counter",
        "Times a run was read again from the store because the queue was full",
    ),
    MetricSpec("foreshock_analysis_errors_total", "counter", "Failures of the live analysis"),
    MetricSpec("foreshock_scoring_seconds", "histogram", "Time to score one record"),
    MetricSpec(
        "foreshock_risk_delay_seconds",
        "histogram",
        "Time from a batch being durable to the risk at its records being known",
    ),
    MetricSpec(
        "foreshock_alert_delivery_seconds",
        "histogram",
        "Time from an alert firing or ending to a receiver having been told",
    ),
    MetricSpec(
        "foreshock_alert_deliveries_total",
        "counter",
        "Tries to deliver an alert",
        ("channel", "outcome"),
    ),
)

METRICS: Final[Mapping[str, MetricSpec]] = {
    spec.name: spec for spec in (*RUN_METRICS, *WORST_METRICS, *LAYER_METRICS, *SERVICE_METRICS)
}
"""Every metric of the service, by name."""
