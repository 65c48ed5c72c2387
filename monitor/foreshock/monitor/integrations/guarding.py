"""What the guards of Hugging Face's Trainer and of Lightning share; imports neither.

Neither lets its steps go back: a rollback restores weights and optimizer, and training goes on with
new data at the next step, so that the data of the bad stretch are skipped by themselves. Their
schedulers go on as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foreshock.monitor.containment import Containment
from foreshock.monitor.guard.controls import TorchControls
from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.guard.runtime import Diagnose, Guard, Scorer

__all__ = ["GuardHooks"]


class GuardHooks:
    """Guards one training after the other; give its `sink` to the watch's callback.

    Args:
        make_scorer: Makes the scorer of one training, e.g. `LocalScorer`.
        policy: None takes the default.
        diagnose: See `Guard`.
        patience: See `Guard`.

    Attributes:
        guard: That of the current or latest training; None before the first.
    """

    def __init__(
        self,
        make_scorer: Callable[[], Scorer],
        policy: GuardPolicy | None = None,
        *,
        diagnose: Diagnose | None = None,
        patience: float = 0.0,
    ) -> None:
        self._make_scorer, self._policy = make_scorer, policy
        self._diagnose, self._patience = diagnose, patience
        self._containment = Containment("guard's callback")
        self.guard: Guard | None = None

    def sink(self, record: Any) -> None:
        """For `ForeshockCallback(..., sinks=[guard.sink])`."""
        if self.guard is not None:
            self.guard.sink(record)

    def begin(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int = 0
    ) -> None:
        """A training begins, with optimizer step `step`."""
        with self._containment:
            self.guard = Guard(
                self._make_scorer(),
                TorchControls(model, optimizers),
                self._policy,
                diagnose=self._diagnose,
                patience=self._patience,
            )
            self.guard.begin(step)

    def after(self, next_step: int, watch: Any) -> None:
        """A step was taken."""
        guard = self.guard
        if guard is None:
            return
        if watch is not None and watch is not guard.recorder:
            guard.attach(watch)
        guard.step(next_step)

    def end(self) -> None:
        """The training is over; what was decided stays in `guard.entries`."""
        if self.guard is not None:
            self.guard.close()
