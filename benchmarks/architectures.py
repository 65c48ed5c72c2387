"""Every architecture in every precision: does it train, and how large do its outliers grow?

    python -m benchmarks.architectures [--steps 200] [--width 128] [--seeds 1] [--rate 2e-3]
        [--processes 2]

Trains each on the default text and watches it with the monitor. Loss is the mean of the last 20
steps, kurtosis the mean over layers and over the measured ones of those steps: of the input of the
last GEMM of the feed-forward, of the input of the QKV GEMM (behind the norm, where there is one)
and of the residual stream after a layer. `pooled` is over all elements of a tensor, `sequence`
FOG's mean over sequences, `worst` that of the layer that has the largest mean, pooled; x is Llama
3's value in the same precision over this one. Several seeds give the mean of the logarithms. Rows
come as runs end, those with x at the end.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, get_args

import pyarrow as pa

from benchmarks.side_by_side import row, side_by_side
from foreshock.monitor.record import StepRecord, table_to_records
from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.loop import train
from foreshock.trainer.watched import watched

LAST: Final = 20
EVERY: Final = 5
PLACES: Final[Mapping[str, tuple[str, str]]] = {
    "MLP hidden": (".down", "input"),
    "QKV input": (".qkv", "input"),
    "residual": (".residual", "residual"),
}
KINDS: Final = {"pooled": "kurtosis", "sequence": "kurtosis_sequence_mean"}


def precisions() -> dict[str, PrecisionConfig]:
    """Linear layers in BF16, in FP8, and in FP8 with attention's own products."""
    return {
        "bf16": PrecisionConfig(backend="bf16"),
        "FP8": PrecisionConfig(),
        "FP8DPA": PrecisionConfig(attention="fp8"),
    }


class Tail:
    """A sink that keeps the kurtosis of a run's last steps."""

    def __init__(self, first: int) -> None:
        self.first, self.logs = first, dict[tuple[str, str], dict[str, list[float]]]()

    def __call__(self, batch: pa.RecordBatch) -> None:
        """Take one record."""
        for record in table_to_records(pa.Table.from_batches([batch])):
            if record.step >= self.first:
                self._take(record)

    def _take(self, record: StepRecord) -> None:
        for tensor in record.tensors:
            for place, (ending, role) in PLACES.items():
                layer = tensor.identity.layer
                if tensor.identity.role == role and layer.endswith(ending):
                    for kind, statistic in KINDS.items():
                        value = getattr(tensor, statistic)
                        if value is not None and math.isfinite(value):
                            of_layers = self.logs.setdefault((place, kind), {})
                            of_layers.setdefault(layer, []).append(value)

    def means(self) -> dict[tuple[str, str], float]:
        """Mean of each value over layers, and the mean of the layer that has the largest."""
        found = {}
        for (place, kind), of_layers in self.logs.items():
            means = [mean(values) for values in of_layers.values()]
            found[place, kind] = mean(means)
            if kind == "pooled":
                found[place, "worst"] = max(means)
        return found


def run(config: RunConfig) -> tuple[float, float, dict[tuple[str, str], float]]:
    """Loss of the first and of the last 20 steps, and kurtosis."""
    tail = Tail(config.steps - LAST)
    with tempfile.TemporaryDirectory() as folder:
        watch = watched(config, spool=Path(folder), sinks=[tail], activations=True)
        losses = [step.loss for step in train(config, watch=watch).steps]
    return mean(losses[:LAST]), mean(losses[-LAST:]), tail.means()


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    held = list(values)
    return sum(held) / len(held)


def geometric(values: Iterable[float]) -> float:
    """Geometric mean."""
    return math.exp(mean(math.log(value) for value in values))


def config(
    architecture: Architecture, precision: PrecisionConfig, seed: int, options: argparse.Namespace
) -> RunConfig:
    """One run of the table."""
    return RunConfig(
        name=f"{architecture}-{seed}",
        model=ModelConfig(architecture=architecture, width=options.width),
        precision=precision,
        optimizer=OptimizerConfig(learning_rate=options.rate),
        schedule=ScheduleConfig(warmup_steps=50),
        data=DataConfig(sequence_length=128, batch_size=4),
        steps=options.steps,
        seed=seed,
        tensor_every=EVERY,
    )


Job = tuple[str, Architecture, int]
Outcome = tuple[float, float, dict[tuple[str, str], float]]


def one(options: argparse.Namespace, job: Job) -> Outcome:
    """A run of the table."""
    precision, architecture, seed = job
    os.environ.pop("FORESHOCK_URL", None)
    return run(config(architecture, precisions()[precision], seed, options))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(get_args(Architecture)))
    options = parser.parse_args()
    jobs: list[Job] = [
        (precision, architecture, seed)
        for seed in range(options.seeds)
        for precision in precisions()
        for architecture in options.only
    ]
    runs: dict[Job, Outcome] = {}
    began = time.perf_counter()
    for job, found in side_by_side(functools.partial(one, options), jobs, options.processes):
        runs[job] = found
        numbers = ", ".join(f"{' '.join(key)} {value:.4g}" for key, value in found[2].items())
        seconds = time.perf_counter() - began
        print(f"{seconds:.0f} s {job}: {found[0]:.3f} -> {found[1]:.3f}; {numbers}", flush=True)
    table(options, runs)


def table(options: argparse.Namespace, runs: Mapping[Job, Outcome]) -> None:
    """All of it, with factors."""
    columns = [(place, kind) for place in PLACES for kind in (*KINDS, "worst")]
    heads = [name for place, kind in columns for name in (f"{place}, {kind}", "x")]
    row("precision", "architecture", "first loss", "last loss", *heads)
    row(*["---"] * (4 + len(heads)))
    for precision in precisions():
        llama: dict[tuple[str, str], float] = {}
        for architecture in options.only:
            found = [
                runs[key]
                for seed in range(options.seeds)
                if (key := (precision, architecture, seed)) in runs
            ]
            if not found:
                continue
            values = {c: geometric(r[2].get(c, math.nan) for r in found) for c in columns}
            llama = llama or values
            cells = [
                x for c in columns for x in (f"{values[c]:.1f}", f"{llama[c] / values[c]:.2g}")
            ]
            losses = [f"{mean(r[0] for r in found):.3f}", f"{mean(r[1] for r in found):.3f}"]
            row(precision, architecture, *losses, *cells)


if __name__ == "__main__":
    main()
