"""Runs as functions: each returns a frozen configuration and nothing trains here.

The recipe of the demonstration and the corpus a forecaster is fitted on deliberately share no
model shape, no seed and no fault: `is_demo` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Literal, TypeVar

import numpy as np

from foreshock.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.faults import BadBatch, Fault, LearningRateRamp, OutlierRamp, ScaleFault
from foreshock.trainer.recipes_architectures import ARCHITECTURE_RECIPES

__all__ = [
    "RECIPES",
    "corpus",
    "debug_cpu",
    "demo",
    "demo_failing",
    "demo_healthy",
    "fog_cpu",
    "is_demo",
    "llama_cpu",
]

_DEMO_MODEL: Final = ModelConfig(architecture="llama3", width=64, layers=4, heads=4)
_DEMO_DATA: Final = DataConfig(sequence_length=64, batch_size=8)
_DEMO_SEEDS: Final = 1 << 40
"""Seeds of demonstrations stand at and above this one, those of the corpus below it."""


def debug_cpu(seed: int = 0) -> RunConfig:
    """Seconds on any machine: does everything still fit together?"""
    return RunConfig(
        name="debug-cpu",
        model=ModelConfig(width=32, layers=2, heads=2),
        data=DataConfig(sequence_length=32, batch_size=4),
        schedule=ScheduleConfig(warmup_steps=5),
        steps=20,
        seed=seed,
        tensor_every=2,
    )


def llama_cpu(seed: int = 0) -> RunConfig:
    """Llama 3 blocks with every linear in emulated FP8, delayed scaling; a minute on two cores."""
    return RunConfig(name="llama-cpu", schedule=ScheduleConfig(decay_share=0.2), seed=seed)


def fog_cpu(seed: int = 0) -> RunConfig:
    """FOG-max blocks in the same format, data and length as `llama_cpu`."""
    return RunConfig(
        name="fog-cpu",
        model=ModelConfig(architecture="fog_max"),
        schedule=ScheduleConfig(decay_share=0.2),
        seed=seed,
    )


def demo(seed: int) -> tuple[RunConfig, RunConfig]:
    """The run of `make demo`: one whose learning rate runs away, and its twin that stays well.

    Args:
        seed: 0 or more; draws weights, data order, when the fault starts and how fast it grows.

    Returns:
        The failing run and the healthy one; they differ in name and fault alone.
    """
    if not 0 <= seed < _DEMO_SEEDS:
        raise ValueError(f"seed is {seed}; allowed: 0 to {_DEMO_SEEDS - 1}")
    random = np.random.Generator(np.random.Philox(key=[seed, _DEMO_SEEDS]))
    # Odd: the corpus starts its faults at even steps, so that no fault instance is in both.
    start = 2 * int(random.integers(100, 160)) + 1
    factor = round(float(random.uniform(1.025, 1.05)), 4)
    # Unbounded, the loss would end in the hundreds of thousands and its chart show nothing else.
    ramp = LearningRateRamp(start=start, factor=factor, limit=1000.0)
    return _demo_run(f"demo-{seed}", seed, ramp), _demo_run(f"demo-{seed}-twin", seed, None)


def demo_failing(seed: int = 0) -> RunConfig:
    """The failing run of `demo`: its learning rate runs away from a step that the seed draws."""
    return demo(seed)[0]


def demo_healthy(seed: int = 0) -> RunConfig:
    """The healthy twin of `demo_failing`."""
    return demo(seed)[1]


def _demo_run(name: str, seed: int, fault: LearningRateRamp | None) -> RunConfig:
    return RunConfig(
        name=name,
        model=_DEMO_MODEL,
        precision=PrecisionConfig(backend="emulated", scaling="delayed", history=16),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_steps=50),
        data=_DEMO_DATA,
        steps=600,
        seed=_DEMO_SEEDS + seed,
        fault=fault,
        tensor_every=4,
    )


def is_demo(config: RunConfig) -> bool:
    """Whether a run is one of the demonstration's, or too near to one to be fitted on."""
    return config.model == _DEMO_MODEL or config.seed >= _DEMO_SEEDS


RECIPES: Final[dict[str, Callable[[int], RunConfig]]] = {
    "debug_cpu": debug_cpu,
    "llama_cpu": llama_cpu,
    "fog_cpu": fog_cpu,
    "demo_failing": demo_failing,
    "demo_healthy": demo_healthy,
    **ARCHITECTURE_RECIPES,
}
"""What `foreshock train` knows by name; each takes a seed."""


T = TypeVar("T")
Kind = Literal["healthy", "hard", "natural", "fault"]

