"""The second plan of a corpus: more architectures, recipes, failures, and healthy runs that fool.

`recipes.corpus` is the first, and stays as it is: its fingerprints name the shipped forecaster's
data. Here natural failures come first in number; what looks like trouble and is none (data switch,
growing batch, restart, plateau, noisy batches) has its planned event on record; some broken runs
have a twin that differs in the fault alone. Nothing trains here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeVar

import numpy as np

from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.faults import BadBatch, Fault, LearningRateRamp, OutlierRamp, ScaleFault

__all__ = ["RECIPES_OF_PLAN", "PlannedRun", "corpus_plan"]

T = TypeVar("T")
Kind = Literal["healthy", "hard_healthy", "benign", "natural", "fault"]

_SHARES: Final[tuple[tuple[Kind, float], ...]] = (
    ("natural", 0.34),
    ("fault", 0.28),
    ("hard_healthy", 0.17),
    ("benign", 0.08),
    ("healthy", 0.13),
)
_TWINS: Final = 0.3
"""Share of faulty, benign and hard runs that have a twin: a tenth or so of all."""

RECIPES_OF_PLAN: Final[dict[str, PrecisionConfig]] = {
    "bf16": PrecisionConfig(backend="bf16"),
    "fp8_current": PrecisionConfig(scaling="current"),
    "fp8_delayed16": PrecisionConfig(scaling="delayed", history=16),
    "fp8_delayed1024": PrecisionConfig(scaling="delayed", history=1024),
    "fp8_dpa": PrecisionConfig(scaling="delayed", history=16, attention="fp8"),
    "mxfp8": PrecisionConfig(scaling="mxfp8"),
    "nvfp4": PrecisionConfig(scaling="nvfp4"),
}
"""Recipes by the name that runs of the plan are grouped by."""

_FLAVOURS: Final[dict[str, tuple[str, ...]]] = {
    "tensor": ("fp8_current", "fp8_delayed16"),
    "long": ("fp8_delayed1024", "fp8_delayed1024", "fp8_delayed16"),
    "bf16": ("bf16",),
    "dpa": ("fp8_dpa",),
    "mx": ("mxfp8",),
    "nv": ("nvfp4",),
}
"""Recipes that one stack mixes: those that cost each other nothing."""

# In this order, so that a sweep cut short at any stack has a bit of everything.
_CYCLE: Final[tuple[tuple[Architecture, str], ...]] = (
    ("llama3", "tensor"),
    ("fog_max", "tensor"),
    ("olmo2", "tensor"),
    ("llama3", "bf16"),
    ("op", "tensor"),
    ("llama3_smooth_swiglu", "long"),
    ("llama3", "dpa"),
    ("fog_opt", "tensor"),
    ("llama3", "mx"),
    ("olmo2", "long"),
    ("fog_flash", "dpa"),
    ("olmo2", "nv"),
    ("llama3", "tensor"),
    ("op", "bf16"),
    ("llama3_smooth_swiglu", "tensor"),
    ("olmo2", "bf16"),
    ("fog_max", "dpa"),
    ("llama3", "nv"),
    ("llama3", "long"),
    ("op", "mx"),
    ("fog_max", "long"),
    ("olmo2", "dpa"),
    ("fog_opt", "bf16"),
    ("fog_flash", "tensor"),
)
_WIDE_AT: Final = {9: 256, 21: 384}
"""Places of the cycle before which a stack of a larger width comes, which nothing is fitted on."""

# Learning rates at which runs of this size stay well, and at which some fail; see docs/corpus.md.
_CALM: Final[dict[str, tuple[float, float]]] = {
    "llama3": (5e-4, 3e-3),
    "llama3_smooth_swiglu": (5e-4, 3e-3),
    "olmo2": (5e-4, 4e-3),
    "op": (5e-4, 2e-3),
    "fog_max": (1e-3, 6e-3),
    "fog_opt": (1e-3, 6e-3),
    "fog_flash": (1e-3, 6e-3),
}
_EDGE: Final[dict[str, tuple[float, float]]] = {
    "llama3": (8e-3, 2.0),
    "llama3_smooth_swiglu": (8e-3, 2.0),
    "olmo2": (1e-2, 2.0),
    "op": (4e-3, 0.5),
    "fog_max": (2e-2, 0.5),
    "fog_opt": (2e-2, 0.5),
    "fog_flash": (2e-2, 0.5),
}
_HARD: Final = (
    "long_warmup",
    "decay",
    "data_switch",
    "batch_ramp",
    "restart",
    "restart_lost_optimizer",
    "plateau",
    "noisy",
    "high_rate",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run, and what the plan knows about it beside its configuration.

    Attributes:
        config: The run.
        group: Runs of one group are never split between fitting and testing.
        recipe: Key of `RECIPES_OF_PLAN`.
        kind: What it is meant to be; what it becomes, its loss says.
        hard: Of a hard healthy run, what is hard about it.
        twin: Name of the run that differs in the fault, or the planned event, alone.
        split: fit, or width for the larger widths that nothing is fitted on.
        events: Planned events, (step, kind).
    """

    config: RunConfig
    group: str
    recipe: str
    kind: Kind
    hard: str | None = None
    twin: str | None = None
    split: Literal["fit", "width"] = "fit"
    events: tuple[tuple[int, str], ...] = ()


