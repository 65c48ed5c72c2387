"""Train one model on one process or many, watched when a watch is given.

A non-finite loss is recorded first and ends the run a few steps later, so that what follows it is
on record too. The loop knows no service, which gets in by a factory for the watch, and no kind of
parallelism, which `trainee.py` hides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from foreshock.trainer import checkpoint, distributed_checkpoint
from foreshock.trainer.cloze import cloze_accuracy
from foreshock.trainer.config import RunConfig
from foreshock.trainer.data import Corpus, corpus_of
from foreshock.trainer.evaluation import held_out_loss
from foreshock.trainer.faults import BadBatch
from foreshock.trainer.instructions import Instructions, pairs_of
from foreshock.trainer.optimizer import set_learning_rate
from foreshock.trainer.schedule import learning_rate
from foreshock.trainer.task import Batch, RunningText, Task, parts_of, share_of_loss
from foreshock.trainer.trainee import deterministic, make_trainee
from foreshock.trainer.world import World, joined

__all__ = [
    "CheckpointPolicy",
    "GoBack",
    "Overseer",
    "OverseerFactory",
    "RunResult",
    "StepResult",
    "WatchFactory",
    "Watcher",
    "public_config",
    "train",
]


class Watcher(Protocol):
    """What the loop asks of a watch; `foreshock.monitor.Watch` is one."""

    def log(self, **values: torch.Tensor | float) -> object:
        """Take scalars of the step: `loss` and others, 0-dim tensors on the device, `eval_loss`."""

    def event(self, kind: str, detail: str | None = None) -> object:
        """Note something that happened at this step."""

    def close(self) -> object:
        """Hand over what is left and let go of the model."""


@dataclass(frozen=True, slots=True)
class GoBack:
    """An overseer has restored an earlier state of the run.

    Attributes:
        to: The step to go on with.
        skip: Steps of data to leave out from there on.
    """

    to: int
    skip: int = 0


class Overseer(Protocol):
    """What may change a run between its steps; `foreshock.trainer.guarded` makes one."""

    def begin(self, step: int) -> object:
        """Called once before the first step to come, on every process, when all is loaded."""

    def attach(self, watcher: Watcher) -> object:
        """Take the watch of the steps to come: at the beginning and after each going back."""

    def after(self, next_step: int) -> GoBack | None:
        """Called after every step, on every process; what it restored, if it did."""

    def close(self) -> object:
        """The run is over."""


Ended = Literal["finished", "nonfinite", "stopped"]

OverseerFactory = Callable[[nn.Module, torch.optim.Optimizer], Overseer]
"""Makes an overseer of (model, optimizer), before there is a watch."""

WatchFactory = Callable[[nn.Module, torch.optim.Optimizer, int], Watcher]
"""Makes a watch of (model, optimizer, number of the first step to come)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step, as the host knows it after the step.

    Attributes:
        step: 0-based.
        loss: Mean cross-entropy in nats per token over all processes, before any `BadBatch` gain.
        grad_norm: Global L2 norm before clipping.
        learning_rate: Of this step, faults included.
        tokens: Cumulative, this step included.
        seconds: Of this step, wall clock, without evaluation.
        eval_loss: On held-out text after this step, nats per token; None at most steps.
        cloze: Share of `evaluation.cloze` items that were answered rightly; None likewise.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    eval_loss: float | None = None
    cloze: float | None = None


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
    overseer: OverseerFactory | None = None,
) -> RunResult:
    """Train the model of `config` from its first step, or from a checkpoint, to its last.

    The same config, text, torch and number of threads give the same losses bit for bit, watched
    or not. In a process that torchrun started it joins the others and trains with them; every
    process must call it alike.

    Args:
        config: The run.
        watch: Makes the watch; `foreshock.trainer.watched.watched(config)` gives the usual one.
        on_step: Called after every step, on every process.
        stop: Asked after every step; True on any process ends the run in good order on all.
        checkpoints: None keeps none.
        corpus: The text; None loads the one `config.data` names.
        nonfinite_steps: The run ends after this many steps in a row without a finite loss.
        overseer: Makes what may take the run back to an earlier step; every step taken counts
            in the result, those that were thrown away too.

    Raises:
        ValueError: The text does not fit the model or is too short, or the device is not there.
        CheckpointError: The checkpoint to resume is not this run's, or damaged.
    """
    with joined(config.execution) as world, deterministic(config.execution.deterministic):
        run = _Run(config, corpus or corpus_of(config.data), world)
        step = run.resume(checkpoints) if checkpoints else 0
        over = overseer(run.trainee.model, run.trainee.optimizer) if overseer else None
        if over:
            over.begin(step)
        watcher = run.watched(watch, step, over)
        ending = _Ending(config.steps, stop, nonfinite_steps, world)
        results: list[StepResult] = []
        ended: Ended | None = "finished" if step >= config.steps else None
        try:
            while ended is None:
                results.append(run.step(step, watcher))
                step += 1
                if on_step:
                    on_step(results[-1])
                back = over.after(step) if over else None
                ended = ending.after(results[-1])
                if back is not None and ended != "stopped":
                    ended, step = None, back.to
                    watcher = run.gone_back(back, watch, watcher, over)
                elif checkpoints and _due(checkpoints, step, ended):
                    run.save(checkpoints, step, watcher)
        finally:
            for attached in (over, watcher):
                if attached:
                    attached.close()
    return RunResult(
        config=config, steps=tuple(results), ended=ended, corpus_sha256=run.corpus.sha256
    )


def _due(policy: CheckpointPolicy, next_step: int, ended: Ended | None) -> bool:
    # A run that ended in NaN leaves its last good checkpoint the newest one.
    return ended != "nonfinite" and (ended is not None or next_step % policy.every == 0)


