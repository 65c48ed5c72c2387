"""`/metrics`: the live runs and the service itself, read at scrape time.

Their names stand in `metric_names.py`. Keeps the number of series bounded: per run and role the
worst layer, and a few layers by name. The full detail is the API's, not Prometheus's.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample

from foreshock.api.alert_model import ALERT_NAMES, AlertKind
from foreshock.api.columns import TensorLayout
from foreshock.api.metric_names import (
    LAYER_METRICS,
    LAYER_STATISTICS,
    METRICS,
    RUN_METRICS,
    SERVICE_METRICS,
    TOP_LAYERS,
    WORST_METRICS,
    MetricSpec,
)
from foreshock.api.silence import RunState
from foreshock.monitor.record import HORIZONS, ROLES, Risk, StatisticColumns

__all__ = [
    "LAYER_STATISTICS",
    "METRICS",
    "FiringAlert",
    "MetricSpec",
    "RunReading",
    "ServiceTally",
    "metrics_of",
    "metrics_registry",
    "most_series",
]

FiringAlert = tuple[str, str, AlertKind]
"""Project, run and kind of an alert that is firing."""

ALERT_KINDS: Final[tuple[AlertKind, ...]] = tuple(ALERT_NAMES)

MOST_RUNS: Final = 500
"""Runs exposed at once, the most recently active ones."""

REMEMBERED_SECONDS: Final = 900.0
"""How long an alert that has ended is shown as not firing, be its run live or not."""

BUCKETS: Final[Mapping[str, tuple[float, ...]]] = {
    "foreshock_scoring_seconds": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5),
    "foreshock_risk_delay_seconds": (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
    "foreshock_alert_delivery_seconds": (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
}
"""Upper edges of each histogram, seconds: up to what is far too late."""

_INFO: Final = "foreshock_service_info"

_STATES: Final[tuple[RunState, ...]] = ("live", "stale", "finished")

_SCALAR_METRICS: Final = {
    "foreshock_loss": "loss",
    "foreshock_gradient_norm": "grad_norm",
    "foreshock_learning_rate": "learning_rate",
    "foreshock_step_seconds": "step_seconds",
    "foreshock_monitor_overhead_ratio": "overhead_ratio",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunReading:
    """The newest of one run, as a scrape shows it.

    Attributes:
        project: Project name.
        run: Run name.
        step: Newest optimizer step.
        time: When it ended, seconds since 1970.
        scalars: Newest value of each scalar.
        risk: Newest risk; None before the first.
        dropped: Records the monitor said it dropped.
        layout: The tensors that were measured last; None before the first.
        statistics: Their statistics, one value per row of the layout.
        state: What the run is doing; None if it is not watched.
        received: When it was heard of last, seconds since 1970 on the service's clock.
        clock_skew: Seconds its clock is behind.
        safe_since: When the last checkpoint seen was saved, or the first record, seconds since 1970
            on the run's clock; None if not known.
        checkpoint: When the last checkpoint seen was saved, likewise; None if there was none.
    """

    project: str
    run: str
    step: int
    time: float
    scalars: Mapping[str, float]
    risk: Risk | None = None
    dropped: float = 0.0
    layout: TensorLayout | None = None
    statistics: StatisticColumns | None = None
    state: RunState | None = None
    received: float | None = None
    clock_skew: float | None = None
    safe_since: float | None = None
    checkpoint: float | None = None


class _Histogram:
    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._buckets, value)] += times
        self._total += value * times

    def family(self, spec: MetricSpec) -> Metric:
        edges = [*(str(edge) for edge in self._buckets), "+Inf"]
        cumulative = map(float, np.cumsum(self._counts).tolist())
        buckets = list(zip(edges, cumulative, strict=True))
        return HistogramMetricFamily(spec.name, spec.help, buckets=buckets, sum_value=self._total)


class ServiceTally:
    """What the service counts about itself, from any thread.

    prometheus-client's own instruments are not used: they expose a `_created` series each, which
    only a process-wide switch turns off.

    Args:
        channels: Names of the channels that alerts go to: a counter has to be there with 0 before
            it counts, or its first rise is none.
    """

    def __init__(self, channels: Collection[str] = ()) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        outcomes = ("delivered", "failed", "abandoned")
        self._deliveries = Counter({(name, what): 0 for name in channels for what in outcomes})
        self._histograms = {name: _Histogram(edges) for name, edges in BUCKETS.items()}
        self._waiting: dict[tuple[str, int], float] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Raise a counter.

        Raises:
            ValueError: `METRICS` has no such unlabelled counter.
        """
        spec = METRICS.get(name)
        if spec is None or spec.kind != "counter" or spec.labels:
            raise ValueError(f"{name!r} is no unlabelled counter of METRICS")
        with self._lock:
            self._counts[name] += amount

    def delivery(self, channel: str, outcome: str, seconds: float | None = None) -> None:
        """Count a try to deliver an alert, and how long after the fact it succeeded."""
        with self._lock:
            self._deliveries[channel, outcome] += 1
            if seconds is not None:
                self._histograms["foreshock_alert_delivery_seconds"].observe(seconds)

    def waits(self, key: tuple[str, int]) -> None:
        """Records of this run and attempt are durable, and have no risk yet."""
        with self._lock:
            self._waiting.setdefault(key, time.monotonic())

    def answered(self, key: tuple[str, int]) -> None:
        """They have."""
        with self._lock:
            since = self._waiting.pop(key, None)
            if since is not None:
                waited = time.monotonic() - since
                self._histograms["foreshock_risk_delay_seconds"].observe(waited)

    def scored(self, seconds: float, records: int = 1) -> None:
        """Count records that were scored together, and the time they took."""
        with self._lock:
            self._counts["foreshock_scored_records_total"] += records
            scoring = self._histograms["foreshock_scoring_seconds"]
            scoring.observe(seconds / records, records)

    def value(self, name: str) -> int:
        """A counter's value."""
        with self._lock:
            return self._counts[name]

    def families(self) -> Iterator[Metric]:
        """All of it, for a scrape."""
        with self._lock:
            counts = dict(self._counts)
            tries = dict(self._deliveries)
            timings = [each.family(METRICS[name]) for name, each in self._histograms.items()]
        for spec in SERVICE_METRICS:
            if spec.kind == "counter" and not spec.labels:
                yield _family(spec, [((), counts.get(spec.name, 0))])
        yield _family(METRICS["foreshock_alert_deliveries_total"], list(tries.items()))
        yield from timings


