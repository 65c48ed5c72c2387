"""What Lightning's callback does, for both names under which Lightning is installed.

Imports no Lightning: `lightning.pytorch.Callback` and `pytorch_lightning.Callback` are two classes.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from foreshock.monitor.integrations.optimizers import bare
from foreshock.monitor.scalars import find_loss
from foreshock.monitor.session import Watch, watch

__all__ = ["LightningHooks"]

_LOGGER = logging.getLogger("foreshock.monitor")


class LightningHooks:
    """Watches each fit from its first training batch to its end, or to what ends it.

    Sanity checks, validation and tests leave no records. With `accumulate_grad_batches` a record
    is one optimizer step. The loss is what `training_step` returns.

    Args:
        run: Name of the run; None takes FORESHOCK_RUN.
        optimizer: Which of several optimizers, all of which are watched, ends a step; the last one
            unless told otherwise.
        attached_by_itself: Nobody asked for it in code, so it gives way to a callback that
            somebody did ask for, and what cannot be watched is logged and not raised.
        **options: As `foreshock.monitor.watch` takes them; `first_step` comes from the trainer.

    Attributes:
        watch: The watch of the current fit, or None.

    Raises:
        ValueError: There is no name for the run.
    """

    def __init__(
        self,
        run: str | None = None,
        *,
        optimizer: int = -1,
        attached_by_itself: bool = False,
        **options: Any,
    ) -> None:
        name = run or os.environ.get("FORESHOCK_RUN")
        if not name:
            raise ValueError("no name for the run; give run=... or set FORESHOCK_RUN")
        self.watch: Watch | None = None
        self._run = name
        self._optimizer = optimizer
        self._by_itself = attached_by_itself
        self._options = options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach, after everything is on its device and wrapped."""
        self._close()
        if not self._by_itself:
            self._attach(trainer, pl_module)
        elif not any(_asked_for(callback) for callback in trainer.callbacks):
            try:
                self._attach(trainer, pl_module)
            except (OSError, TypeError, ValueError, IndexError) as error:
                _LOGGER.warning("FORESHOCK_RUN is set, but this fit is not watched: %s", error)

    def on_train_batch_start(self, *_: Any) -> None:
        """A micro-batch begins; `training_step` need not go through the module's forward."""
        if self.watch is not None:
            self.watch.micro_batch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Record the loss."""
        loss = find_loss(outputs)
        if self.watch is None or loss is None:
            return
        # Under automatic optimization Lightning has divided it.
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self.watch.log(loss=loss.detach() * parts)

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        """Record that a checkpoint is written."""
        if self.watch is not None:
            self.watch.event("checkpoint", f"step {trainer.global_step}")

    def on_train_end(self, *_: Any) -> None:
        """Finish the records."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Finish the records of a fit that raised."""
        self._close()

    def _attach(self, trainer: Any, pl_module: Any) -> None:
        optimizers = [bare(optimizer) for optimizer in trainer.optimizers]
        optimizers.append(optimizers.pop(self._optimizer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        found: dict[str, Any] = {"first_step": trainer.global_step}
        if isinstance(scaler, torch.amp.GradScaler):
            found["scaler"] = scaler
        self.watch = watch(pl_module, optimizers, run=self._run, **(found | self._options))

    def _close(self) -> None:
        ended, self.watch = self.watch, None
        if ended is not None:
            ended.close()


def _asked_for(callback: object) -> bool:
    return isinstance(callback, LightningHooks) and not callback._by_itself
