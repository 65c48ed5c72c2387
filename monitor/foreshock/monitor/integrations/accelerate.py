"""Accelerate: `Accelerator(log_with=[ForeshockTracker(run="...")])`.

A tracker alone sees only what is logged; `watch` adds the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from foreshock.monitor.integrations.optimizers import bare, scaler_of
from foreshock.monitor.session import Watch, watch

try:
    from accelerate.tracking import GeneralTracker
except ModuleNotFoundError as error:
    raise ImportError(
        "foreshock.monitor.integrations.accelerate needs accelerate: pip install accelerate"
    ) from error

__all__ = ["ForeshockTracker"]


class ForeshockTracker(GeneralTracker):  # type: ignore[misc]
    """Numbers given to `accelerator.log` become scalars of the step they are logged in.

    That is the step in progress, or the one that has just ended; the `step` that `log` may be
    given counts what its caller likes and is not used. Call `init_trackers` first, then `watch`.

    Args:
        run: Name of the run.
        **options: As `foreshock.monitor.watch` takes them.
    """

    name = "foreshock"
    requires_logging_directory = False
    # Every process watches its part of the model.
    main_process_only = False

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__()
        self._run = run
        self._options = options
        self._watch: Watch | None = None

    @property
    def tracker(self) -> Watch | None:
        """The watch, once there is one."""
        return self._watch

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Keep them as the run's config."""
        self._options["config"] = {**(self._options.get("config") or {}), **values}

    def watch(self, model: nn.Module, optimizer: object) -> Watch:
        """Watch a model and an optimizer as `accelerator.prepare` returned them."""
        self.finish()
        options: dict[str, Any] = {"scaler": scaler_of(optimizer)} | self._options
        self._watch = watch(model, bare(optimizer), run=self._run, **options)
        return self._watch

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Record those of the values that are numbers, or tensors of one element."""
        if self._watch is not None:
            self._watch.log(**{name: x for name, x in values.items() if _is_number(x)})

    def finish(self) -> None:
        """Finish the records."""
        ended, self._watch = self._watch, None
        if ended is not None:
            ended.close()


def _is_number(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)