def most_series() -> int:
    """The most samples of a scrape, whatever runs there are: runs, roles and layers are bounded."""
    values = {"horizon": len(HORIZONS), "kind": len(ALERT_KINDS), "state": 4, "role": len(ROLES)}
    values |= {"layer": TOP_LAYERS, "project": 1, "run": 1}
    specs = (*RUN_METRICS, *WORST_METRICS, *LAYER_METRICS)
    a_run = sum(math.prod(values[label] for label in spec.labels) for spec in specs)
    # Alerts of runs that have left memory, and the service's own.
    others = 2 * len(ALERT_KINDS) * MOST_RUNS + 1000
    return MOST_RUNS * a_run + others


def metrics_registry(
    *,
    tally: ServiceTally,
    runs: Callable[[], Sequence[RunReading]],
    firing: Callable[[], Collection[FiringAlert]],
    muted: Callable[[], Collection[FiringAlert]],
    gauges: Callable[[], Mapping[str, float]],
    info: Mapping[str, str] | None = None,
) -> CollectorRegistry:
    """A registry of its own (no process-wide one) that reads at scrape time.

    Args:
        tally: The service's counters.
        runs: Gives the live runs, the most recently active first.
        firing: Gives the alerts that are firing now, of live runs and of others.
        muted: Gives those of them that are acknowledged or snoozed.
        gauges: Gives the service's gauges by metric name.
        info: Labels of `foreshock_service_info`: version and url; None leaves it out.
    """
    registry = CollectorRegistry()
    registry.register(_Exposition(tally, runs, _Alarms(firing, muted), gauges, info))
    return registry


def metrics_of(registry: CollectorRegistry, projects: Collection[str] | None) -> CollectorRegistry:
    """The metrics that somebody kept to some projects may see.

    Args:
        registry: All of them.
        projects: Names; None = all. The service's own metrics belong to no project and are left
            out, for their sums would tell of runs elsewhere; what it is and where stays.
    """
    if projects is None:
        return registry
    shown = CollectorRegistry()
    shown.register(_OfProjects(registry, projects))
    return shown


class _OfProjects(Collector):
    def __init__(self, registry: CollectorRegistry, projects: Collection[str]) -> None:
        self._registry = registry
        self._projects = projects

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read anything."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        for family in self._registry.collect():
            samples = [s for s in family.samples if self._shows(s)]
            if samples:
                kept = Metric(family.name, family.documentation, family.type, family.unit)
                kept.samples = samples
                yield kept

    def _shows(self, sample: Sample) -> bool:
        return sample.name == _INFO or sample.labels.get("project") in self._projects


@dataclass(frozen=True, slots=True)
class _Alarms:
    firing: Callable[[], Collection[FiringAlert]]
    muted: Callable[[], Collection[FiringAlert]]