def corpus_plan(
    seed: int, stacks: int, *, models_per_stack: int = 64, scale: float = 1.0
) -> list[list[PlannedRun]]:
    """Stacks of runs that train as one each.

    Args:
        seed: All randomness comes from it; a stack depends on it and its own number alone.
        stacks: How many.
        models_per_stack: Runs in each; wide ones have a quarter of it.
        scale: Shrinks widths and lengths of runs, for a quick look at what the plan does.

    Raises:
        ValueError: No stack, a stack beyond 256 runs, or a seed outside [0, 2^16).
    """
    if stacks < 1:
        raise ValueError(f"stacks is {stacks}; allowed: 1 or more")
    if not 4 <= models_per_stack <= 256:
        raise ValueError(f"models_per_stack is {models_per_stack}; allowed: 4 to 256")
    if not 0 <= seed < 1 << 16:
        raise ValueError(f"seed is {seed}; allowed: 0 to {(1 << 16) - 1}")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale}; allowed: above 0, at most 1")
    return [_stack(seed, n, spec, models_per_stack, scale) for n, spec in _specs(stacks)]


def _specs(stacks: int) -> list[tuple[int, tuple[Architecture, str, int]]]:
    """Number, architecture, flavour and width (0 = any) of each stack."""
    found: list[tuple[Architecture, str, int]] = []
    while len(found) < stacks:
        for place, (architecture, flavour) in enumerate(_CYCLE):
            if place in _WIDE_AT:
                wide: Architecture = "llama3" if place == min(_WIDE_AT) else "fog_max"
                found.append((wide, "tensor", _WIDE_AT[place]))
            found.append((architecture, flavour, 0))
    return list(enumerate(found[:stacks]))


