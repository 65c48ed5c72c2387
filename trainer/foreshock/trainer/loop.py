"""Train one model: a plain eager loop, watched when a watch is given.

A non-finite loss is recorded first and ends the run a few steps later, so that what follows it is
on record too. The loop deliberately knows no service: it gets a factory for the watch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from foreshock.trainer import checkpoint
from foreshock.trainer.config import RunConfig
from foreshock.trainer.data import Corpus, batch, load_corpus
from foreshock.trainer.faults import BadBatch
from foreshock.trainer.fp8lm import Fp8AdamW
from foreshock.trainer.model import Decoder
from foreshock.trainer.optimizer import clip_gradients, make_optimizer, set_learning_rate
from foreshock.trainer.schedule import learning_rate

__all__ = [
    "CheckpointPolicy",
    "RunResult",
    "StepResult",
    "WatchFactory",
    "Watcher",
    "public_config",
    "train",
]


class Watcher(Protocol):
    """What the loop asks of a watch; `foreshock.monitor.Watch` is one."""

    def log(self, **values: torch.Tensor) -> object:
        """Take the loss of the step, and what else is known of it: 0-dim tensors on the device."""

    def event(self, kind: str, detail: str | None = None) -> object:
        """Note something that happened at this step."""

    def close(self) -> object:
        """Hand over what is left and let go of the model."""


Ended = Literal["finished", "nonfinite", "stopped"]

WatchFactory = Callable[[nn.Module, torch.optim.Optimizer, int], Watcher]
"""Makes a watch of (model, optimizer, number of the first step to come)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step, as the host knows it after the step.

    Attributes:
        step: 0-based.
        loss: Mean cross-entropy in nats per token, before any `BadBatch` gain.
        grad_norm: Global L2 norm before clipping.
        learning_rate: Of this step, faults included.
        tokens: Cumulative, this step included.
        seconds: Of this step, wall clock.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        config: The run, with its fault: this is the truth that no record holds.
        steps: Those taken by this call, in order.
        ended: finished, nonfinite (loss, for too many steps), or stopped (asked to).
        corpus_sha256: The text.
    """

    config: RunConfig
    steps: tuple[StepResult, ...]
    ended: Ended
    corpus_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """Where and how often; one is also written when the run is stopped or finishes.

    Attributes:
        folder: Holds this run's checkpoints only.
        every: Steps between two.
        resume: Go on from the newest one, if there is any.
    """

    folder: Path
    every: int = 100
    resume: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; allowed: 1 or more")


def public_config(config: RunConfig) -> dict[str, object]:
    """The configuration as a monitored service may hear it: everything but the fault."""
    return {k: v for k, v in config.as_dict().items() if k != "fault"}


def train(
    config: RunConfig,
    *,
    watch: WatchFactory | None = None,
    on_step: Callable[[StepResult], None] | None = None,
    stop: Callable[[], bool] | None = None,
    checkpoints: CheckpointPolicy | None = None,
    corpus: Corpus | None = None,
    nonfinite_steps: int = 5,
) -> RunResult:
    """Train the model of `config` from its first step, or from a checkpoint, to its last.

    The same config, text, torch and number of threads give the same losses bit for bit, watched
    or not.

    Args:
        config: The run.
        watch: Makes the watch; `foreshock.trainer.watched.watched(config)` gives the usual one.
        on_step: Called after every step.
        stop: Asked after every step; True ends the run in good order.
        checkpoints: None keeps none.
        corpus: The text; None loads the one `config.data` names.
        nonfinite_steps: The run ends after this many steps in a row without a finite loss.

    Raises:
        ValueError: The text does not fit the model or is too short.
        CheckpointError: The checkpoint to resume is not this run's, or damaged.
    """
    run = _Run(config, corpus or load_corpus(config.data.folder))
    first = run.resume(checkpoints) if checkpoints else 0
    watcher = watch(run.model, run.optimizer, first) if watch else None
    ending = _Ending(config.steps, stop, nonfinite_steps)
    results: list[StepResult] = []
    ended: Ended | None = "finished" if first >= config.steps else None
    try:
        while ended is None:
            results.append(run.step(first + len(results), watcher))
            if on_step:
                on_step(results[-1])
            ended = ending.after(results[-1])
            if checkpoints and _due(checkpoints, results[-1].step + 1, ended):
                run.save(checkpoints, results[-1].step + 1, watcher)
    finally:
        if watcher:
            watcher.close()
    return RunResult(
        config=config, steps=tuple(results), ended=ended, corpus_sha256=run.corpus.sha256
    )


def _due(policy: CheckpointPolicy, next_step: int, ended: Ended | None) -> bool:
    # A run that ended in NaN leaves its last good checkpoint the newest one.
    return ended != "nonfinite" and (ended is not None or next_step % policy.every == 0)


class _Ending:
    """Decides after each step whether, and why, the run ends there."""

    def __init__(self, steps: int, stop: Callable[[], bool] | None, nonfinite_steps: int) -> None:
        self._steps = steps
        self._stop = stop
        self._allowed = nonfinite_steps
        self._nonfinite = 0

    def after(self, result: StepResult) -> Ended | None:
        self._nonfinite = 0 if math.isfinite(result.loss) else self._nonfinite + 1
        if self._nonfinite >= self._allowed:
            return "nonfinite"
        if result.step + 1 >= self._steps:
            return "finished"
        return "stopped" if self._stop and self._stop() else None


class _Run:
    """The model, its optimizer and its text, and how they take one step."""

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        highest = int(corpus.tokens.max())
        if highest >= config.model.vocabulary:
            raise ValueError(
                f"{corpus.name} holds byte {highest}, model.vocabulary is "
                f"{config.model.vocabulary}; 256 fits any text"
            )
        self.config = config
        self.corpus = corpus
        torch.manual_seed(config.seed)
        self.model = Decoder(config.model, config.precision)
        self.optimizer = make_optimizer(
            self.model, config.optimizer, config.states, config.communication
        )

    def step(self, step: int, watcher: Watcher | None) -> StepResult:
        began = time.perf_counter()
        config = self.config
        rate = learning_rate(config, step)
        set_learning_rate(self.optimizer, rate)
        tokens = batch(self.corpus, config.data, config.seed, step, config.fault)
        self.model.begin_step(step, config.fault)
        loss = self.model(tokens[:, :-1], tokens[:, 1:])
        gain = config.fault.loss_gain(step) if isinstance(config.fault, BadBatch) else 1.0
        (loss * gain).backward()
        if watcher:
            watcher.log(loss=loss.detach())
        norm = clip_gradients(self.model, config.optimizer.clip, self.optimizer)
        if watcher and isinstance(self.optimizer, Fp8AdamW):
            # Its gradients never stand in .grad, where a watch would find their norm.
            watcher.log(grad_norm=norm, **self.optimizer.exchange.counts())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        per_step = config.data.batch_size * config.data.sequence_length
        return StepResult(
            step=step,
            loss=float(loss.detach()),
            grad_norm=float(norm),
            learning_rate=rate,
            tokens=(step + 1) * per_step,
            seconds=time.perf_counter() - began,
        )

    def resume(self, policy: CheckpointPolicy) -> int:
        path = checkpoint.latest(policy.folder)
        if path is None or not policy.resume:
            return 0
        return checkpoint.load(path, self.config, self._state())

    def save(self, policy: CheckpointPolicy, next_step: int, watcher: Watcher | None) -> None:
        path = checkpoint.save(policy.folder, self.config, self._state(), next_step)
        if watcher:
            watcher.event("checkpoint", path.name)

    def _state(self) -> checkpoint.TrainingState:
        return checkpoint.TrainingState(
            model=self.model, optimizer=self.optimizer, corpus_sha256=self.corpus.sha256
        )
