"""Lightning: a guard beside the watch.

guard = GuardCallback(LocalScorer)
watch = ForeshockCallback("llama-1b", sinks=[guard.sink])
Trainer(callbacks=[guard, watch])           # the guard first, so that records hold its rate
"""

from __future__ import annotations

from typing import Any

from foreshock.monitor.integrations.guarding import GuardHooks
from foreshock.monitor.integrations.lightning import ForeshockCallback
from foreshock.monitor.integrations.optimizers import bare

from lightning.pytorch.callbacks import Callback  # isort: skip  # see huggingface_guard

__all__ = ["GuardCallback"]


class GuardCallback(GuardHooks, Callback):  # type: ignore[misc]
    """Guards each fit; see `GuardHooks` for its arguments.

    Attributes:
        watch: The callback that watches; needed only to tell in its records what was done.
    """

    watch: ForeshockCallback | None = None
    _step = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the model and the optimizers as Lightning has prepared them."""
        self._step = trainer.global_step
        optimizers = [bare(optimizer) for optimizer in trainer.optimizers]
        self.begin(pl_module, optimizers, self._step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Decide, between two steps; batches that only accumulate are none."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.after(self._step, self.watch.watch if self.watch else None)

    def on_train_end(self, *_: Any) -> None:
        """Let go."""
        self.end()

    def on_exception(self, *_: Any) -> None:
        """Let go."""
        self.end()