def _stack(
    seed: int, number: int, spec: tuple[Architecture, str, int], size: int, scale: float
) -> list[PlannedRun]:
    architecture, flavour, wide = spec
    random = np.random.Generator(np.random.Philox(key=[seed, (2 << 32) + number]))
    width = wide or int(_pick((64, 64, 96, 128), random))
    if scale < 1:
        width = max(32, round(width * scale / 32) * 32)
    # Not the demonstration's shape, which has heads of 16.
    heads = max(2, width // 32)
    slow = flavour in ("mx", "nv", "dpa")
    steps = int(random.integers(100, 141 if slow or wide else 201)) * 10
    every = int(_pick((1, 2, 4), random)) if not slow else int(_pick((2, 4), random))
    if scale < 1:
        # Small runs are trained on processors, where statistics cost more than a step.
        every = int(_pick((2, 4, 4, 8), random))
    common = RunConfig(
        name=f"v2-{seed}-{number:03d}",
        model=ModelConfig(architecture=architecture, width=width, layers=4, heads=heads),
        data=DataConfig(
            sequence_length=int(_pick((64, 64, 128), random)) if scale == 1 else 32,
            batch_size=int(_pick((4, 8), random)) if scale == 1 else 4,
        ),
        steps=max(60, round(steps * scale)),
        tensor_every=every,
    )
    size = max(4, size // 4) if wide else size // 2 if slow else size
    runs: list[PlannedRun] = []
    kinds = _kinds(size, random)
    while len(runs) < size:
        kind = kinds[len(runs)]
        run = _planned(common, flavour, kind, len(runs), seed, number, wide > 0, random)
        runs.append(run)
        # Without a fault or an event of its own a twin would be the run itself.
        twin = _twin(run, f"{common.name}-{len(runs):03d}")
        alone = twin.config.fingerprint() == run.config.fingerprint()
        if not alone and len(runs) < size and random.uniform() < _TWINS:
            runs[-1] = replace(run, twin=f"{common.name}-{len(runs):03d}")
            runs.append(twin)
    return runs


def _planned(
    common: RunConfig,
    flavour: str,
    kind: Kind,
    index: int,
    seed: int,
    number: int,
    wide: bool,
    random: np.random.Generator,
) -> PlannedRun:
    recipe = str(_pick(_FLAVOURS[flavour], random))
    base = replace(
        common,
        name=f"{common.name}-{index:03d}",
        seed=(1 << 39) + (((seed << 12) + number) << 8) + index,
        precision=RECIPES_OF_PLAN[recipe],
        optimizer=OptimizerConfig(
            learning_rate=_log_uniform(random, *_CALM[common.model.architecture]),
            beta2=_pick((0.95, 0.99, 0.999), random),
            clip=_pick((1.0, 1.0, None), random),
            weight_decay=_pick((0.1, 0.1, 0.0), random),
        ),
        schedule=ScheduleConfig(
            warmup_steps=int(_pick((20, 50, 100), random)),
            decay_share=float(_pick((0.0, 0.0, 0.2), random)),
        ),
    )
    planned = PlannedRun(
        config=base,
        group=common.name,
        recipe=recipe,
        kind=kind,
        split="width" if wide else "fit",
    )
    if kind == "natural":
        return replace(planned, config=_natural(base, random))
    if kind == "fault":
        return replace(planned, config=_broken(base, random))
    if kind == "benign":
        return replace(planned, config=replace(base, fault=_benign(base, random)))
    if kind == "hard_healthy":
        return _hard(planned, str(_pick(_HARD, random)), random)
    return planned


def _twin(run: PlannedRun, name: str) -> PlannedRun:
    """The same run without its fault and without its planned event."""
    config = replace(
        run.config,
        name=name,
        fault=None,
        forget_optimizer_at=0,
        data=replace(run.config.data, switch_at=0, alternate=None, repeats=1, repeats_until=0),
        schedule=replace(run.config.schedule, drop_at=0, drop_to=1.0),
    )
    return replace(run, config=config, kind="healthy", hard=None, events=(), twin=run.config.name)


def _kinds(size: int, random: np.random.Generator) -> list[Kind]:
    """Kinds in their shares, a fraction of a run left to chance, in random order."""
    edges = np.cumsum([share for _, share in _SHARES])
    places = (np.arange(size) + random.uniform()) / size % 1.0
    found = np.searchsorted(edges, places, side="right").clip(max=len(_SHARES) - 1)
    kinds = [_SHARES[int(i)][0] for i in found]
    return [kinds[int(i)] for i in random.permutation(size)]


def _natural(base: RunConfig, random: np.random.Generator) -> RunConfig:
    """A learning rate around the edge; a long warm-up carries it over once it has learnt."""
    optimizer = replace(
        base.optimizer, learning_rate=_log_uniform(random, *_EDGE[base.model.architecture])
    )
    warmup = round(base.steps * float(_pick((0.02, 0.1, 0.25, 0.5, 0.8), random)))
    schedule = ScheduleConfig(warmup_steps=max(warmup, 1))
    return replace(base, optimizer=optimizer, schedule=schedule)


def _hard(planned: PlannedRun, what: str, random: np.random.Generator) -> PlannedRun:
    config = planned.config
    at = _start(config, random)
    schedule, data = config.schedule, config.data
    event: tuple[tuple[int, str], ...] = ()
    if what == "long_warmup":
        schedule = ScheduleConfig(warmup_steps=round(config.steps * random.uniform(0.25, 0.7)))
    elif what == "decay":
        schedule = replace(schedule, decay_share=float(random.uniform(0.3, 0.8)))
    elif what == "data_switch":
        data = replace(data, alternate="docstrings", switch_at=at)
        event = ((at, "data_switch"),)
    elif what == "batch_ramp":
        data = replace(data, repeats=int(_pick((2, 4), random)), repeats_until=at)
        event = ((at, "batch_size"),)
    elif what == "noisy":
        data = replace(data, repeats=4)
    elif what == "restart_lost_optimizer":
        config = replace(config, forget_optimizer_at=at)
        event = ((at, "restart"),)
    elif what == "restart":
        # Nothing is lost: the run goes on as if nothing had been, and only the event is there.
        event = ((at, "restart"),)
    elif what == "plateau":
        schedule = replace(schedule, drop_at=at, drop_to=float(random.uniform(0.01, 0.1)))
        event = ((at, "lr_change"),)
    else:
        rate = float(random.uniform(0.9, 1.4)) * _CALM[config.model.architecture][1]
        config = replace(config, optimizer=replace(config.optimizer, learning_rate=rate))
    config = replace(config, schedule=schedule, data=data)
    return replace(planned, config=config, hard=what, events=event)


def _benign(base: RunConfig, random: np.random.Generator) -> Fault:
    """A few bad batches, or a short rise of the learning rate that is taken back."""
    start = _start(base, random)
    if random.uniform() < 0.5:
        return BadBatch(
            start=start,
            duration=int(random.integers(1, 5)),
            kind=_pick(("noise", "constant", "shuffled"), random),
            gain=_log_uniform(random, 1, 4),
        )
    factor = float(random.uniform(2, 8))
    until = start + int(random.integers(3, 20))
    return LearningRateRamp(start=start, factor=factor, limit=factor, until=until)


def _broken(base: RunConfig, random: np.random.Generator) -> RunConfig:
    start = _start(base, random)
    scaled = base.precision.backend == "emulated" and base.precision.scaling in (
        "delayed",
        "current",
    )
    kinds = ("rate", "rate", "rate", "batch", "batch", "scale", "scale", "scale", "outlier")
    kind = str(_pick(kinds if scaled else kinds[:5], random))
    if kind == "rate":
        return replace(base, fault=_rate_fault(start, random))
    if kind == "batch":
        # Behind clipping or a short memory of squared gradients a weight on the loss does nothing.
        fault = BadBatch(
            start=start,
            duration=round(_log_uniform(random, 4, 80)),
            kind=_pick(("noise", "constant", "shuffled"), random),
            gain=_log_uniform(random, 10, 3000),
        )
        optimizer = replace(base.optimizer, clip=None, beta2=0.999)
        return replace(base, fault=fault, optimizer=optimizer)
    if kind == "scale":
        return replace(base, fault=_scale_fault(base, start, random))
    layers = ("mlp.", f"blocks.{int(random.integers(base.model.layers))}.")
    return replace(
        base,
        fault=OutlierRamp(
            start=start,
            layer=str(_pick(layers, random)),
            channel=int(random.integers(base.model.width)),
            growth=_log_uniform(random, 1.03, 1.2),
            limit=1e9,
            period=int(_pick((2, 2, 3), random)),
        ),
    )


def _rate_fault(start: int, random: np.random.Generator) -> LearningRateRamp:
    jump = float(random.uniform()) < 0.2
    factor = _log_uniform(random, 5, 300) if jump else _log_uniform(random, 1.006, 1.08)
    return LearningRateRamp(start=start, factor=factor, limit=factor if jump else 1e4)


def _scale_fault(base: RunConfig, start: int, random: np.random.Generator) -> ScaleFault:
    # Inputs alone, or all operands with a stale inverse, bite; the rest are hazards that a small
    # model does not mind.
    bites = float(random.uniform()) < 0.8
    stale = bites and float(random.uniform()) < 0.35
    every = ("input", "weight", "grad_output")
    roles = _pick((("input",), ("weight",), ("grad_output",), every), random)
    some = f"blocks.{int(random.integers(base.model.layers))}."
    growth = _log_uniform(random, 1.01, 1.12) if bites else _pick((1.0, 1.05, 0.95, 0.9), random)
    return ScaleFault(
        start=start,
        growth=growth,
        roles=every if stale else ("input",) if bites else roles,
        layers=str(_pick(("", "", "mlp.", "attention."), random)) if bites else some,
        stale_inverse=stale,
    )


def _start(base: RunConfig, random: np.random.Generator) -> int:
    """A step between 12 % and 75 % of the run."""
    return int(random.integers(max(1, base.steps * 12 // 100), base.steps * 3 // 4))


def _pick(choices: tuple[T, ...], random: np.random.Generator) -> T:
    return choices[int(random.integers(len(choices)))]


def _log_uniform(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
