"""Hugging Face Trainer: a guard beside the watch.

guard = GuardCallback(LocalScorer)
watch = ForeshockCallback("llama-1b", sinks=[guard.sink])
Trainer(..., callbacks=[guard, watch])      # the guard first, so that records hold its rate
"""

from __future__ import annotations

from typing import Any

from foreshock.monitor.integrations.guarding import GuardHooks
from foreshock.monitor.integrations.huggingface import ForeshockCallback
from foreshock.monitor.integrations.optimizers import bare

from transformers import TrainerCallback  # isort: skip  # the watch's module says what is missing

__all__ = ["GuardCallback"]


class GuardCallback(GuardHooks, TrainerCallback):  # type: ignore[misc]
    """Guards each `trainer.train()`; see `GuardHooks` for its arguments.

    Attributes:
        watch: The callback that watches; needed only to tell in its records what was done.
    """

    watch: ForeshockCallback | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the model and the optimizer as the Trainer has prepared them."""
        self.begin(kwargs["model"], [bare(kwargs["optimizer"])], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide, between two steps."""
        self.after(state.global_step, self.watch.watch if self.watch else None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go."""
        self.end()