# Shares of a corpus: healthy runs, healthy ones that look like trouble, failures that come of the
# learning rate alone, injected faults.
_SHARES: Final[tuple[tuple[Kind, float], ...]] = (
    ("healthy", 0.22),
    ("hard", 0.16),
    ("natural", 0.26),
    ("fault", 0.36),
)
_SHAPES: Final = (
    ModelConfig(architecture="llama3", width=48, layers=3, heads=3),
    ModelConfig(architecture="fog_max", width=48, layers=3, heads=3),
    ModelConfig(architecture="llama3", width=32, layers=4, heads=2),
    ModelConfig(architecture="llama3", width=80, layers=2, heads=5),
)
_DATA: Final = (
    DataConfig(sequence_length=32, batch_size=4),
    DataConfig(sequence_length=64, batch_size=2),
    DataConfig(sequence_length=48, batch_size=4),
)
_ALL_ROLES: Final = ("input", "weight", "grad_output")
_PRECISIONS: Final = (
    PrecisionConfig(backend="emulated", scaling="delayed", history=16),
    PrecisionConfig(backend="emulated", scaling="delayed", history=4),
    PrecisionConfig(backend="emulated", scaling="current"),
    PrecisionConfig(backend="bf16"),
)
# Learning rates at which a run of this size and length stays well, and at which some fail and some
# do not: measured, see docs/log.md. With a constant rate far too high a small model never learns,
# which is no divergence; a long warm-up lets it learn first and carries it over the edge then.
_CALM_RATES: Final = {"llama3": (5e-4, 5e-3), "fog_max": (1e-3, 8e-3)}
_EDGE_RATES: Final = {"llama3": (2e-1, 4.0), "fog_max": (2e-2, 1.5e-1)}
_EDGE_WARMUPS: Final = (20, 100, 200, 300, 400)
_FAULT_KINDS: Final = (
    *[LearningRateRamp] * 9,
    *[BadBatch] * 3,
    *[ScaleFault] * 5,
    *[OutlierRamp] * 3,
)
"""How often each kind is drawn; a bfloat16 run has no scales to break and takes the first 12."""


def corpus(seed: int, count: int, *, models_per_stack: int = 16) -> list[list[RunConfig]]:
    """What a forecaster is fitted on: healthy runs, natural failures and faults, in stacks.

    The runs of a stack share model shape, batch shape and length, so that they train as one;
    everything else, the data order too, is each run's own.

    Args:
        seed: All randomness comes from it; a stack depends on it and its own number alone.
        count: Runs in all; the last stack may be smaller.
        models_per_stack: Runs per stack.

    Raises:
        ValueError: A count below 1, a stack beyond 256 runs, or a seed outside [0, 2^16).
    """
    if count < 1:
        raise ValueError(f"count is {count}; allowed: 1 or more")
    if not 1 <= models_per_stack <= 256:
        raise ValueError(f"models_per_stack is {models_per_stack}; allowed: 1 to 256")
    if not 0 <= seed < 1 << 16:
        raise ValueError(f"seed is {seed}; allowed: 0 to {(1 << 16) - 1}")
    sizes = [min(models_per_stack, count - i) for i in range(0, count, models_per_stack)]
    return [_stack(seed, number, size) for number, size in enumerate(sizes)]


def _stack(seed: int, number: int, size: int) -> list[RunConfig]:
    random = np.random.Generator(np.random.Philox(key=[seed, number]))
    model = _SHAPES[number % len(_SHAPES)]
    common = RunConfig(
        name=f"sweep-{seed}-{number:04d}",
        model=model,
        data=_DATA[int(random.integers(len(_DATA)))],
        steps=int(random.integers(50, 81)) * 10,
    )
    runs = []
    for index, kind in enumerate(_kinds(size, random)):
        base = replace(
            common,
            name=f"{common.name}-{index:03d}",
            seed=(((seed << 16) + number) << 8) + index,
            precision=_pick(_PRECISIONS, random),
            optimizer=OptimizerConfig(
                learning_rate=_log_uniform(random, *_CALM_RATES[model.architecture]),
                beta2=_pick((0.95, 0.99, 0.999), random),
                clip=_pick((1.0, 1.0, None), random),
            ),
            schedule=ScheduleConfig(warmup_steps=_pick((20, 50, 100), random)),
        )
        runs.append(_of_kind(base, kind, random))
    return runs


def _kinds(size: int, random: np.random.Generator) -> list[Kind]:
    """The kinds of a stack in their shares, a fraction of a run left to chance, in random order."""
    edges = np.cumsum([share for _, share in _SHARES])
    places = (np.arange(size) + random.uniform()) / size % 1.0
    kinds = [_SHARES[int(i)][0] for i in np.searchsorted(edges, places, side="right").clip(max=3)]
    return [kinds[int(i)] for i in random.permutation(size)]