class _Exposition(Collector):
    def __init__(
        self,
        tally: ServiceTally,
        runs: Callable[[], Sequence[RunReading]],
        alarms: _Alarms,
        gauges: Callable[[], Mapping[str, float]],
        info: Mapping[str, str] | None,
    ) -> None:
        self._tally = tally
        self._runs = runs
        self._alarms = alarms
        self._fired: dict[FiringAlert, float] = {}
        self._gauges = gauges
        self._info = info

    def describe(self) -> Iterable[Metric]:
        """Names only: registering must not read anything."""
        return [_family(spec, []) for spec in METRICS.values() if spec.kind != "histogram"]

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        readings = self._runs()[:MOST_RUNS]
        samples: dict[str, list[_Sample]] = {}
        for reading in readings:
            for name, names, value in _run_samples(reading):
                samples.setdefault(name, []).append(((reading.project, reading.run, *names), value))
        samples |= self._alarm_samples(readings)
        for spec in (*RUN_METRICS, *WORST_METRICS, *LAYER_METRICS):
            yield _family(spec, samples.get(spec.name, []))
        for name, value in self._gauges().items():
            yield _family(METRICS[name], [((), value)])
        if self._info is not None:
            spec = METRICS[_INFO]
            yield _family(spec, [(tuple(self._info[label] for label in spec.labels), 1.0)])
        yield from self._tally.families()

    def _alarm_samples(self, readings: Sequence[RunReading]) -> dict[str, list[_Sample]]:
        """From the log, not the newest risk, so that a rule on it ends when the alert does."""
        firing = set(self._alarms.firing())
        muted = firing & set(self._alarms.muted())
        scored = [reading for reading in readings if reading.risk is not None]
        quiet = {(r.project, r.run, kind) for r in scored for kind in ALERT_KINDS}
        keys = sorted({*quiet, *firing, *self._recently(firing)})
        return {
            "foreshock_alert_firing": [(key, float(key in firing)) for key in keys],
            "foreshock_alert_muted": [(key, float(key in muted)) for key in keys],
        }

    def _recently(self, firing: Collection[FiringAlert]) -> Collection[FiringAlert]:
        """What fired a little while ago: rules remember, so an end has to be seen as a 0."""
        now = time.monotonic()
        kept = {key: at for key, at in self._fired.items() if now - at < REMEMBERED_SECONDS}
        self._fired = kept | dict.fromkeys(firing, now)
        return self._fired.keys()


_Sample = tuple[tuple[str, ...], float]


def _family(spec: MetricSpec, samples: Sequence[_Sample]) -> Metric:
    family: GaugeMetricFamily | CounterMetricFamily
    if spec.kind == "counter":
        family = CounterMetricFamily(spec.name, spec.help, labels=spec.labels)
    else:
        family = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
    for names, value in samples:
        family.add_metric(names, value)
    return family


def _run_samples(reading: RunReading) -> Iterator[tuple[str, tuple[str, ...], float]]:
    yield "foreshock_step", (), float(reading.step)
    yield "foreshock_last_record_timestamp_seconds", (), reading.time
    yield "foreshock_records_dropped_total", (), reading.dropped
    yield from _presence_samples(reading)
    yield from _stake_samples(reading)
    for name, scalar in _SCALAR_METRICS.items():
        if scalar in reading.scalars:
            yield name, (), reading.scalars[scalar]
    if reading.risk is not None:
        for horizon, probability in reading.risk.probability.items():
            if probability is not None:
                yield "foreshock_divergence_risk_ratio", (str(horizon),), probability
        for state in ("ok", "pending", "firing", "resolved"):
            yield "foreshock_alert_state", (state,), float(reading.risk.state == state)
    if reading.layout is not None and reading.statistics is not None:
        yield from _tensor_samples(reading.layout, reading.statistics)


def _stake_samples(reading: RunReading) -> Iterator[tuple[str, tuple[str, ...], float]]:
    if reading.risk is not None and reading.risk.expected_lead is not None:
        yield "foreshock_expected_lead_steps", (), reading.risk.expected_lead
    if reading.safe_since is not None:
        yield "foreshock_at_risk_seconds", (), max(reading.time - reading.safe_since, 0.0)
    if reading.checkpoint is not None:
        yield "foreshock_last_checkpoint_timestamp_seconds", (), reading.checkpoint


def _presence_samples(reading: RunReading) -> Iterator[tuple[str, tuple[str, ...], float]]:
    if reading.received is not None:
        yield "foreshock_last_received_timestamp_seconds", (), reading.received
    if reading.clock_skew is not None:
        yield "foreshock_clock_skew_seconds", (), reading.clock_skew
    if reading.state is not None:
        for doing in _STATES:
            yield "foreshock_run_state", (doing,), float(reading.state == doing)


def _tensor_samples(
    layout: TensorLayout, statistics: StatisticColumns
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for known in LAYER_STATISTICS:
        values = statistics.get(known.statistic)
        if values is None:
            continue
        for role, rows in layout.rows_of_role.items():
            worst = _worst_layers(layout, values[rows], rows, known.worst == "largest")
            for place, (layer, value) in enumerate(worst):
                if place == 0:
                    yield f"foreshock_{known.suffix}", (role,), value
                yield f"foreshock_layer_{known.suffix}", (role, layer), value


def _worst_layers(
    layout: TensorLayout,
    values: np.ma.MaskedArray[Any, Any],
    rows: np.ndarray[Any, np.dtype[np.intp]],
    largest: bool,
) -> list[tuple[str, float]]:
    """The worst layers first, at most `TOP_LAYERS`, each once."""
    known = ~np.ma.getmaskarray(values) & ~np.isnan(values.data)
    kept, rows = values.data[known], rows[known]
    found: dict[str, float] = {}
    # Stable, so that equal layers do not take turns in the exposition.
    for place in np.argsort(-kept if largest else kept, kind="stable"):
        found.setdefault(layout.layers[int(rows[place])], float(kept[place]))
        if len(found) == TOP_LAYERS:
            break
    return list(found.items())
