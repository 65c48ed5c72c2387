"""What a run learns: batches by step, and the loss of a part of one.

A step's batch is cut over processes and micro-batches; the losses of all parts average to the
loss of the whole batch, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from foreshock.trainer.blocks.fused import cross_entropy
from foreshock.trainer.config import RunConfig
from foreshock.trainer.data import Corpus, batch
from foreshock.trainer.world import World

__all__ = ["Batch", "RunningText", "Task", "parts_of", "share_of_loss"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Sequences, all of a step or a part of them.

    Attributes:
        tokens: int64, shape (B, T + 1); inputs [:, :-1], targets [:, 1:].
        counted: Which targets the loss counts, bool (B, T); None counts all.
        share: By what the sum of counted losses is divided to be this part's share: so that the
            shares of all parts average to the mean over all counted targets of the step.
    """

    tokens: Tensor
    counted: Tensor | None = None
    share: float = 1.0


class Task(Protocol):
    """Batches and a text's name."""

    @property
    def sha256(self) -> str:
        """Of what is learnt from."""

    def batch(self, step: int) -> Batch:
        """The whole batch of a step, the same on every process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningText:
    """The next token of a text, everywhere.

    Attributes:
        config: The run.
        corpus: The text.
    """

    config: RunConfig
    corpus: Corpus

    def __post_init__(self) -> None:
        texts = [self.corpus, *([self.corpus.other] if self.corpus.other else [])]
        for text in texts:
            highest = int(text.tokens.numpy().max())
            if highest >= self.config.model.vocabulary:
                raise ValueError(
                    f"{text.name} holds byte {highest}, model.vocabulary is "
                    f"{self.config.model.vocabulary}; 256 fits any text"
                )

    @property
    def sha256(self) -> str:
        """Of the text."""
        return self.corpus.sha256

    def batch(self, step: int) -> Batch:
        """Drawn at random places."""
        config = self.config
        return Batch(tokens=batch(self.corpus, config.data, config.seed, step, config.fault))


def parts_of(whole: Batch, world: World, micro_batches: int) -> Sequence[Batch]:
    """This process's part of a batch, as its micro-batches.

    Raises:
        ValueError: The batch does not split.
    """
    tokens = world.part(whole.tokens)
    if len(tokens) % micro_batches:
        raise ValueError(
            f"data.batch_size is {len(whole.tokens)}; {world.data_size} processes with "
            f"{micro_batches} micro-batches need a multiple of {world.data_size * micro_batches}"
        )
    size = len(tokens) // micro_batches
    device = world.device
    if whole.counted is None:
        return [Batch(tokens=part.to(device)) for part in torch.split(tokens, size)]
    masks = torch.split(world.part(whole.counted), size)
    share = max(1, int(whole.counted.sum())) / (world.data_size * micro_batches)
    return [
        Batch(tokens=part.to(device), counted=mask.to(device), share=share)
        for part, mask in zip(torch.split(tokens, size), masks, strict=True)
    ]


def share_of_loss(entry: nn.Module, part: Batch) -> Tensor:
    """Loss of a part in nats per token, 0-dim: see `Batch.share`."""
    inputs, targets = part.tokens[:, :-1], part.tokens[:, 1:]
    if part.counted is None:
        loss: Tensor = entry(inputs, targets)
        return loss
    logits = entry(inputs)
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return (losses * part.counted.reshape(-1)).sum() / part.share
