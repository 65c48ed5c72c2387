"""The state of a run for Prometheus, from inside the job: a sink with a /metrics of its own.

Aggregates over layers, and the worst few layers by name, so that the number of series does not grow
with the model. What is shown is the latest record that had it; nothing is kept of older ones.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foreshock.monitor.record import StepRecord, TensorStatistics, table_to_records

__all__ = ["PrometheusSink"]

_SCALARS: Final = {
    "loss": ("foreshock_job_loss", "Loss of the latest step."),
    "grad_norm": ("foreshock_job_gradient_norm", "Gradient norm before clipping."),
    "learning_rate": ("foreshock_job_learning_rate", "Learning rate of the latest step."),
    "step_seconds": ("foreshock_job_step_duration_seconds", "Time of the latest step."),
    "overhead_ratio": (
        "foreshock_job_monitor_overhead_ratio",
        "Time in the monitor over time outside of it.",
    ),
}

# Statistic, name, whether a small value is the bad one, help.
_STATISTICS: Final = (
    ("amax", "amax", False, "Largest magnitude."),
    ("kurtosis", "kurtosis", False, "Kurtosis about zero, Gaussian = 3."),
    ("headroom_log2", "fp8_headroom_log2", True, "log2 of largest representable over amax."),
    ("underflow_ratio", "fp8_underflow_ratio", False, "Share of elements flushed to zero."),
    ("overflow_ratio", "fp8_overflow_ratio", False, "Share of elements that saturate."),
)


@dataclass
class _State:
    """What is shown."""

    step: int = -1
    scalars: dict[str, float] = field(default_factory=dict)
    tensors: tuple[TensorStatistics, ...] = ()
    nonfinite: int = 0
    dropped: int = 0


class PrometheusSink:
    """Serves the latest record of a watch to Prometheus. Pass it in `watch(..., sinks=[...])`.

    Args:
        run: The label of every series; several sinks of one process have different ports.
        port: Where to listen; 0 takes a free one.
        address: Loopback by default: there is no login.
        top_k: Layers that are named per statistic.

    Attributes:
        port: Where it listens.

    Raises:
        ValueError: top_k is negative or port is none.
        OSError: The port is taken; the message says what to do.
    """

    def __init__(
        self, run: str, *, port: int = 9464, address: str = "127.0.0.1", top_k: int = 10
    ) -> None:
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}; allowed: 0 or more")
        if not 0 <= port < 2**16:
            raise ValueError(f"port is {port}; allowed: 0 to 65535")
        self._exposition = _Exposition(run, top_k)
        # Its own registry: the process may have one for other things, or two watches.
        registry = CollectorRegistry()
        registry.register(self._exposition)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot listen on {address}:{port} ({error.strerror}); pass another port, or 0",
            ) from error
        self.port: int = self._server.server_port

    def __call__(self, record: pa.RecordBatch) -> None:
        """Take one record."""
        for step in table_to_records(pa.Table.from_batches([record])):
            self._exposition.take(step)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)


class _Exposition(Collector):
    """Turns the state into metric families when Prometheus asks."""

    def __init__(self, run: str, top_k: int) -> None:
        self._run = run
        self._top_k = top_k
        self._state = _State()
        self._lock = threading.Lock()

    def take(self, record: StepRecord) -> None:
        """Show this record from now on."""
        kinds = [event.kind for event in record.events]
        with self._lock:
            state = self._state
            state.step = record.step
            state.scalars |= record.scalars
            state.nonfinite += kinds.count("nonfinite")
            state.dropped += kinds.count("dropped")
            if record.tensors:
                state.tensors = tuple(t for t in record.tensors if not t.identity.what_if)

    def collect(self) -> Iterator[Metric]:
        """The families, nothing before the first record but the counters."""
        with self._lock:
            state = _State(
                self._state.step,
                dict(self._state.scalars),
                self._state.tensors,
                self._state.nonfinite,
                self._state.dropped,
            )
        if state.step >= 0:
            yield self._gauge("foreshock_job_step", "Latest optimizer step.", {(): state.step})
        for name, (metric, text) in _SCALARS.items():
            if name in state.scalars:
                yield self._gauge(metric, text, {(): state.scalars[name]})
        yield from self._of_tensors(state.tensors)
        for metric, text, value in (
            (
                "foreshock_job_nonfinite",
                "Steps at which the run stopped being finite.",
                state.nonfinite,
            ),
            (
                "foreshock_job_records_dropped",
                "Records with a word about dropped ones.",
                state.dropped,
            ),
        ):
            family = CounterMetricFamily(metric, text, labels=["run"])
            family.add_metric([self._run], value)
            yield family

    def _of_tensors(self, tensors: tuple[TensorStatistics, ...]) -> Iterator[Metric]:
        for statistic, name, small_is_bad, text in _STATISTICS:
            found = [
                (float(value), tensor.identity.role, tensor.identity.layer)
                for tensor in tensors
                if (value := getattr(tensor, statistic)) is not None
            ]
            if not found:
                continue
            sign = -1.0 if small_is_bad else 1.0
            # NaN is the worst there is, and compares with nothing.
            worst_first = sorted(found, key=lambda f: _badness(sign * f[0]), reverse=True)
            roles: dict[tuple[str, ...], float] = {}
            for value, role, _ in worst_first:
                roles.setdefault((role,), value)
            yield self._gauge(f"foreshock_job_{name}", f"{text} Worst layer.", roles, "role")
            layers: dict[tuple[str, ...], float] = {}
            for value, role, layer in heapq.nlargest(
                self._top_k, found, key=lambda f: _badness(sign * f[0])
            ):
                layers.setdefault((role, layer), value)
            if layers:
                metric = f"foreshock_job_layer_{name}"
                yield self._gauge(metric, f"{text} Worst layers.", layers, "role", "layer")

    def _gauge(
        self, name: str, text: str, values: Mapping[tuple[str, ...], float], *labels: str
    ) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["run", *labels])
        for key, value in values.items():
            family.add_metric([self._run, *key], value)
        return family


def _badness(value: float) -> tuple[bool, float]:
    return (value != value, 0.0 if value != value else value)
