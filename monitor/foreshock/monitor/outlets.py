"""Where steps go: a worker thread, and behind it disk, service, relay and sinks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from foreshock.monitor.assembly import Assembler
from foreshock.monitor.budget import Budget, PlanBook
from foreshock.monitor.containment import Containment
from foreshock.monitor.placement import replicas
from foreshock.monitor.rank_reports import Reporter
from foreshock.monitor.ranks import Ranks
from foreshock.monitor.settings import WatchSettings
from foreshock.monitor.shipping import Service, Shipper
from foreshock.monitor.snapshot import Snapshot
from foreshock.monitor.spool import Spool
from foreshock.monitor.worker import Worker

__all__ = ["LINGER_SECONDS", "Outlets", "Placed"]

LINGER_SECONDS: Final = 0.1
"""So long a step may wait for others, on a device."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where this process stands in the job.

    Attributes:
        rank: Global rank.
        world_size: Number of processes.
        group: The others, or None.
        device: Where this process trains.
    """

    rank: int
    world_size: int
    group: Ranks | None
    device: torch.device


class Outlets:
    """Everything behind the training thread, opened together and closed together.

    Args:
        settings: What the watch was told.
        layers: Names of the watched layers of all ranks.
        placed: Where this process stands.
        plans: When tensors are measured; `first_plan` of the settings is in force.
        guard: Of the training thread, whose failures are reported in records.

    Attributes:
        assembler: Makes the records.
        errors: Failures of the threads so far.

    Raises:
        OSError: The spool folder cannot be made.
        ValueError: A certificate or an address cannot be used.
    """

    def __init__(
        self,
        settings: WatchSettings,
        layers: tuple[str, ...],
        placed: Placed,
        *,
        plans: PlanBook,
        guard: Containment,
    ) -> None:
        self._spool: Spool | None = None
        self._shipper: Shipper | None = None
        self._guard = guard
        self._shares: dict[str, float | None] = {}
        with ExitStack() as undo:
            if settings.spool is not None and placed.rank == 0:
                self._open_spool(settings, layers, placed, undo)
            self._reporter = Reporter.of(settings, placed.rank, placed.device, self._all_errors)
            self.assembler = Assembler(
                layers,
                rank=placed.rank,
                ranks=placed.group,
                shares=self._shares,
                plans=plans,
                budget=Budget(settings.budget, plans.at(0)) if settings.budget else None,
                reporter=self._reporter,
            )
            undo.pop_all()
        self._worker = Worker(
            self.assembler,
            spool=self._spool,
            sinks=settings.sinks if placed.rank == 0 else (),
            guards=(guard, self.assembler.guard),
            on_sealed=self._shipper.notify if self._shipper else _nothing,
            # The others wait for this process's part of every step.
            keeps_place=placed.group is not None,
            # On a CPU a step is long beside what a record takes, and records may come at once.
            linger=0.0 if placed.device.type == "cpu" else LINGER_SECONDS,
        )

    def _open_spool(
        self, settings: WatchSettings, layers: tuple[str, ...], placed: Placed, undo: ExitStack
    ) -> None:
        target, root = settings.target, settings.spool
        assert root is not None
        service = Service(target, token=settings.token) if target else None
        if service is not None:
            undo.callback(service.close)
        registration = settings.registration(layers, world_size=placed.world_size)
        self._spool = Spool(root, registration, max_bytes=settings.max_spool_bytes)
        undo.callback(self._spool.close)
        if service is not None:
            self._shipper = Shipper(service, self._spool.outbox, root=root)
            undo.callback(self._shipper.close, 0.0)

    @property
    def folder(self) -> Path | None:
        """Where the records of this launch wait on disk, if they do."""
        return None if self._spool is None else self._spool.outbox.folder

    @property
    def errors(self) -> int:
        """Failures of the threads so far."""
        return self._worker.guard.errors

    def share(self, names: Mapping[nn.Parameter, str]) -> None:
        """Note which processes hold the same pieces of these parameters."""
        self._shares |= {name: replicas(parameter) for parameter, name in names.items()}

    def submit(self, snapshot: Snapshot) -> None:
        """Take a step; never waits."""
        self._worker.submit(snapshot)

    def flush(self, timeout: float) -> bool:
        """Wait until everything is sealed on disk and in every sink; False if not."""
        return self._worker.flush(timeout)

    def close(self, timeout: float) -> bool:
        """Finish the records, ship for at most `timeout` seconds.

        Returns:
            True if everything is on disk and, with a service, acknowledged.
        """
        done = self._worker.close(timeout)
        if self._shipper is not None:
            done = self._shipper.close(timeout) and done
        if self._spool is not None and done:
            done = self._spool.close()
        return done if self._reporter is None else self._reporter.close(timeout) and done

    def _all_errors(self) -> int:
        return self._guard.errors + self.errors


def _nothing() -> None:
    """Nobody ships."""
