"""Watching one training run: from optimizer step to optimizer step.

Everything here runs in the training thread and only queues work: no value is read on the host, and
nothing that goes wrong after the watch is attached reaches the training.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch
from torch import nn

from foreshock.monitor.assembly import Assembler
from foreshock.monitor.attach import ranks, trained_parameters
from foreshock.monitor.guard import Guard
from foreshock.monitor.hooks import GemmHooks, Observation, find_gemms
from foreshock.monitor.record import Event, TensorIdentity
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.scalars import GradientNorms, Parameters, find_loss, mean
from foreshock.monitor.settings import WatchSettings, default_spool, default_url
from foreshock.monitor.shipping import Service, Shipper
from foreshock.monitor.sinks import Sink
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.spool import Spool
from foreshock.monitor.transfer import pack
from foreshock.monitor.worker import Worker

__all__ = ["Watch", "watch"]

_LOGGER = logging.getLogger("foreshock.monitor")
# A monitor that fails this often is of no use and only costs time.
_ERRORS_TO_DETACH: Final = 100

Value = torch.Tensor | float


def watch(  # noqa: PLR0913 - the public face: one call, every choice by name
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    run: str,
    project: str = "default",
    url: str | None = None,
    spool: Path | str | None = None,
    tensor_every: int = 10,
    include: str | None = None,
    exclude: str | None = None,
    config: Mapping[str, object] | None = None,
    tokens_per_step: int | None = None,
    first_step: int = 0,
    sinks: Sequence[Sink] = (),
) -> Watch:
    """Watch a training run.

    Call it after the model is on its device and before the first step; nothing else in the loop
    changes. The loss is picked up when the model's forward returns it, else call `log(loss=...)`.

    Args:
        model: Its linear layers are watched; eager, not compiled.
        optimizer: Its `step` ends a step.
        run: Name of the run.
        project: Group of runs.
        url: Service; None takes FORESHOCK_URL (token from FORESHOCK_TOKEN), and if that is unset
            records stay in the spool for `foreshock import`.
        spool: Folder; None takes FORESHOCK_SPOOL, else ./foreshock-spool.
        tensor_every: Tensors are measured at every n-th step, scalars at every step.
        include: Regular expression over layer names; None takes all.
        exclude: Regular expression over layer names to leave out.
        config: Plain data about the run, for people.
        tokens_per_step: Gives the scalar tokens.
        first_step: Number of the next step, after a resume.
        sinks: Called with every record, in the monitor's own thread.

    Raises:
        ValueError: A value is not allowed, or the model cannot be watched; the message says why.
        TypeError: model or optimizer is something else.
        OSError: The spool folder cannot be made.
    """
    settings = WatchSettings(
        run=run,
        project=project,
        url=url or default_url(),
        token=os.environ.get("FORESHOCK_TOKEN") or None,
        spool=Path(spool) if spool is not None else default_spool(),
        cadence=Cadence(tensor_every),
        include=include,
        exclude=exclude,
        config=config,
        tokens_per_step=tokens_per_step,
        first_step=first_step,
        sinks=sinks,
    )
    return Watch(model, optimizer, settings)


@dataclass(slots=True)
class _Step:
    """A step in progress, or one that has ended and waits for late `log` calls."""

    number: int
    measured: bool
    losses: list[torch.Tensor] = field(default_factory=list)
    logged: dict[str, list[Value]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    scalars: dict[str, Value] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    observations: list[Observation] = field(default_factory=list)
    time: datetime | None = None


class Watch:
    """A run that is being watched. Made by `watch`; a context manager that closes itself.

    In a job of several processes only rank 0 watches, and measures its own part of the batch.

    Attributes:
        settings: What it was told.
        layers: Names of the watched layers.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: WatchSettings
    ) -> None:
        names = trained_parameters(model, optimizer)
        gemms = find_gemms(model, include=settings.include, exclude=settings.exclude)
        self.settings = settings
        self.layers = tuple(gemms)
        self._device = next(iter(names)).device
        self._guard = Guard("training thread")
        self._step = _Step(settings.first_step, settings.cadence.measures(settings.first_step))
        self._ended: _Step | None = None
        self._mark: float | None = None
        self._guard_seconds = 0.0
        self._rate: Value | None = None
        self._closed = False
        self._process = os.getpid()
        rank, world_size = ranks()
        self._active = rank == 0
        if self._active:
            self._open_ways_out(world_size)
            self._attach(model, optimizer, gemms, names)
            atexit.register(self.close)

    def _open_ways_out(self, world_size: int) -> None:
        settings = self.settings
        self._spool = self._shipper = None
        if settings.spool is not None:
            service = Service(settings.url, token=settings.token) if settings.url else None
            registration = settings.registration(self.layers, world_size=world_size)
            self._spool = Spool(settings.spool, registration, max_bytes=settings.max_spool_bytes)
            if service is not None:
                self._shipper = Shipper(service, self._spool.outbox, root=settings.spool)
        self._worker = Worker(
            Assembler(self.layers, rank=0),
            spool=self._spool,
            sinks=settings.sinks,
            guards=(self._guard,),
            on_sealed=self._shipper.notify if self._shipper else _nothing,
        )

    def _attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        gemms: Mapping[str, nn.Module],
        names: Mapping[nn.Parameter, str],
    ) -> None:
        self._hooks = GemmHooks(
            model,
            gemms,
            guard=self._guard,
            on_forward=self._forward_begins,
            on_output=self._model_returned,
            probe=self.settings.probe,
        )
        self._hooks.start_step(measuring=self._step.measured)
        self._gradients = GradientNorms(names, self._guard)
        self._parameters = Parameters(names)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_optimizer),
            optimizer.register_step_post_hook(self._after_optimizer),
        ]

    @property
    def folder(self) -> Path | None:
        """Where the records of this launch wait on disk, if they do."""
        return self._spool.outbox.folder if self._active and self._spool else None

    @property
    def errors(self) -> int:
        """Failures of the monitor so far."""
        return self._guard.errors + self._worker.guard.errors if self._active else 0

    def log(self, **values: torch.Tensor | float) -> None:
        """Record scalars of the step that is in progress, or has just ended.

        Values logged several times in a step are averaged. They replace what is found without
        help (loss, grad_norm, ...).

        Args:
            **values: Numbers, or tensors of one element; a tensor is not waited for.
        """
        if not self._active:
            return
        with self._guard:
            step = self._ended or self._step
            for name, value in values.items():
                step.logged.setdefault(name, []).append(_scalar(name, value))

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
        if self._active:
            self._step.events.append(Event(kind, layer=layer, role=role, rank=0, detail=detail))

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until all ended steps are sealed on disk and in every sink; False on time-out."""
        if not self._active or self._closed:
            return True
        with self._guard:
            self._publish()
        return self._worker.flush(timeout)

    def detach(self) -> None:
        """Take every hook off the model; `log` and `event` do nothing more. Training goes on."""
        if not self._active:
            return
        self._hooks.detach()
        self._gradients.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
                self._ended.events += self._step.events
            self._publish()
        done = self._worker.close(timeout)
        if self._shipper is not None:
            done = self._shipper.close(timeout) and done
        if self._spool is not None and done:
            self._spool.close()
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _forward_begins(self) -> None:
        self._publish()
        if self._mark is None:
            self._mark = time.perf_counter()

    def _model_returned(self, output: object, micro_batch: int) -> None:
        loss = find_loss(output)
        if loss is not None:
            # A copy: the loop may divide the loss in place.
            self._step.losses.append(loss.detach().clone())

    def _before_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        with self._guard:
            self._rate = _learning_rate(optimizer)
            self._parameters.before_step()

    def _after_optimizer(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        observations: list[Observation] = []
        # Apart, so that a failure here costs the tensors only.
        with self._guard:
            observations = self._hooks.take()
        with self._guard:
            # There is one if no forward pass came in between, as in a loop around a closure.
            self._publish()
            self._end_step(observations)
        self._hooks.start_step(measuring=self._step.measured)
        if self._guard.errors >= _ERRORS_TO_DETACH:
            _LOGGER.error("the monitor failed %d times and lets go", self._guard.errors)
            self.detach()

    def _end_step(self, observations: list[Observation]) -> None:
        step = self._step
        step.observations = observations
        number = step.number + 1
        self._step = _Step(number, self.settings.cadence.measures(number))
        step.time = datetime.now(UTC)
        step.gradients = self._gradients.norms
        self._gradients.start_step()
        self._ended = step
        self._time_step(step)
        if self._rate is not None:
            step.scalars["learning_rate"] = self._rate
        if self.settings.tokens_per_step is not None:
            step.scalars["tokens"] = float(number * self.settings.tokens_per_step)
        ratio, step.parameters = self._parameters.after_step()
        if ratio is not None:
            step.scalars["update_ratio"] = ratio

    def _time_step(self, step: _Step) -> None:
        now = time.perf_counter()
        if self._mark is not None:
            seconds = now - self._mark
            inside = self._guard.seconds - self._guard_seconds
            step.scalars["step_seconds"] = seconds
            step.scalars["overhead_ratio"] = inside / max(seconds - inside, 1e-9)
        self._mark = now
        self._guard_seconds = self._guard.seconds

    def _publish(self) -> None:
        """Hand the step that has ended to the worker; its copy to the host starts here."""
        step, self._ended = self._ended, None
        if step is None or step.time is None:
            return
        scalars = step.scalars | {name: mean(values) for name, values in step.logged.items()}
        tensors = {k: v for k, v in scalars.items() if isinstance(v, torch.Tensor)}
        channels = _add_channels(step.observations)
        groups: dict[str, Sequence[torch.Tensor]] = {
            "scalars": list(tensors.values()),
            "losses": step.losses,
            "gradients": list(step.gradients.values()),
            "parameters": list(step.parameters.values()),
            "observations": [observation.sums for observation in step.observations],
            "channels": list(channels.values()),
        }
        self._worker.submit(
            Snapshot(
                step=step.number,
                time=step.time,
                scalars={k: float(v) for k, v in scalars.items() if k not in tensors},
                names={
                    "scalars": tuple(tensors),
                    "gradients": tuple(step.gradients),
                    "parameters": tuple(step.parameters),
                },
                observations=tuple((o.identity, o.micro_batch) for o in step.observations),
                measured=step.measured,
                channels=tuple((k, v.numel()) for k, v in channels.items()),
                packed=pack(groups, self._device),
                events=tuple(step.events),
            )
        )


def _add_channels(observations: Sequence[Observation]) -> dict[TensorIdentity, torch.Tensor]:
    """Channel sums per identity: what they are merged into does not grow with micro-batches."""
    channels: dict[TensorIdentity, torch.Tensor] = {}
    for observation in observations:
        if observation.channels is not None:
            so_far = channels.get(observation.identity)
            added = observation.channels if so_far is None else so_far + observation.channels
            channels[observation.identity] = added
    return channels


def _nothing() -> None:
    """Without a service, a sealed batch interests nobody."""


def _scalar(name: str, value: torch.Tensor | float) -> Value:
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(
            f"log({name}=...) got a tensor of shape {tuple(value.shape)}, not one value"
        )
    if value.device.type == "cpu":
        return float(value.detach())
    return value.detach().reshape(()).to(torch.float64, copy=True)


def _learning_rate(optimizer: torch.optim.Optimizer) -> Value | None:
    """The largest over the parameter groups; a tensor is not waited for."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if not rates:
        return None
    if isinstance(rates[0], torch.Tensor):
        return _scalar("learning_rate", rates[0])
    return max(float(rate) for rate in rates)
