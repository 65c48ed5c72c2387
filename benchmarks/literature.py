"""Two failures of the literature, small: FP8 attention in Llama 3 and FOG, and biased attention.

    python -m benchmarks.literature --part attention [--steps 600] [--rates 2e-3 8e-3 2e-2]
    python -m benchmarks.literature --part bias [--steps 300]

`attention` trains Llama 3, OLMo 2 and FOG-max with BF16, FP8 and FP8DPA (attention's products in
FP8 too, delayed scaling) at several learning rates. Loss is the mean of the last 20 steps, `gap`
its distance to BF16's at the same rate and seed, `worst` the largest loss after the warm-up over
the smallest before it; kurtosis is of the worst layer, pooled, at the end: of the stream, of the
queries and keys, of the input of the QKV GEMM. FOG (arXiv:2505.20524) reports that Llama-like
models fail with FP8DPA and FOG does not, after many more tokens than here.

`bias` takes attention with bfloat16 output (arXiv:2510.04212). First its rounding alone: rows with
several logits tied at the maximum and values of one sign; the signed error of the output and of
D = rowsum(dO O), and how one-signed it is (|sum| / sum of magnitudes, 1 = wholly). Then training
with and without the two mends: the same of D over all steps and layers, and the loss.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa
import torch
from torch import nn

from benchmarks.side_by_side import row, side_by_side
from foreshock.monitor.record import table_to_records
from foreshock.trainer.config import (
    Architecture,
    AttentionName,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.loop import train
from foreshock.trainer.precision.biased_attention import BIASED, BiasedAttention
from foreshock.trainer.watched import watched

PRECISIONS: Final = {
    "bf16": PrecisionConfig(backend="bf16"),
    "FP8": PrecisionConfig(),
    "FP8DPA": PrecisionConfig(attention="fp8"),
}
PLACES: Final = {
    "stream": ("residual", ".residual"),
    "query, key": ("qk", ""),
    "QKV input": ("input", ".qkv"),
}
LAST: Final = 20
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of the first table."""

    architecture: Architecture
    precision: str
    rate: float
    seed: int
    steps: int
    width: int
    layers: int
    device: Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it."""

    loss: float
    worst: float
    ended: str
    kurtosis: dict[str, float]


class Outliers:
    """A sink that keeps each place's largest kurtosis of a run's last steps."""

    def __init__(self, first: int) -> None:
        self.first, self.worst = first, dict[str, float]()

    def __call__(self, batch: pa.RecordBatch) -> None:
        """Take one record."""
        for record in table_to_records(pa.Table.from_batches([batch])):
            if record.step < self.first:
                continue
            for tensor in record.tensors:
                role, layer, value = tensor.identity.role, tensor.identity.layer, tensor.kurtosis
                role = "qk" if role in ("query", "key") else role
                for place, (wanted, ending) in PLACES.items():
                    if role == wanted and layer.endswith(ending) and value and value > 0:
                        self.worst[place] = max(self.worst.get(place, 0.0), value)


def config_of(job: Job) -> RunConfig:
    """The run of a job."""
    return RunConfig(
        name="literature",
        model=ModelConfig(architecture=job.architecture, width=job.width, layers=job.layers),
        precision=PRECISIONS[job.precision],
        optimizer=OptimizerConfig(learning_rate=job.rate),
        schedule=ScheduleConfig(warmup_steps=50),
        data=DataConfig(sequence_length=128, batch_size=8),
        steps=job.steps,
        seed=job.seed,
        tensor_every=5,
        execution=ExecutionConfig(device=job.device),
    )


def outcome(job: Job) -> Outcome:
    """Train it, watched."""
    os.environ.pop("FORESHOCK_URL", None)
    outliers = Outliers(job.steps - LAST)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(job)
        watch = watched(config, spool=Path(folder), sinks=[outliers], activations=True)
        result = train(config, watch=watch)
    losses = [step.loss for step in result.steps]
    late = losses[60:] or losses
    smallest, rise = math.inf, 0.0
    for loss in late:
        smallest = min(smallest, loss)
        rise = max(rise, loss - smallest if math.isfinite(loss) else math.inf)
    last = losses[-LAST:]
    return Outcome(
        loss=sum(last) / len(last), worst=rise, ended=result.ended, kurtosis=outliers.worst
    )


def attention(options: argparse.Namespace) -> None:
    """The first table; runs are told as they end."""
    jobs = [
        Job(
            architecture=architecture,
            precision=precision,
            rate=rate,
            seed=seed,
            steps=options.steps,
            width=options.width,
            layers=options.layers,
            device=options.device,
        )
        for seed in range(options.seeds)
        for rate in options.rates
        for precision in PRECISIONS
        for architecture in options.only
    ]
    losses: dict[Job, float] = {}
    row("architecture", "rate", "seed", "precision", "loss", "gap", "worst", "ended", *PLACES)
    row(*["---"] * 11)
    for job, found in side_by_side(outcome, jobs, options.processes):
        losses[job] = found.loss
        twin = losses.get(replace(job, precision="bf16"))
        gap = "?" if twin is None else f"{found.loss - twin:+.3f}"
        places = [f"{found.kurtosis[p]:.3g}" if p in found.kurtosis else "-" for p in PLACES]
        numbers = (f"{found.loss:.3f}", gap, f"{found.worst:.2f}")
        row(
            job.architecture,
            f"{job.rate:g}",
            job.seed,
            job.precision,
            *numbers,
            found.ended,
            *places,
        )
    row("architecture", "rate", "precision", "mean gap to bf16, by seed")
    row(*["---"] * 4)
    for job in sorted(losses, key=lambda j: (j.architecture, j.rate, j.precision)):
        if job.seed == 0 and job.precision != "bf16":
            gaps = [
                losses[replace(job, seed=s)] - losses[replace(job, seed=s, precision="bf16")]
                for s in range(options.seeds)
                if {replace(job, seed=s), replace(job, seed=s, precision="bf16")} <= set(losses)
            ]
            row(
                job.architecture,
                f"{job.rate:g}",
                job.precision,
                ", ".join(f"{g:+.3f}" for g in gaps),
            )


def tied_rows(ties: int, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
    """q, k, v whose last row of logits has `ties` equal maxima, and a gradient of one sign.

    Logits are numbers of bfloat16; values lie in -[1, 2); the others' probabilities are small.

    Returns:
        Each of shape (rows, 1, tokens, tokens).
    """
    random = torch.Generator().manual_seed(seed)
    below = torch.randint(-24, -15, (rows, 1, tokens, tokens), generator=random) / 2
    largest = torch.randint(32, 129, (rows, 1, 1, 1), generator=random) / 32
    logits = largest + below
    logits[..., :ties] = largest
    logits = logits.bfloat16().float()
    k = torch.eye(tokens).expand(rows, 1, tokens, tokens)
    v = -(1 + torch.rand(rows, 1, tokens, tokens, generator=random))
    gradient = torch.zeros(rows, 1, tokens, tokens)
    gradient[..., -1, :] = torch.randn(rows, 1, tokens, generator=random).abs()
    return logits, k, v, gradient


def rounding() -> None:
    """The table of what rounding alone does."""
    row("logits tied", "kind", "mean error of O, ulp of bf16", "one-signed: O", "one-signed: D")
    row(*["---"] * 5)
    for ties in (1, 2, 3, 4, 6):
        q, k, v, gradient = tied_rows(ties, 256, 32, 0)
        for kind in BIASED:
            core = BiasedAttention(kind, scale=1.0, lead=())
            leaf = q.clone().requires_grad_()
            mixed = core(leaf, k, v)
            exact = torch.softmax(q[..., -1, :].double(), -1)[..., None, :] @ v.bfloat16().double()
            error = mixed.detach()[..., -1, :].double() - exact[..., 0, :]
            mixed.backward(gradient)
            assert core.offset_error is not None
            total, magnitude = core.offset_error
            # Outputs lie in -[1, 2), where bfloat16's numbers are 2^-7 apart.
            row(
                ties,
                kind,
                f"{float(error.mean()) * 128:+.4f}",
                f"{float(error.sum().abs() / error.abs().sum()):.3f}",
                f"{float(total.abs() / magnitude) if magnitude else 0.0:.3f}",
            )


class Offsets:
    """In place of a watch: adds up the deviations of D over layers and steps."""

    def __init__(self, model: nn.Module) -> None:
        self.cores = [m for m in model.modules() if isinstance(m, BiasedAttention)]
        self.total = self.magnitude = 0.0

    def log(self, **values: torch.Tensor | float) -> None:
        """After each backward."""
        if "loss" not in values:
            return
        for core in self.cores:
            if core.offset_error is not None:
                self.total += float(core.offset_error[0])
                self.magnitude += float(core.offset_error[1])

    def event(self, kind: str, detail: str | None = None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class BiasJob:
    """One run of the last table."""

    attention: AttentionName
    rate: float
    seed: int
    steps: int
    device: Device


def biased(job: BiasJob) -> tuple[float, float, float]:
    """Loss of the last steps, |sum| / sum of magnitudes of D's deviations, and the latter."""
    seen: list[Offsets] = []

    def watch(model: nn.Module, optimizer: object, first: int) -> Offsets:
        seen.append(Offsets(model))
        return seen[0]

    config = RunConfig(
        name="biased",
        model=ModelConfig(architecture="llama3"),
        precision=PrecisionConfig(backend="bf16", attention=job.attention),
        optimizer=OptimizerConfig(learning_rate=job.rate, weight_decay=0.0),
        steps=job.steps,
        seed=job.seed,
        execution=ExecutionConfig(device=job.device),
    )
    losses = [s.loss for s in train(config, watch=watch).steps][-LAST:]
    offsets = seen[0]
    share = abs(offsets.total) / offsets.magnitude if offsets.magnitude else math.nan
    return sum(losses) / len(losses), share, offsets.magnitude


def bias(options: argparse.Namespace) -> None:
    """Both tables of biased attention."""
    rounding()
    kinds: list[AttentionName] = ["plain", *BIASED]
    jobs = [
        BiasJob(kind, rate, seed, options.steps, options.device)
        for seed in range(options.seeds)
        for rate in options.rates
        for kind in kinds
    ]
    row("attention", "rate", "seed", "loss", "one-signed: D", "magnitude of D's deviations")
    row(*["---"] * 6)
    for job, (loss, share, magnitude) in side_by_side(biased, jobs, options.processes):
        cells = (f"{loss:.4f}", f"{share:.4f}", f"{magnitude:.4g}")
        row(job.attention, f"{job.rate:g}", job.seed, *cells)


def main() -> None:
    """Print one part or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("attention", "bias", "both"), default="both")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3, 8e-3, 2e-2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    known: list[Architecture] = ["llama3", "olmo2", "fog_max"]
    parser.add_argument("--only", nargs="*", default=known)
    options = parser.parse_args()
    if options.part != "attention":
        bias(options)
    if options.part != "bias":
        attention(options)


if __name__ == "__main__":
    main()
