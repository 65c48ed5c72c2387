"""How often `foreshock compare` says that equal recipes part, and how soon it sees a real change.

    python -m benchmarks.compare_seeds [--runs 8] [--steps 320] [--first-seed 200]

Trains stacks of small models that differ in nothing but their seed, compares every pair, without
and with further seeds, and counts the pairs in which anything parts. Then runs whose learning rate
or FP8 scales are changed from a known step on, each against its twin of the same seed and against
another seed. The rule was chosen on seeds 0 to 15, which are not the default here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Final

import numpy as np

from foreshock.api.compare import Comparison, compare_runs
from foreshock.api.compare_series import RunSeries, Series, SeriesKey, tensor_key
from foreshock.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.faults import Fault, LearningRateRamp, ScaleFault
from foreshock.trainer.stacked import train_stack

CHANGE: Final = 200
FAMILIES: Final[Mapping[str, tuple[str, PrecisionConfig]]] = {
    "llama3 bf16": ("llama3", PrecisionConfig(backend="bf16")),
    "llama3 delayed": ("llama3", PrecisionConfig()),
    "llama3 current": ("llama3", PrecisionConfig(scaling="current")),
    "fog_max delayed": ("fog_max", PrecisionConfig()),
}
CHANGES: Final[Mapping[str, Fault]] = {
    "rate x1.05 a step": LearningRateRamp(start=CHANGE, factor=1.05, limit=100.0),
    "scale x1.05 a step": ScaleFault(start=CHANGE, growth=1.05),
    "one layer's scale x1.1": ScaleFault(start=CHANGE, growth=1.1, layers="blocks.1.mlp.up"),
}


def config(family: str, seed: int, steps: int, fault: Fault | None = None) -> RunConfig:
    """One small run."""
    architecture, precision = FAMILIES[family]
    return RunConfig(
        name=f"{family}-{seed}",
        model=ModelConfig(architecture=architecture, width=48, layers=3, heads=3),  # type: ignore[arg-type]
        precision=precision,
        optimizer=OptimizerConfig(learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_steps=50),
        data=DataConfig(sequence_length=64, batch_size=4),
        steps=steps,
        seed=seed,
        fault=fault,
        tensor_every=4,
    )


def trained(configs: Sequence[RunConfig]) -> list[RunSeries]:
    """Train a stack; the series of each of its runs."""
    points: list[dict[SeriesKey, tuple[list[int], list[float]]]] = [{} for _ in configs]

    def note(run: int, key: SeriesKey | None, step: int, value: float) -> None:
        if key is not None:
            steps, values = points[run].setdefault(key, ([], []))
            steps.append(step)
            values.append(value)

    for item in train_stack(configs):
        for name, column in item.scalars.items():
            if name != "tokens":
                for run, value in enumerate(column):
                    note(run, SeriesKey(name), item.step, float(value))
        for name, rows in (item.statistics or {}).items():
            masked = np.ma.getmaskarray(rows)
            for run, row in np.argwhere(~masked):
                key = tensor_key(name, item.identities[row])
                note(run, key, item.step, float(np.float32(rows[run, row])))
    return [
        {key: Series(np.array(s, np.int64), np.array(v, np.float64)) for key, (s, v) in of.items()}
        for of in points
    ]


def healthy(family: str, runs: Sequence[RunSeries]) -> None:
    """Print in how many pairs of equal recipes anything parts."""
    pairs = list(combinations(range(len(runs)), 2))
    for count in (0, 1, 3):
        parted, series = 0, Counter[str]()
        for i, j in pairs:
            rest = [runs[n] for n in range(len(runs)) if n not in (i, j)]
            found = compare_runs(runs[i], runs[j], seeds=rest[:count])
            parted += bool(found.partings)
            series.update(f"{p.key.statistic} of {p.key.role or 'run'}" for p in found.partings)
        most = ", ".join(f"{name} {times}" for name, times in series.most_common(3)) or "-"
        print(
            f"| {family} | {count} | {found.series} | {parted} of {len(pairs)} | {most} |",
            flush=True,
        )


def tell(first: Sequence[Comparison]) -> str:
    """Steps after the change at which anything but the learning rate parts, and what."""
    steps, names = [], Counter[str]()
    for found in first:
        partings = [p for p in found.partings if p.key.statistic != "learning_rate"]
        if partings:
            steps.append(partings[0].step - CHANGE)
            names[f"{partings[0].key.statistic} of {partings[0].key.role or 'run'}"] += 1
    found_in = f"{len(steps)} of {len(first)}"
    if not steps:
        return f"{found_in} | - | -"
    spread = f"{min(steps)} to {max(steps)}, median {np.median(steps):g}"
    return f"{found_in} | {spread} | {names.most_common(1)[0][0]}"


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--first-seed", type=int, default=200)
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.runs)
    print("| recipe | further seeds | series | pairs that part | what |\n|---|---|---|---|---|")
    trained_runs = {}
    for family in FAMILIES:
        runs = trained([config(family, seed, options.steps) for seed in seeds])
        trained_runs[family] = runs
        healthy(family, runs)
    base = trained_runs["llama3 delayed"]
    count = min(6, options.runs // 2)
    print("\n| change at step 200 | against | found | steps after it | mostly first |")
    print("|---|---|---|---|---|")
    for name, fault in CHANGES.items():
        runs = trained(
            [config("llama3 delayed", s, options.steps, fault) for s in list(seeds)[:count]]
        )
        twins = [compare_runs(base[n], runs[n]) for n in range(count)]
        others = [compare_runs(base[n + count], runs[n]) for n in range(count)]
        print(f"| {name} | twin of the same seed | {tell(twins)} |")
        print(f"| {name} | another seed | {tell(others)} |", flush=True)
    pairs = zip(trained_runs["llama3 bf16"], base, strict=True)
    parted = sum(bool(compare_runs(a, b).partings) for a, b in pairs)
    print(f"\nFP8 (delayed) against its BF16 twin of the same seed: {parted} of {len(base)} part")


if __name__ == "__main__":
    main()
