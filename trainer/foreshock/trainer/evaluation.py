"""Loss on text that the run never trains on.

The same sequences every time, whatever the seed of the run; no scale sees them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from foreshock.trainer.config import RunConfig
from foreshock.trainer.data import Corpus, held_out_batch
from foreshock.trainer.world import World

__all__ = ["evaluating", "held_out_loss"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model neither keeps gradients nor lets its scales see a tensor."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def held_out_loss(
    entry: nn.Module, config: RunConfig, corpus: Corpus, world: World | None = None
) -> float:
    """Mean cross-entropy on held-out text, nats per token.

    Args:
        entry: Takes (tokens, targets).
        config: `evaluation.batches` batches of `data.batch_size` sequences.
        corpus: The text.
        world: The processes that share the work; each calls this and has the same answer.

    Raises:
        ValueError: Nothing is held out.
    """
    world = world or World(device=next(entry.parameters()).device)
    losses = []
    with evaluating(entry):
        for number in range(config.evaluation.batches):
            tokens = world.part(held_out_batch(corpus, config.data, number)).to(world.device)
            losses.append(entry(tokens[:, :-1], tokens[:, 1:]))
    return float(world.mean(torch.stack(losses).mean()))
