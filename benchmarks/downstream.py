"""FP8 beside BF16 in what comes after the loss: a small downstream score, and fine-tuning.

    python -m benchmarks.downstream [--steps 600] [--tuning 200] [--seeds 3] [--processes 2]

Each recipe trains on text (loss and cloze score on held-out text), then is fine-tuned from there
on generated instructions (loss of held-out text once more, of responses on prompts drawn by
another seed). The cloze score takes 1,024 items, chance is 0.25, its standard error about 0.015.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.side_by_side import row, side_by_side
from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    StatesConfig,
)
from foreshock.trainer.loop import CheckpointPolicy, train

RECIPES: Final = {
    "bf16": (PrecisionConfig(backend="bf16"), StatesConfig()),
    "FP8": (PrecisionConfig(), StatesConfig()),
    "FP8DPA": (PrecisionConfig(attention="fp8"), StatesConfig()),
    "FP8, O2": (PrecisionConfig(), StatesConfig(level="O2")),
}
LAST: Final = 20


@dataclass(frozen=True, slots=True)
class Job:
    """One row and seed."""

    architecture: Architecture
    recipe: str
    seed: int
    steps: int
    tuning: int
    items: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses in nats per byte, scores as shares."""

    loss: float
    cloze: float
    responses: float
    loss_tuned: float
    cloze_tuned: float


def outcome(job: Job) -> Outcome:
    """Train, then fine-tune from the last checkpoint."""
    precision, states = RECIPES[job.recipe]
    text = RunConfig(
        name="downstream",
        model=ModelConfig(architecture=job.architecture),
        precision=precision,
        states=states,
        schedule=ScheduleConfig(decay_share=0.2),
        data=DataConfig(held_out=0.02),
        evaluation=EvaluationConfig(every=job.steps, batches=32, cloze=job.items),
        steps=job.steps,
        seed=job.seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        policy = CheckpointPolicy(folder=Path(folder), every=job.steps)
        before = train(text, checkpoints=policy).steps[-1]
        tuned = replace(
            text,
            optimizer=OptimizerConfig(learning_rate=5e-4),
            schedule=ScheduleConfig(warmup_steps=20, decay_share=0.5),
            data=DataConfig(source="instructions", held_out=0.02),
            evaluation=replace(text.evaluation, every=job.tuning),
            steps=job.tuning,
            initial=str(next(Path(folder).glob("step-*.pt"))),
        )
        steps = train(tuned).steps
    after, last = steps[-1], steps[-LAST:]
    found = (before.eval_loss, before.cloze, after.eval_loss, after.cloze)
    loss, cloze, loss_tuned, cloze_tuned = (x if x is not None else float("nan") for x in found)
    responses = sum(s.loss for s in last) / len(last)
    return Outcome(loss, cloze, responses, loss_tuned, cloze_tuned)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tuning", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    architectures: tuple[Architecture, ...] = ("llama3", "fog_max")
    jobs = [
        Job(architecture, recipe, seed, options.steps, options.tuning, options.items)
        for seed in range(options.seeds)
        for architecture in architectures
        for recipe in RECIPES
    ]
    found: dict[tuple[str, str], list[Outcome]] = {}
    for job, one in side_by_side(outcome, jobs, options.processes):
        print(f"{job.architecture} {job.recipe} seed {job.seed}: {one}", flush=True)
        found.setdefault((job.architecture, job.recipe), []).append(one)
    columns = ("loss", "cloze", "responses", "loss_tuned", "cloze_tuned")
    row("architecture", "recipe", "seeds", *columns)
    row(*["---"] * 8)
    for (architecture, recipe), ones in sorted(found.items()):
        means = [sum(getattr(o, c) for o in ones) / len(ones) for c in columns]
        row(architecture, recipe, len(ones), *(f"{value:.4f}" for value in means))


if __name__ == "__main__":
    main()
