"""How this trainer's runs are watched: the one door to the monitor.

What it tells the service about a run leaves the fault out: the forecast must find it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from foreshock.monitor import watch
from foreshock.monitor.sinks import Sink
from foreshock.trainer.blocks.parts import open_taps
from foreshock.trainer.config import RunConfig
from foreshock.trainer.loop import Watcher, WatchFactory, public_config

__all__ = ["watched"]


def watched(
    config: RunConfig,
    *,
    url: str | None = None,
    spool: Path | None = None,
    sinks: Sequence[Sink] = (),
    activations: bool = False,
) -> WatchFactory:
    """What `train(watch=...)` takes: attaches a monitor with the run's name and cadence.

    Args:
        config: The run.
        url: Of the service; None takes FORESHOCK_URL, else records stay in the spool.
        spool: Folder for records that are not yet sent; None takes the monitor's own.
        sinks: Called with the record batches of every logged step.
        activations: Measure the residual stream after every layer, and queries and keys before
            their rotation, beside the operands of GEMMs.
    """

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer, first_step: int) -> Watcher:
        if activations:
            open_taps(model)
        return watch(
            model,
            optimizer,
            sinks=sinks,
            run=config.name,
            url=url,
            spool=spool,
            tensor_every=config.tensor_every,
            tokens_per_step=config.data.batch_size * config.data.sequence_length,
            config=public_config(config),
            first_step=first_step,
        )

    return attach
