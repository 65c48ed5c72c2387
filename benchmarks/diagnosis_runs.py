"""The runs on which the diagnosis is fitted and judged: small stacks of broken and healthy ones.

    python -m benchmarks.diagnosis_runs --range look --out build/diagnosis/look
    python -m benchmarks.diagnosis_runs --range judge --out build/diagnosis/judge

Two ranges of seeds that share none: "look" is for choosing rules and fitting probabilities, "judge"
for figures. Every run has its fault at a random step, of a random size, in random layers. All
statistics are kept, so that a changed rule needs no new training; nothing here diagnoses.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

__all__ = ["CAUSE_OF", "RANGES", "Kept", "Subject", "kept", "stack_of"]

RANGES: Final = {"look": 5 << 40, "judge": 6 << 40}
STEPS: Final = 320
_STACKS: Final = (("llama3", 4), ("fog_max", 4), ("olmo2", 8), ("llama3", 4), ("fog_max", 8))
"""Architecture and cadence of each stack."""
_MILD: Final = 2
"""Stacks whose faults are small; the others' are of the size of those that end runs."""
CAUSE_OF: Final = {
    "rate ramp": "learning_rate",
    "rate jump": "learning_rate",
    "natural rate": "learning_rate",
    "scale grows": "scale",
    "scale stands": "scale",
    "scale shrinks": "underflow",
    "outlier": "outlier",
    "bad batches": "bad_data",
    "brief bad batch": "bad_data",
    "optimizer lost": "optimizer_state",
    "healthy": "unknown",
    "data switch": "unknown",
    "restart": "unknown",
    "rate drop": "unknown",
}
"""What a good diagnosis answers, by family of runs; unknown where nothing is broken."""
_FAMILIES: Final = (
    *("rate ramp", "rate ramp", "rate jump", "natural rate", "natural rate"),
    *("scale grows", "scale grows", "scale grows", "scale stands"),
    *("scale shrinks", "scale shrinks", "scale shrinks"),
    *("outlier", "outlier", "outlier"),
    *("bad batches", "bad batches", "bad batches", "brief bad batch"),
    *("optimizer lost", "optimizer lost", "optimizer lost"),
    *("healthy", "data switch", "restart", "rate drop"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One run and what is true about it.

    Attributes:
        name: Of the run.
        family: Key of `CAUSE_OF`.
        config: The run.
        start: First step of what is done to it.
        strong: Faults are of a size that most often ends in an alarm.
        events: Planned ones that are on record, (step, kind).
    """

    name: str
    family: str
    config: Any
    start: int
    strong: bool = False
    events: tuple[tuple[int, str], ...] = ()

    @property
    def cause(self) -> str:
        """The answer that is right."""
        return CAUSE_OF[self.family]

    def hit(self, layers: Sequence[str]) -> frozenset[str]:
        """Layers that are broken; empty where it is all of them, or none in particular."""
        from foreshock.trainer.faults import OutlierRamp, ScaleFault

        fault = self.config.fault
        if isinstance(fault, ScaleFault):
            found = frozenset(layer for layer in layers if fault.layers in layer)
        elif isinstance(fault, OutlierRamp):
            found = frozenset(layer for layer in layers if fault.hits(layer))
        else:
            return frozenset()
        return frozenset() if found == frozenset(layers) else found


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What one run recorded.

    Attributes:
        subject: The run.
        identities: One per row.
        scalars: Name to (T,).
        statistics: Name to (T, rows), NaN off the cadence.
    """

    subject: Subject
    identities: tuple[Any, ...]
    scalars: dict[str, np.ndarray[Any, Any]]
    statistics: dict[str, np.ndarray[Any, Any]] = field(repr=False)


def stack_of(number: int, seeds: int) -> list[Subject]:
    """Runs that train as one.

    Args:
        number: Of the stack.
        seeds: Smallest seed of the range.
    """
    from foreshock.trainer.config import (
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        PrecisionConfig,
        RunConfig,
        ScheduleConfig,
    )

    architecture, cadence = _STACKS[number % len(_STACKS)]
    found = []
    for index, family in enumerate(_FAMILIES):
        random = np.random.Generator(np.random.Philox(key=[number << 8 | index, seeds]))
        delayed = family == "outlier" or random.uniform() < 0.5
        start = int(random.integers(110, 210))
        config = RunConfig(
            name=f"diagnosis-{number}-{index}",
            model=ModelConfig(
                architecture=architecture,  # type: ignore[arg-type]
                width=32,
                layers=3,
                heads=2,
            ),
            precision=PrecisionConfig(
                backend="emulated", scaling="delayed" if delayed else "current", history=16
            ),
            optimizer=OptimizerConfig(
                learning_rate=_between(random, 1e-3, 4e-3),
                beta2=(0.95, 0.99, 0.999)[int(random.integers(3))],
                clip=(1.0, None)[int(random.integers(2))],
            ),
            schedule=ScheduleConfig(warmup_steps=int(random.integers(20, 60))),
            data=DataConfig(sequence_length=32, batch_size=4),
            steps=STEPS,
            seed=seeds + (number << 8) + index,
            tensor_every=cadence,
        )
        subject = Subject(
            name=config.name, family=family, config=config, start=start, strong=number >= _MILD
        )
        found.append(_MADE[family](subject, random))
    return found


def _between(random: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(random.uniform(math.log(low), math.log(high))))


def _where(random: np.random.Generator) -> str:
    block = f"blocks.{random.integers(3)}."
    return ("", block, f"{block}mlp.")[int(random.integers(3))]


def _faulty(subject: Subject, fault: Any) -> Subject:
    return replace(subject, config=replace(subject.config, fault=fault))


def _rate(subject: Subject, random: np.random.Generator) -> Subject:
    from foreshock.trainer.faults import LearningRateRamp

    jump = subject.family == "rate jump"
    factor = _between(random, 5, 100) if jump else float(random.uniform(1.015, 1.1))
    if subject.strong:
        factor = _between(random, 30, 300) if jump else float(random.uniform(1.04, 1.12))
    limit = factor if jump else 1e4
    return _faulty(subject, LearningRateRamp(start=subject.start, factor=factor, limit=limit))


def _natural(subject: Subject, random: np.random.Generator) -> Subject:
    from foreshock.trainer.config import ScheduleConfig

    config = subject.config
    low, high = (0.02, 0.3) if config.model.architecture == "fog_max" else (0.1, 2.0)
    more = 3 if subject.strong else 1
    rate = _between(random, more * low, more * high)
    optimizer = replace(config.optimizer, learning_rate=rate)
    warmup = ScheduleConfig(warmup_steps=int(random.integers(100, 250)))
    return replace(subject, start=60, config=replace(config, optimizer=optimizer, schedule=warmup))


def _scale(subject: Subject, random: np.random.Generator) -> Subject:
    from foreshock.trainer.faults import ScaleFault

    roles = (("input",), ("weight",), ("grad_output",), ("input", "weight", "grad_output"))
    hit = roles[int(random.integers(4))]
    if subject.family == "scale stands":
        growth = 1.0
    elif subject.family == "scale shrinks":
        growth = float(random.uniform(0.85, 0.96))
    else:
        growth = float(random.uniform(1.03, 1.15))
    stale = subject.strong and subject.family == "scale grows" and random.uniform() < 0.4
    fault = ScaleFault(
        start=subject.start,
        growth=growth,
        roles=hit,
        layers=_where(random),
        stale_inverse=stale,
    )
    return _faulty(subject, fault)


def _outlier(subject: Subject, random: np.random.Generator) -> Subject:
    from foreshock.trainer.faults import OutlierRamp

    return _faulty(
        subject,
        OutlierRamp(
            start=subject.start,
            layer=_where(random),
            channel=int(random.integers(32)),
            growth=_between(random, 1.04, 1.2),
            limit=1e9,
            period=(1, 2, 2, 3)[int(random.integers(4))],
        ),
    )


def _bad(subject: Subject, random: np.random.Generator) -> Subject:
    from foreshock.trainer.faults import BadBatch

    brief = subject.family == "brief bad batch"
    if subject.strong and not brief:
        # Behind clipping or a short memory of squared gradients a weight on the loss does nothing.
        optimizer = replace(subject.config.optimizer, clip=None, beta2=0.999)
        subject = replace(subject, config=replace(subject.config, optimizer=optimizer))
    low = 10 if subject.strong else 1
    return _faulty(
        subject,
        BadBatch(
            start=subject.start,
            duration=int(random.integers(1, 4) if brief else random.integers(8, 50)),
            kind=("noise", "constant", "shuffled")[int(random.integers(3))],
            gain=_between(random, 1 if brief else low, 4 if brief else 1000),
        ),
    )


def _lost(subject: Subject, random: np.random.Generator) -> Subject:
    told = random.uniform() < 0.5
    return replace(
        subject,
        config=replace(subject.config, forget_optimizer_at=subject.start),
        events=((subject.start, "restart"),) if told else (),
    )


def _healthy(subject: Subject, random: np.random.Generator) -> Subject:
    config, start = subject.config, subject.start
    if subject.family == "data switch":
        data = replace(config.data, alternate="docstrings", switch_at=start)
        told = ((start, "data_switch"),) if random.uniform() < 0.5 else ()
        return replace(subject, config=replace(config, data=data), events=told)
    if subject.family == "restart":
        return replace(subject, events=((start, "restart"),))
    if subject.family == "rate drop":
        drop = float(random.uniform(0.05, 0.3))
        schedule = replace(config.schedule, drop_at=start, drop_to=drop)
        return replace(subject, config=replace(config, schedule=schedule))
    return subject


_MADE: Final[dict[str, Callable[[Subject, np.random.Generator], Subject]]] = {
    "rate ramp": _rate,
    "rate jump": _rate,
    "natural rate": _natural,
    "scale grows": _scale,
    "scale stands": _scale,
    "scale shrinks": _scale,
    "outlier": _outlier,
    "bad batches": _bad,
    "brief bad batch": _bad,
    "optimizer lost": _lost,
    "healthy": _healthy,
    "data switch": _healthy,
    "restart": _healthy,
    "rate drop": _healthy,
}


def trained(number: int, seeds: int, path: Path) -> None:
    """Train one stack and keep what it recorded, whole or not at all."""
    import torch

    from foreshock.trainer.stacked_device import SCALARS, train_windows
    from foreshock.trainer.stacked_sums import STATISTICS

    torch.set_num_threads(1)
    configs = [subject.config for subject in stack_of(number, seeds)]
    identities: list[Any] = []

    def fold(found: Sequence[Any]) -> Any:
        identities.extend(found)
        return lambda values: values.flatten(1)

    rows = _rows(configs)
    windows = list(train_windows(configs, fold=fold, folded=len(STATISTICS) * rows, device="cpu"))
    scalars = np.concatenate([w.scalars for w in windows])
    tensors = np.concatenate([w.folded for w in windows])
    measured = np.flatnonzero(np.isfinite(tensors).any((1, 2)))
    unfinished = path.with_suffix(".part.npz")
    np.savez_compressed(
        unfinished,
        names=np.array(SCALARS),
        scalars=scalars,
        statistics=np.array(STATISTICS),
        identities=np.array([[i.layer, i.role, i.format] for i in identities]),
        measured=measured,
        tensors=tensors[measured],
    )
    os.replace(unfinished, path)


def _rows(configs: Sequence[Any]) -> int:
    from foreshock.trainer.precision.linear import ROLES
    from foreshock.trainer.stacked import stacked_model

    return len(stacked_model(configs[:1]).linears()) * len(ROLES)


def kept(number: int, seeds: int, path: Path) -> Iterator[Kept]:
    """The runs of a stack that `trained` has written."""
    from foreshock.monitor.formats import FORMATS
    from foreshock.monitor.record import TensorIdentity
    from foreshock.trainer.schedule import learning_rate

    with np.load(path) as file:
        names, scalars = file["names"], file["scalars"].astype(np.float64)
        statistics, measured = file["statistics"], file["measured"]
        identities = tuple(
            TensorIdentity(str(layer), str(role), str(name))
            for layer, role, name in file["identities"]
        )
        tensors = file["tensors"].astype(np.float64)
    largest = np.array([FORMATS[identity.format].largest for identity in identities])
    shape = (len(measured), tensors.shape[1], len(statistics), len(identities))
    tensors = tensors.reshape(shape)
    for index, subject in enumerate(stack_of(number, seeds)):
        spread = np.full((len(scalars), *shape[2:]), np.nan)
        spread[measured] = tensors[:, index]
        mine = {str(name): scalars[:, place, index] for place, name in enumerate(names)}
        steps = range(len(scalars))
        mine["learning_rate"] = np.array([learning_rate(subject.config, s) for s in steps])
        found = {str(n): spread[:, place] for place, n in enumerate(statistics)}
        with np.errstate(divide="ignore"):
            # The stack keeps no scale, but what it leaves of the range.
            amax = np.log2(found["amax"])
        found["scale_log2"] = np.log2(largest) - amax - found["headroom_log2"]
        yield Kept(subject=subject, identities=identities, scalars=mine, statistics=found)


def main() -> None:
    """Train the stacks of a range that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--range", choices=sorted(RANGES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stacks", type=int, nargs="+", default=[0, 1, 2, 3])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for number in given.stacks:
        path = given.out / f"{number}.npz"
        if not path.exists():
            began = time.process_time()
            trained(number, RANGES[given.range], path)
            print(path, f"{time.process_time() - began:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