def _of_kind(base: RunConfig, kind: Kind, random: np.random.Generator) -> RunConfig:
    if kind == "healthy":
        return base
    if kind == "hard":
        return _hard_healthy(base, random)
    if kind == "natural":
        return _natural(base, random)
    fault = _fault(base, random)
    if isinstance(fault, BadBatch) and fault.gain > 30:
        # Behind clipping or a short memory of squared gradients, a weight on the loss does nothing.
        base = replace(base, optimizer=replace(base.optimizer, clip=None, beta2=0.999))
    return replace(base, fault=fault)


def _hard_healthy(base: RunConfig, random: np.random.Generator) -> RunConfig:
    """A long warm-up, a decay, a bounded rise of the learning rate, or a high learning rate."""
    which = int(random.integers(4))
    if which == 0:
        return replace(base, schedule=ScheduleConfig(warmup_steps=int(random.integers(150, 400))))
    if which == 1:
        decay = ScheduleConfig(warmup_steps=50, decay_share=float(random.uniform(0.2, 0.7)))
        return replace(base, schedule=decay)
    calm = _CALM_RATES[base.model.architecture]
    if which == 2:
        limit = float(random.uniform(1.5, 3))
        rise = LearningRateRamp(
            start=_start(base, random), factor=_pick((1.01, 1.05, limit), random), limit=limit
        )
        rate = min(base.optimizer.learning_rate, calm[1] / limit)
        return replace(base, fault=rise, optimizer=replace(base.optimizer, learning_rate=rate))
    rate = float(random.uniform(0.8, 1.3)) * calm[1]
    return replace(base, optimizer=replace(base.optimizer, learning_rate=rate))


def _natural(base: RunConfig, random: np.random.Generator) -> RunConfig:
    rate = _log_uniform(random, *_EDGE_RATES[base.model.architecture])
    return replace(
        base,
        optimizer=replace(
            base.optimizer,
            learning_rate=rate,
            clip=_pick((1.0, None), random),
            weight_decay=_pick((0.0, 0.1), random),
            beta2=_pick((0.95, 0.99, 0.999, 0.999), random),
        ),
        schedule=ScheduleConfig(warmup_steps=_pick(_EDGE_WARMUPS, random)),
    )


def _start(base: RunConfig, random: np.random.Generator) -> int:
    """An even step between the 150th and 60 % of the run."""
    return 2 * int(random.integers(75, max(76, 3 * base.steps // 10)))


def _fault(base: RunConfig, random: np.random.Generator) -> Fault:
    start = _start(base, random)
    kind = _pick(
        _FAULT_KINDS if base.precision.backend == "emulated" else _FAULT_KINDS[:12], random
    )
    if kind is LearningRateRamp:
        jump = float(random.uniform()) < 0.2
        factor = _log_uniform(random, 5, 300) if jump else _log_uniform(random, 1.012, 1.08)
        return LearningRateRamp(start=start, factor=factor, limit=factor if jump else 1e4)
    if kind is BadBatch:
        return BadBatch(
            start=start,
            duration=round(_log_uniform(random, 4, 60)),
            kind=_pick(("noise", "constant", "shuffled"), random),
            gain=_log_uniform(random, 1, 3000),
        )
    if kind is ScaleFault:
        # Inputs alone, or all operands with a stale inverse, bite; the rest are hazards that a
        # small model does not mind.
        bites = float(random.uniform()) < 0.75
        stale = float(random.uniform()) < 0.3
        some_roles = _pick((("input",), ("weight",), ("grad_output",), _ALL_ROLES), random)
        return ScaleFault(
            start=start,
            growth=_pick((1.02, 1.03, 1.05, 1.1) if bites else (1.0, 1.05, 0.95, 0.9), random),
            roles=(_ALL_ROLES if stale else ("input",)) if bites else some_roles,
            layers="" if bites else f"blocks.{random.integers(base.model.layers)}.",
            stale_inverse=stale and bites,
        )
    return OutlierRamp(
        start=start,
        layer=_pick(("", "", "mlp.", f"blocks.{random.integers(base.model.layers)}."), random),
        channel=int(random.integers(base.model.width)),
        growth=_log_uniform(random, 1.05, 1.15),
        limit=1e9,
        history=1,
        period=_pick((2, 2, 3), random),
    )


def _pick(choices: tuple[T, ...], random: np.random.Generator) -> T:
    return choices[int(random.integers(len(choices)))]


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
