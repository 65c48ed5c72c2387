"""torchtitan: a Trainer that is watched, configured like every other part of a job.

    # in a config_registry: `--config llama3_watched`
    def llama3_watched() -> Trainer.Config:
        return watched(llama3_debugmodel(), run="llama3")

and on the command line `--watch.run llama3-b --watch.tensor_every 5`. A trainer of one's own takes
the mixin: `class MyWatchedTrainer(WatchedSteps, MyTrainer)`, with a `watch` in its Config.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from foreshock.monitor.placement import local_of
from foreshock.monitor.session import Watch
from foreshock.monitor.session import watch as start_watch

try:
    from torchtitan.config import Configurable
    from torchtitan.trainer import Trainer
except ModuleNotFoundError as error:
    raise ImportError(
        "foreshock.monitor.integrations.torchtitan needs torchtitan: pip install torchtitan"
    ) from error

__all__ = ["ForeshockTrainer", "WatchConfig", "WatchedSteps", "watched"]


@dataclass(kw_only=True, slots=True)
class WatchConfig(Configurable.Config):  # type: ignore[misc]
    """What `foreshock.monitor.watch` takes, as a section of a torchtitan config.

    The run's config is the trainer's, its first step follows from the checkpoint. What no command
    line can say (`sinks`) is given to `WatchedSteps.watch_options`.
    """

    run: str = "torchtitan"
    """Name of the run."""
    project: str = "default"
    """Group of runs."""
    url: str | None = None
    """Service; without it FORESHOCK_URL, else records stay in the spool."""
    collect: str | None = None
    """Relay; without it FORESHOCK_COLLECT."""
    spool: str | None = None
    """Folder of the spool; without it FORESHOCK_SPOOL, else ./foreshock-spool."""
    tensor_every: int = 10
    """Tensors are measured at every n-th step, scalars at every step."""
    detail_every: int = 10
    """On a GPU, errors of casts and channels at every n-th step at most."""
    include: str | None = None
    """Regular expression over layer names; without it all."""
    exclude: str | None = None
    """Regular expression over layer names to leave out."""
    budget: float | None = None
    """Largest share of the step time that watching may cost, e.g. 0.01."""
    what_if: list[str] = field(default_factory=list)
    """Formats that the run does not use: e4m3, e5m2, mxfp8, block128, nvfp4."""
    optimizer_states: bool = False
    """Measure the optimizer's moments and the weight gradients too."""
    histogram: bool = False
    """Count the elements of each tensor by their power of two."""


class WatchedSteps:
    """Watches a Trainer from its first training step to its end; goes in front of it.

    The Trainer's Config needs a field `watch`, a `WatchConfig`. Records count steps from 0, as
    everywhere in foreshock; torchtitan counts them from 1.

    Attributes:
        watch: The watch, once there is one.
        watch_options: More arguments for `foreshock.monitor.watch`; set before training.

    Raises:
        ValueError: At the first step: this process has several pieces of the model (interleaved
            pipeline schedules), or what `watch` refuses.
    """

    config: Any
    parallel_dims: Any
    model_parts: list[torch.nn.Module]
    optimizers: Any
    step: int
    gradient_accumulation_steps: int

    watch: Watch | None = None
    watch_options: dict[str, Any]

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """One step; the first one attaches, when a checkpoint has been loaded."""
        if self.watch is None:
            self.watch = self._attach()
        super().train_step(data_iterator)  # type: ignore[misc]

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        """One micro-batch; its loss becomes a part of the step's."""
        loss: torch.Tensor = super().forward_backward_step(**batch)  # type: ignore[misc]
        if self.watch is not None and self._has_loss():
            # A rank's loss is its share of the sum over all tokens of all ranks and micro-batches;
            # records hold means over both.
            parts = self.gradient_accumulation_steps * self._ranks_that_add_up()
            self.watch.log(loss=local_of(loss.detach()) * parts)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As the Trainer's; asked when a checkpoint is written."""
        if self.watch is not None:
            self.watch.event("checkpoint", f"step {self.step}")
        state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return state

    def close(self) -> None:
        """Finish the records, then what the Trainer has open."""
        ended, self.watch = self.watch, None
        if ended is not None:
            ended.close()
        super().close()  # type: ignore[misc]

    def _attach(self) -> Watch:
        if len(self.model_parts) > 1:
            raise ValueError(
                f"this process has {len(self.model_parts)} pieces of the model, of which only one "
                "can be watched; take a pipeline schedule with one piece per rank, e.g. 1F1B"
            )
        options = {
            f.name: getattr(self.config.watch, f.name) for f in dataclasses.fields(WatchConfig)
        }
        given = {
            "config": _plain(self.config.to_dict()),
            "first_step": self.step - 1,
        }
        return start_watch(
            self.model_parts[0],
            # Not their container, which has no learning rates and no states.
            list(self.optimizers),
            **(options | given | getattr(self, "watch_options", {})),
        )

    def _has_loss(self) -> bool:
        return not self.parallel_dims.pp_enabled or bool(self.pp_has_last_stage)  # type: ignore[attr-defined]

    def _ranks_that_add_up(self) -> int:
        mesh = self.parallel_dims.get_optional_mesh("loss")
        return 1 if mesh is None else int(mesh.size())


def _plain(config: dict[str, Any]) -> Any:
    """As data that JSON has words for: the rest, infinite numbers too, as text."""
    return json.loads(json.dumps(config, default=str), parse_constant=str)


class ForeshockTrainer(WatchedSteps, Trainer):  # type: ignore[misc]
    """torchtitan's Trainer, watched."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        """The Trainer's, and what is watched."""

        watch: WatchConfig = field(default_factory=WatchConfig)


def watched(config: Any, **options: Any) -> Any:
    """The same job, watched.

    Args:
        config: A `Trainer.Config`, as a function of a config_registry returns it.
        **options: Of `WatchConfig`.

    Returns:
        A `ForeshockTrainer.Config`.

    Raises:
        TypeError: The config is another trainer's, which needs a class of its own.
    """
    if type(config) is not Trainer.Config:
        raise TypeError(
            f"config is a {type(config).__qualname__}; watched takes a Trainer.Config. For another "
            "trainer make a class of WatchedSteps and it, with a field `watch` in its Config"
        )
    base = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return ForeshockTrainer.Config(**base, watch=WatchConfig(**options))
