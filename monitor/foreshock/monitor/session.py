"""Watching one training run: from optimizer step to optimizer step.

Everything here runs in the training thread and only queues work: no value is read on the host, and
nothing that goes wrong after the watch is attached reaches the training.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from torch import nn

from foreshock.monitor import te_exact
from foreshock.monitor.attach import Trained, all_of, forget_compiled, ranks, trained_parameters
from foreshock.monitor.budget import PlanBook, first_plan
from foreshock.monitor.clock import Clock
from foreshock.monitor.collector import Collector, Taken
from foreshock.monitor.containment import Containment
from foreshock.monitor.hooks import (
    Callbacks,
    ModelHooks,
    find_layers,
    modules_in,
    uncovered,
    unwrapped,
)
from foreshock.monitor.layers import Adapter
from foreshock.monitor.loss_scale import LossScale
from foreshock.monitor.notices import MOST_SKIPS, Notices
from foreshock.monitor.outlets import Outlets, Placed
from foreshock.monitor.placement import local_of
from foreshock.monitor.ranks import Ranks
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.scalars import (
    GradientNorms,
    Parameters,
    Value,
    learning_rate,
    one_value,
)
from foreshock.monitor.settings import (
    WatchSettings,
    default_collect,
    default_spool,
    default_token,
    default_url,
)
from foreshock.monitor.sinks import Sink
from foreshock.monitor.states import OptimizerTensors
from foreshock.monitor.stepping import OptimizerHooks
from foreshock.monitor.steps import Losses, Step, closing_events, planned_event, snapshot_of
from foreshock.monitor.whatif import what_if_of

__all__ = ["Watch", "watch"]

_LOGGER = logging.getLogger("foreshock.monitor")
# A monitor that fails this often is of no use and only costs time.
_ERRORS_TO_DETACH: Final = 100


def watch(  # noqa: PLR0913 - the public face: one call, every choice by name
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    run: str,
    project: str = "default",
    url: str | None = None,
    collect: str | None = None,
    spool: Path | str | None = None,
    tensor_every: int = 10,
    detail_every: int = 10,
    include: str | None = None,
    exclude: str | None = None,
    config: Mapping[str, object] | None = None,
    tokens_per_step: int | None = None,
    first_step: int = 0,
    sinks: Sequence[Sink] = (),
    budget: float | None = None,
    what_if: Sequence[str] = (),
    optimizer_states: bool = False,
    histogram: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> Watch:
    """Watch a training run.

    Call it after the model is on its device, wrapped (DDP, FSDP2, tensor parallel) and compiled,
    and before the first step; in a job of several processes, in each of them. Nothing else in the
    loop changes. The loss is picked up when the model's forward returns it: as a 0-dim tensor, as
    `.loss` or `["loss"]`, or as the first 0-dim tensor of a tuple that gradients can come through.
    Else call `log(loss=...)`.

    Args:
        model: Its linear layers are watched.
        optimizer: Its `step` ends a step. Of several in a list, each of which trains a part of the
            model, the step of the last one does.
        run: Name of the run.
        project: Group of runs.
        url: Service; None takes FORESHOCK_URL (token from FORESHOCK_TOKEN), and if that is unset
            records stay in the spool for `foreshock import`.
        collect: Relay (`foreshock collect`) to which every rank reports and which gets the records
            instead of the service; None takes FORESHOCK_COLLECT.
        spool: Folder; None takes FORESHOCK_SPOOL, else ./foreshock-spool.
        tensor_every: Tensors are measured at every n-th step, scalars at every step.
        detail_every: On a CUDA device sqnr_db and the channels' statistics cost as much as all
            others: they are taken at every n-th step at most and null in between. On a CPU they
            are taken with the others.
        include: Regular expression over layer names; None takes all.
        exclude: Regular expression over layer names to leave out.
        config: Plain data about the run, for people.
        tokens_per_step: Gives the scalar tokens.
        first_step: Number of the next step, after a resume.
        sinks: Called with every record, in the monitor's own thread.
        budget: Largest share of the step time that watching may cost, e.g. 0.01; the cadence, and
            if need be a sample of rows and tensors, then follow from what is measured.
        what_if: Formats that the run does not use, measured as if it did: any of e4m3, e5m2,
            mxfp8, block128, nvfp4.
        optimizer_states: Measure the optimizer's moments and the weight gradients too.
        histogram: Count the elements of each tensor by their power of two.
        scaler: The loop's GradScaler, if it has one: grad_norm is then that of the gradients
            without the scale, and the scale is recorded as loss_scale.

    Raises:
        ValueError: A value is not allowed, or the model cannot be watched; the message says why.
        TypeError: model or optimizer is something else.
        OSError: The spool folder cannot be made.
    """
    settings = WatchSettings(
        run=run,
        project=project,
        url=url or default_url(),
        collect=collect or default_collect(),
        token=default_token(),
        spool=Path(spool) if spool is not None else default_spool(),
        cadence=Cadence(tensor_every, detail_every),
        include=include,
        exclude=exclude,
        config=config,
        tokens_per_step=tokens_per_step,
        first_step=first_step,
        sinks=sinks,
        budget=budget,
        what_if=what_if,
        optimizer_states=optimizer_states,
        histogram=histogram,
    )
    return Watch(model, optimizer, settings, scaler=scaler)


class Watch:
    """A run that is being watched. Made by `watch`; a context manager that closes itself.

    In a job of several processes every rank makes one; their worker threads merge each step, and
    rank 0 alone has records, a spool and sinks.

    Attributes:
        settings: What it was told.
        layers: Names of the watched layers of all ranks.
        device: Where this process trains.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        settings: WatchSettings,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._optimizers = all_of(optimizer)
        names = trained_parameters(model, self._optimizers)
        self._model = unwrapped(model)
        layers = find_layers(self._model, include=settings.include, exclude=settings.exclude)
        self.settings = settings
        self.device = local_of(next(iter(names))).device
        self._scale = LossScale(scaler)
        self._guard = Containment("training thread")
        self._plans = PlanBook(first_plan(settings.cadence, settings.budget))
        self._step = self._new_step(settings.first_step)
        self._ended: Step | None = None
        self._clock = Clock(self._guard)
        self._rate: Value | None = None
        self._skips = 0
        self._closed = False
        self._process = os.getpid()
        self._rank, world_size = ranks()
        group = Ranks.join()
        # Started by a launcher, but not joined to the others: each process trains for itself.
        self._active = self._rank == 0 or group is not None
        self.layers = tuple(layers) if group is None else group.union(tuple(layers))
        if group is not None:
            self.settings = replace(settings, launch_id=group.agreed(settings.launch_id))
        if self._active:
            placed = Placed(self._rank, world_size, group, self.device)
            self._outlets = Outlets(
                self.settings, self.layers, placed, plans=self._plans, guard=self._guard
            )
            self._outlets.share(names)
            self._attach(layers, names)
            atexit.register(self.close)

    def _attach(
        self,
        layers: Mapping[str, tuple[nn.Module, Adapter]],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        """Put every hook on the model, or none: if one fails, all is closed again."""
        with ExitStack() as undo:
            undo.callback(self._outlets.close, 0.0)
            self._losses = Losses(self.device)
            probe = self.settings.probe
            self._collector = Collector(
                self.device,
                probe=probe or (probe is None and self.device.type == "cpu"),
                what_if=what_if_of(self.settings.what_if),
                count_exponents=self.settings.histogram,
            )
            callbacks = Callbacks(
                self._forward_begins, self._look_for_a_skip, self._leave_out, self._losses.came
            )
            self._hooks = ModelHooks(
                self._model, layers, self._collector, self._guard, callbacks=callbacks
            )
            undo.callback(self._hooks.detach)
            if forget_compiled(self._model):
                _LOGGER.info("the model has run compiled; it is compiled anew, with the hooks")
            self._modules = modules_in(self._model)
            self._notices = Notices(self._rank)
            self._step.events += self._notices.uncovered(*uncovered(self._model, names))
            self._trained = Trained(self._model, self._optimizers)
            self._start_collecting()
            self._gradients = GradientNorms(names, self._guard)
            undo.callback(self._gradients.detach)
            self._parameters = Parameters(names)
            seen = (self._optimizers, names, self._collector, self._guard)
            self._states = OptimizerTensors(*seen, read=self.settings.optimizer_states)
            undo.callback(self._states.detach)
            self._stepping = OptimizerHooks(
                self._optimizers, self._before_optimizer, self._after_optimizers
            )
            undo.pop_all()

    @property
    def folder(self) -> Path | None:
        """Where the records of this launch wait on disk, if they do."""
        return self._outlets.folder if self._active else None

    @property
    def errors(self) -> int:
        """Failures of the monitor so far."""
        return self._guard.errors + self._outlets.errors if self._active else 0

    def log(self, **values: torch.Tensor | float) -> None:
        """Record scalars of the step that is in progress, or has just ended.

        Values logged several times in a step are averaged. They replace what is found without
        help (loss, grad_norm, ...).

        Args:
            **values: Numbers, or tensors of one element; a tensor is not waited for.
        """
        if not self._active or not self._stepping:
            return
        step = self._ended or self._step
        for name, value in values.items():
            with self._guard:
                one = one_value(name, value)
                step.logged.setdefault(name, []).append(one)

    def event(
        self,
        kind: str,
        detail: str | None = None,
        *,
        layer: str | None = None,
        role: str | None = None,
    ) -> None:
        """Record something planned, e.g. data_switch, lr_change, checkpoint: no alarm over it.

        It stands in the record of the step in progress, or of the next one between two steps.
        """
        if not self._active or not self._stepping:
            return
        with self._guard:
            event = planned_event(kind, detail, layer=layer, role=role, rank=self._rank)
            self._step.events.append(event)

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all ended steps are sealed on disk and in every sink; False if not."""
        if not self._active or self._closed:
            return True
        with self._guard:
            self._publish()
        return self._outlets.flush(timeout)

    def detach(self) -> None:
        """Take every hook off the model; `log` and `event` do nothing more. Training goes on."""
        if not self._active:
            return
        self._hooks.detach()
        self._gradients.detach()
        self._states.detach()
        self._stepping.detach()

    def close(self, timeout: float = 5.0) -> bool:
        """Detach, finish the records, ship for at most `timeout` seconds.

        Returns:
            True if everything is on disk and, with a service, acknowledged. What is not stays in
            the spool for the next start or for `foreshock import`.
        """
        if not self._active or self._closed or os.getpid() != self._process:
            return True
        self._closed = True
        atexit.unregister(self.close)
        self.detach()
        with self._guard:
            if self._ended is not None:
                self._ended.events += [*self._step.events, *closing_events(self._rank)]
            self._publish()
        return self._outlets.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def step(self) -> None:
        """End a step that the monitor cannot see end.

        For loops in which `optimizer.step()` runs inside a CUDA graph, or in which there is no
        torch optimizer; call it once after each step. Elsewhere it is not needed.
        """
        if self._active and not self._closed:
            self._end()

    def micro_batch(self) -> None:
        """Say that a micro-batch begins.

        For loops that run a model's parts and not its forward, as Lightning does; once said, it
        must be said before each.
        """
        if self._active and not self._closed:
            with self._guard:
                self._hooks.micro_batch()

    def _new_step(self, number: int) -> Step:
        cadence = self._plans.at(number).cadence
        return Step(number, cadence.measures(number), cadence.details(number))

    def _start_collecting(self) -> None:
        self._collector.sampling = self._plans.at(self._step.number).sampling
        self._collector.start_step(measuring=self._step.measured, detailed=self._step.detailed)
        self._hooks.start_step()

    def _forward_begins(self) -> None:
        # What is queued while a graph is captured would run at its replays.
        if self._capturing():
            return
        self._publish()
        self._clock.start()
        self._scale.start_step()

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, again: bool) -> None:
        if self._capturing():
            return
        with self._guard:
            # One that works on other gradients than backward's: that those are gone says nothing.
            self._collector.flush()
            self._skips = 0 if self._gradients.use() else MOST_SKIPS
            self._rate = learning_rate(self._optimizers)
            if (overflow := self._scale.overflow(optimizer)) is not None:
                self._step.scalars["found_inf"] = one_value("found_inf", overflow)
            if self._reads_parameters(self._step):
                self._parameters.before_step()
            if not again:
                self._states.gradients(optimizer)

    def _after_optimizers(self) -> None:
        if self._capturing():
            return
        with self._guard:
            self._states.moments()
        self._end()

    def _look_for_a_skip(self) -> None:
        """A forward pass begins: if the gradients have gone without a step, that was one."""
        if self._skips < MOST_SKIPS and self._gradients.thrown_away and not self._capturing():
            self._skips += 1
            self._step.events += self._notices.skipped_step()
            if self._skips == MOST_SKIPS:
                self._step.events += self._notices.all_skipped()
            self._publish()
            self._end_step(self._collector.take())
            self._start_collecting()

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _end(self) -> None:
        taken = Taken()
        # Apart, so that a failure here costs the tensors only.
        with self._guard:
            taken = self._collector.take()
        with self._guard:
            # There is one if no forward pass came in between, as in a loop around a closure.
            self._publish()
            self._end_step(taken)
            # Looking is nothing beside measuring on a CPU, but not beside launches.
            if self._step.measured if self.device.type == "cpu" else self._step.detailed:
                self._look_for_new_layers()
                self._look_for_new_parameters()
        with self._guard:
            self._start_collecting()
        if self._guard.errors >= _ERRORS_TO_DETACH:
            _LOGGER.error("the monitor failed %d times and lets go", self._guard.errors)
            self.detach()

    def _end_step(self, taken: Taken) -> None:
        step = self._step
        step.taken = taken
        number = step.number + 1
        self._step = self._new_step(number)
        step.time = datetime.now(UTC)
        step.gradients = self._scale.without(self._gradients.norms())
        self._gradients.start_step()
        step.losses = self._losses.take()
        step.events += self._notices.skipped(self._collector.skipped)
        explained = self._guard.errors or self._collector.skipped
        if step.nothing_ran and self._collector.sampling.tensors == 1 and not explained:
            step.events += self._notices.nothing_ran()
        self._ended = step
        step.scalars |= self._clock.step(
            self._outlets.assembler.kernel_seconds if step.measured else 0.0
        )
        found = {"learning_rate": self._rate, "loss_scale": self._scale.value}
        step.scalars |= {name: value for name, value in found.items() if value is not None}
        if self.settings.tokens_per_step is not None:
            step.scalars["tokens"] = float(number * self.settings.tokens_per_step)
        ratio = self._parameters.update_ratio()
        if ratio is not None:
            step.scalars["update_ratio"] = ratio
        if self._reads_parameters(step):
            step.parameters = self._parameters.norms()
        if step.measured and step.detailed:
            own = self._collector.bytes_of(taken) + self._parameters.bytes
            step.scalars["monitor_bytes"] = float(own)
        te_exact.step()

    def _reads_parameters(self, step: Step) -> bool:
        # On a GPU reading every parameter costs as much as measuring the weights once more.
        return (step.measured and step.detailed) or self.device.type == "cpu"

    def _leave_out(self) -> None:
        """Too many forward passes without a step: let go of what was kept of them."""
        self._step.events += self._notices.no_step()
        self._skips = MOST_SKIPS
        self._step.measured = False
        self._losses.take()
        self._collector.take()
        self._collector.start_step(measuring=False)

    def _look_for_new_layers(self) -> None:
        """Watch layers that came after the watch, or in place of others."""
        if modules_in(self._model) == self._modules:
            return
        self._modules = modules_in(self._model)
        settings = self.settings
        found = find_layers(self._model, include=settings.include, exclude=settings.exclude)
        self._step.events += self._notices.layers_added(self._hooks.attach_new(found))

    def _look_for_new_parameters(self) -> None:
        """Follow what is unfrozen or given to the optimizer after the watch."""
        names = self._trained.changed()
        if names is not None:
            self._outlets.share(names)
            self._gradients.detach()
            self._gradients = GradientNorms(names, self._guard)
            self._parameters = Parameters(names)

    def _publish(self) -> None:
        """Hand the step that has ended to the worker."""
        step, self._ended = self._ended, None
        if step is not None:
            self._outlets.submit(snapshot_of(step, self.device))