class _Ending:
    """Decides after each step whether, and why, the run ends there: alike on all processes."""

    def __init__(
        self, steps: int, stop: Callable[[], bool] | None, nonfinite_steps: int, world: World
    ) -> None:
        self._steps = steps
        self._stop = stop
        self._allowed = nonfinite_steps
        self._nonfinite = 0
        self._world = world

    def after(self, result: StepResult) -> Ended | None:
        self._nonfinite = 0 if math.isfinite(result.loss) else self._nonfinite + 1
        if self._nonfinite >= self._allowed:
            return "nonfinite"
        if result.step + 1 >= self._steps:
            return "finished"
        stopped = self._world.any(bool(self._stop and self._stop()))
        return "stopped" if stopped else None


class _Run:
    """The model, its optimizer and its text, and how they take one step."""

    def __init__(self, config: RunConfig, corpus: Corpus, world: World) -> None:
        self.config, self.corpus, self.world = config, corpus, world
        self.task: Task = task_of(config, corpus)
        self.trainee = make_trainee(config, world)
        self.skipped = 0

    def watched(
        self, watch: WatchFactory | None, step: int, overseer: Overseer | None
    ) -> Watcher | None:
        watcher = watch(self.trainee.entry, self.trainee.optimizer, step) if watch else None
        if overseer and watcher:
            overseer.attach(watcher)
        return watcher

    def gone_back(
        self,
        back: GoBack,
        watch: WatchFactory | None,
        watcher: Watcher | None,
        overseer: Overseer | None,
    ) -> Watcher | None:
        """What was restored is watched anew: a new attempt, with its steps from `back.to` on."""
        self.skipped += back.skip
        if watcher:
            watcher.close()
        return self.watched(watch, back.to, overseer)

    def step(self, step: int, watcher: Watcher | None) -> StepResult:
        began = time.perf_counter()
        config, trainee = self.config, self.trainee
        rate = learning_rate(config, step)
        if config.forget_optimizer_at and step == config.forget_optimizer_at:
            trainee.optimizer.state.clear()
        set_learning_rate(trainee.optimizer, rate)
        parts = parts_of(
            self.task.batch(step + self.skipped), self.world, config.data.micro_batches
        )
        trainee.model.begin_step(step, config.fault)
        loss = self._backward(parts, step + self.skipped)
        if watcher:
            watcher.log(loss=loss)
        norm = trainee.gradients.clip(config.optimizer.clip)
        if watcher:
            watcher.log(**trainee.gradients.told(norm))
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        per_step = config.data.batch_size * config.data.sequence_length
        result = StepResult(
            step=step,
            loss=float(self.world.mean(loss)),
            grad_norm=float(norm),
            learning_rate=rate,
            tokens=(step + 1) * per_step,
            seconds=time.perf_counter() - began,
        )
        return self._evaluated(result, watcher)

    def _backward(self, parts: Sequence[Batch], number: int) -> torch.Tensor:
        """Gradients of a batch's loss, reduced; the loss of this process, 0-dim, detached."""
        fault = self.config.fault
        gain = fault.loss_gain(number) if isinstance(fault, BadBatch) else 1.0
        losses = []
        for place, part in enumerate(parts, 1):
            with self.trainee.gradients.micro_batch(place == len(parts)):
                loss = share_of_loss(self.trainee.entry, part)
                torch.autograd.backward(loss * (gain / len(parts)))
            losses.append(loss.detach())
        self.trainee.gradients.reduce()
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()

    def _evaluated(self, result: StepResult, watcher: Watcher | None) -> StepResult:
        every = self.config.evaluation.every
        if not every or (result.step + 1) % every:
            return result
        loss = held_out_loss(self.trainee.entry, self.config, self.corpus, self.world)
        if watcher:
            watcher.log(eval_loss=loss)
        cloze = None
        if self.config.evaluation.cloze:
            cloze = cloze_accuracy(self.trainee.entry, self.config, self.corpus, self.world)
        return replace(result, eval_loss=loss, cloze=cloze)

    def resume(self, policy: CheckpointPolicy) -> int:
        path = distributed_checkpoint.latest(policy.folder)
        if path is None or not policy.resume:
            return 0
        resumed = self._loaded(path)
        self.skipped = resumed.skipped
        return resumed.next_step

    def _loaded(self, path: Path) -> checkpoint.Resumed:
        if self.world.alone and path.is_file():
            return checkpoint.load(path, self.config, self._state())
        content = distributed_checkpoint.load(
            path,
            self.config,
            self._state(),
            entry=self.trainee.entry,
            world=self.world,
            cut=self.trainee.cut,
        )
        return checkpoint.Resumed.of(content)

    def save(self, policy: CheckpointPolicy, next_step: int, watcher: Watcher | None) -> None:
        folder, state, config = policy.folder, self._state(), self.config
        if self.world.alone:
            path = checkpoint.save(folder, config, state, next_step)
        else:
            path = distributed_checkpoint.save(
                folder,
                config,
                state,
                next_step,
                entry=self.trainee.entry,
                world=self.world,
                cut=self.trainee.cut,
            )
        if watcher:
            watcher.event("checkpoint", path.name)

    def _state(self) -> checkpoint.TrainingState:
        return checkpoint.TrainingState(
            model=self.trainee.model,
            optimizer=self.trainee.optimizer,
            corpus_sha256=self.task.sha256,
            skipped=self.skipped,
        )


def task_of(config: RunConfig, corpus: Corpus) -> Task:
    """What the run learns: running text, or responses to prompts.

    Raises:
        ValueError: The text does not fit the model.
    """
    if config.data.source == "instructions":
        return Instructions(config=config, pairs=pairs_of(config.data.folder))
    return RunningText(config=config, corpus=corpus)
