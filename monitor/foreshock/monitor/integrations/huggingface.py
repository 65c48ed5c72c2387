"""Hugging Face Trainer: `Trainer(callbacks=[ForeshockCallback(run="...")])`.

The step's loss is taken from what the model returns, so `logging_nan_inf_filter`, which replaces a
NaN in the Trainer's own log by a mean, hides nothing here. Where the Trainer computes the loss
outside of the model (`compute_loss_func`, label smoothing), the records have none: call
`callback.watch.log(loss=...)` there. Under torch.compile with gradient accumulation the recorded
loss is the mean over micro-batches of what the model returned, which the Trainer may have divided
by the number of micro-batches already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foreshock.monitor.containment import Containment
from foreshock.monitor.integrations.optimizers import bare, scaler_of
from foreshock.monitor.layers.adapter import Hook
from foreshock.monitor.scalars import find_loss
from foreshock.monitor.session import Watch, watch

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError(
        "foreshock.monitor.integrations.huggingface needs transformers: pip install transformers"
    ) from error

__all__ = ["ForeshockCallback"]


class ForeshockCallback(TrainerCallback):  # type: ignore[misc]
    """Watches each `trainer.train()` from its first step to its end.

    A resumed training goes on at its step. If training raises, what has been recorded is kept and
    the watch ends with the process, with the next `train()`, or with `close()`.

    Args:
        run: Name of the run.
        **options: As `foreshock.monitor.watch` takes them; `first_step` comes from the Trainer.

    Attributes:
        watch: The watch of the current training, or None.
    """

    def __init__(self, run: str, **options: Any) -> None:
        self.watch: Watch | None = None
        self._run = run
        self._options = options
        self._guard = Containment("training thread")
        self._losses: list[torch.Tensor] = []
        self._factor = 1.0
        self._divided = False
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the model and the optimizer as the Trainer has prepared them."""
        self.close()
        model: nn.Module = kwargs["model"]
        optimizer = kwargs["optimizer"]
        options: dict[str, Any] = {"scaler": scaler_of(optimizer)} | self._options
        self.watch = watch(
            model, bare(optimizer), run=self._run, first_step=state.global_step, **options
        )
        # The loss of a rank is then divided by the tokens of all ranks.
        self._factor = float(args.world_size) if args.average_tokens_across_devices else 1.0
        self._handle = model.register_forward_hook(
            Hook(self._guard, self._returned), with_kwargs=True
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the loss of the step that the optimizer is about to take."""
        if self.watch is None:
            return
        with self._guard:
            losses, self._losses = self._losses, []
            if losses:
                total = torch.stack(losses).double().sum()
                if self._divided:
                    self.watch.log(loss=total * self._factor)
                else:
                    self.watch.log(loss=total / len(losses))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record that a checkpoint was written."""
        if self.watch is not None:
            self.watch.event("checkpoint", f"step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the records."""
        self.close()

    def close(self) -> None:
        """End the watch, if there is one."""
        ended, self.watch = self.watch, None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._losses = []
        if ended is not None:
            ended.close()

    def _returned(
        self, module: nn.Module, args: object, kwargs: dict[str, object], output: object
    ) -> None:
        if module.training and torch.is_grad_enabled():
            loss = find_loss(output)
            if loss is not None:
                # A copy: the Trainer may divide it in place.
                self._losses.append(loss.detach().clone())
                # Then each micro-batch holds its share of the step's loss.
                self._divided = kwargs.get("num_items_in_batch") is not None
