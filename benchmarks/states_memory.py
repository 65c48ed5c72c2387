"""FP8-LM's levels: bytes per parameter, and what they cost in loss after the same tokens.

    python -m benchmarks.states_memory [--steps 600] [--width 128] [--seeds 3] [--processes 2]
    python -m benchmarks.states_memory --part bytes --device cuda

`bytes` takes two steps of a model and counts what stays between them and, before the optimizer's
step, the gradients: every tensor of weights (masters where there are some), gradients and moments,
over the number of parameters. O0 is what BF16 mixed precision keeps: a float32 master, gradient
and two moments (16 bytes, FP8-LM equation 7), not counting its GEMM's bfloat16 operands, which no
level's row counts. On a device `allocated` is the allocator's own figure for the same moment.

`loss` trains each level on the same text from the same weights in the same order, with the GEMMs in
bfloat16 and in FP8, and prints the loss on held-out text beside that of O0 with bfloat16 GEMMs,
pair by pair, with the mean of the pairs and its standard error. What a difference of 0.01 nat wants
is many seeds of a small model that ends on a decayed rate:

    python -m benchmarks.states_memory --part loss --width 32 --layers 2 --length 64 --steps 400
        --decay 0.5 --seeds 16 --rows "bf16 O0" "bf16 O2" "FP8 O2" "bf16 O2, moments in blocks"
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

import torch

from benchmarks.side_by_side import row, side_by_side
from foreshock.trainer.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    StatesConfig,
)
from foreshock.trainer.fp8lm import Fp8AdamW
from foreshock.trainer.loop import train
from foreshock.trainer.states_config import Level
from foreshock.trainer.trainee import Trainee, make_trainee
from foreshock.trainer.world import World

GEMMS: Final[Mapping[str, PrecisionConfig]] = {
    "bf16": PrecisionConfig(backend="bf16"),
    "FP8": PrecisionConfig(),
}
COAT: Final = StatesConfig(level="O2", exp_avg_sq="e4m3", block=128, range_expansion=True)
APART: Final = {
    "O2, moments in blocks": StatesConfig(level="O2", block=128),
    "O2, first moment fp32": StatesConfig(level="O2", exp_avg="fp32"),
}
"""Which part of O2 a loss is due to; the table of bytes leaves them out."""


LINE: Final = re.compile(r"^(\S+) (.+) seed (\d+): (\S+)$", re.MULTILINE)
"""A run's result, as it is told."""


def levels() -> dict[str, StatesConfig]:
    """The rows: the four levels, O0 with bfloat16 parameters, O2 with COAT's second moment."""
    named = {name: StatesConfig(level=name) for name in get_args(Level)}
    narrow = {"O0, parameters bfloat16": StatesConfig(parameters="bfloat16")}
    return named | narrow | {"O2, second moment e4m3 (COAT)": COAT}


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes per parameter."""

    weights: float
    gradients: float
    states: float
    allocated: float | None = None

    @property
    def total(self) -> float:
        """Weights, gradients and optimizer together."""
        return self.weights + self.gradients + self.states


def measured(states: StatesConfig, width: int, device: str) -> Held:
    """What a level holds for a model of four blocks, of which one step is taken."""
    place = torch.device(device)
    config = RunConfig(
        name="bytes",
        model=ModelConfig(width=width, layers=4, heads=width // 64),
        precision=PrecisionConfig(backend="bf16"),
        states=states,
    )
    before = torch.cuda.memory_allocated() if place.type == "cuda" else 0
    trainee = make_trainee(config, World(device=place))
    tokens = torch.randint(256, (2, 65), device=place)
    for step in range(2):
        trainee.model.begin_step(step, None)
        loss = trainee.entry(tokens[:, :-1], tokens[:, 1:])
        torch.autograd.backward(loss)
        del loss
        trainee.gradients.reduce()
        if step == 0:
            _take(trainee)
    held = _bytes(trainee)
    count = sum(p.numel() for p in trainee.model.parameters())
    allocated = None
    if place.type == "cuda":
        allocated = (torch.cuda.memory_allocated() - before) / count
    weights, gradients, moments = (held[k] / count for k in ("weights", "gradients", "states"))
    return Held(weights, gradients, moments, allocated)


def _take(trainee: Trainee) -> None:
    trainee.gradients.clip(1.0)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)


def _bytes(trainee: Trainee) -> dict[str, int]:
    optimizer = trainee.optimizer
    if isinstance(optimizer, Fp8AdamW):
        return optimizer.bytes
    parameters = list(trainee.model.parameters())
    states = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {
        "weights": sum(_size(p) for p in parameters),
        "gradients": sum(_size(g) for g in gradients),
        "states": sum(_size(x) for x in states),
    }


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def print_bytes(width: int, device: str) -> None:
    """The table of bytes."""
    row("level", "weights", "gradients", "optimizer", "together", "allocated")
    row(*["---"] * 6)
    for name, states in levels().items():
        held = measured(states, width, device)
        parts = [f"{x:.3f}" for x in (held.weights, held.gradients, held.states, held.total)]
        row(name, *parts, "-" if held.allocated is None else f"{held.allocated:.2f}")


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the table of losses."""

    gemms: str
    level: str
    seed: int
    steps: int
    width: int
    batches: int
    layers: int = 4
    heads: int = 4
    length: int = 128
    rate: float = 2e-3
    decay: float = 0.2


