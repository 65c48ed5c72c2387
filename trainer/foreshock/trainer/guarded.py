"""How this trainer's runs are guarded: the other door to the monitor, beside `watched`.

The loop's steps go back with a rollback, and the watch after it is a new launch, so that the
service numbers the steps taken again as a new attempt.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import torch
from torch import nn

from foreshock.monitor.guard import Guard, GuardPolicy, TorchControls
from foreshock.monitor.guard.runtime import Diagnose, Entry, Scorer
from foreshock.trainer.loop import GoBack, Watcher

__all__ = ["Guarded"]


class Guarded:
    """Makes guards: `train(overseer=guarded, watch=watched(config, sinks=[guarded.sink]))`.

    Args:
        scorer: Of the run's records.
        policy: None takes the default.
        diagnose: See `Guard`.
        patience: See `Guard`.
        on_entry: Called with every decision, in the training thread.

    Attributes:
        guard: That of the current run; None before there is one.
    """

    def __init__(
        self,
        scorer: Scorer,
        policy: GuardPolicy | None = None,
        *,
        diagnose: Diagnose | None = None,
        patience: float = 0.0,
        on_entry: Callable[[Entry], object] | None = None,
    ) -> None:
        self._scorer, self._policy, self._diagnose = scorer, policy, diagnose
        self._patience, self._on_entry = patience, on_entry
        self.guard: Guard | None = None

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> _Overseer:
        """Make the guard of a run; what `train` calls."""
        # The loop leaves out the data by itself, when it goes back.
        controls = TorchControls(model, optimizer, skip=lambda count: None)
        self.guard = Guard(
            self._scorer,
            controls,
            self._policy,
            diagnose=self._diagnose,
            patience=self._patience,
        )
        return _Overseer(self.guard, self._on_entry)

    def sink(self, record: pa.RecordBatch) -> None:
        """For the watch."""
        if self.guard is not None:
            self.guard.sink(record)


class _Overseer:
    """A guard as the loop sees it."""

    def __init__(self, guard: Guard, on_entry: Callable[[Entry], object] | None) -> None:
        self._guard, self._on_entry = guard, on_entry
        self._told = 0

    def begin(self, step: int) -> None:
        self._guard.begin(step)

    def attach(self, watcher: Watcher) -> None:
        self._guard.attach(watcher)

    def after(self, next_step: int) -> GoBack | None:
        back = self._guard.step(next_step)
        if self._on_entry is not None:
            for entry in self._guard.entries[self._told :]:
                self._on_entry(entry)
            self._told = len(self._guard.entries)
        return None if back is None else GoBack(back.to, back.skip)

    def close(self) -> None:
        self._guard.close()