def final_loss(job: Job) -> float:
    """Held-out loss after the run's last step, nats per token."""
    config = RunConfig(
        name="states",
        model=ModelConfig(width=job.width, layers=job.layers, heads=job.heads),
        precision=GEMMS[job.gemms],
        states=(levels() | APART)[job.level],
        optimizer=OptimizerConfig(learning_rate=job.rate),
        schedule=ScheduleConfig(decay_share=job.decay),
        data=DataConfig(held_out=0.02, sequence_length=job.length),
        evaluation=EvaluationConfig(every=job.steps, batches=job.batches),
        steps=job.steps,
        seed=job.seed,
    )
    loss = train(config).steps[-1].eval_loss
    assert loss is not None
    return loss


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that a run that is ended early has whole ones."""
    every = [f"{gemms} {level}" for gemms in GEMMS for level in levels()]
    sizes = {name: getattr(options, name) for name in ("layers", "heads", "length", "rate")}
    jobs = []
    for seed in range(options.seeds):
        for name in options.rows or every:
            gemms, level = name.split(" ", 1)
            if gemms not in GEMMS or level not in levels() | APART:
                known = [*levels(), *APART]
                raise ValueError(f"row {name!r}; allowed: {list(GEMMS)}, a blank, {known}")
            jobs.append(
                Job(
                    gemms,
                    level,
                    seed,
                    options.steps,
                    options.width,
                    options.batches,
                    decay=options.decay,
                    **sizes,
                )
            )
    return jobs


def print_losses(options: argparse.Namespace) -> None:
    """The table of losses; runs are told as they end."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    if options.lines is None:
        for job, loss in side_by_side(final_loss, jobs_of(options), options.processes):
            print(f"{job.gemms} {job.level} seed {job.seed}: {loss:.4f}", flush=True)
            losses.setdefault((job.gemms, job.level), {})[job.seed] = loss
    else:
        for line in LINE.finditer(options.lines.read_text()):
            losses.setdefault((line[1], line[2]), {})[int(line[3])] = float(line[4])
    row("GEMMs", "level", "held-out loss", "over bf16 O0, by seed", "mean", "standard error")
    row(*["---"] * 6)
    base = losses.get(("bf16", "O0"), {})
    for (gemms, level), found in sorted(losses.items()):
        seeds = sorted(set(found) & set(base))
        gaps = [found[s] - base[s] for s in seeds]
        if gaps:
            mean = sum(found[s] for s in seeds) / len(seeds)
            each = ", ".join(f"{gap:+.4f}" for gap in gaps)
            middle, error = mean_and_error(gaps)
            row(gemms, level, f"{mean:.4f}", each, f"{middle:+.4f}", f"{error:.4f}")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error: sample deviation / sqrt(n), NaN for one value."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return statistics.fmean(values), error


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("bytes", "loss", "both"), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of bytes")
    parser.add_argument("--bytes-width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.2, help="share of the steps")
    parser.add_argument("--lines", type=Path, help="what an ended run told: only its table")
    parser.add_argument("--rows", nargs="*", default=[], help='such as "bf16 O0"; all levels')
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.part != "loss":
        print_bytes(options.bytes_width, options.device)
    if options.part != "bytes":
        print_losses(options)


if __name__ == "__main__":
    main()
