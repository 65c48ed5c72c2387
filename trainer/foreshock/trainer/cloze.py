"""A small downstream score: which of four endings belongs to a held-out context?

As multiple-choice tasks of language models are scored: the ending with the highest total
log-probability counts as the answer. Chance is one in four.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import nn

from foreshock.trainer.config import RunConfig
from foreshock.trainer.data import Corpus, held_out_batch
from foreshock.trainer.evaluation import evaluating
from foreshock.trainer.world import World

__all__ = ["CHOICES", "cloze_accuracy"]

CHOICES: Final = 4
_ENDING: Final = 8


def cloze_accuracy(
    entry: nn.Module, config: RunConfig, corpus: Corpus, world: World | None = None
) -> float:
    """Share of items whose true ending is the likeliest, over `evaluation.cloze` items.

    An item is a held-out sequence whose last 8 tokens are its ending; the three false endings are
    those of other sequences of the same batch. The same items for every run on a text.

    Args:
        entry: Takes tokens, gives logits (B, T, vocabulary).
        config: The run.
        corpus: The text.
        world: Processes; each scores all items and has the same answer.

    Raises:
        ValueError: Nothing is held out, or a sequence has no room for an ending.
    """
    if config.data.sequence_length < 2 * _ENDING or config.data.batch_size < CHOICES:
        raise ValueError(
            f"evaluation.cloze needs data.sequence_length of at least {2 * _ENDING} and "
            f"data.batch_size of at least {CHOICES}"
        )
    world = world or World(device=next(entry.parameters()).device)
    right = scored = number = 0
    with evaluating(entry):
        while scored < config.evaluation.cloze:
            rows = held_out_batch(corpus, config.data, number).to(world.device)
            found = _answers(entry, rows)[: config.evaluation.cloze - scored]
            right, scored, number = right + int(found.sum()), scored + len(found), number + 1
    return right / scored


def _answers(entry: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Whether each row's own ending is the likeliest, bool (B,)."""
    count = len(rows)
    scores = []
    # Choice j gives row i the ending of row i + j: the 0th is its own.
    for shift in range(CHOICES):
        offered = rows.clone()
        offered[:, -_ENDING:] = rows.roll(-shift, 0)[:, -_ENDING:]
        logits = entry(offered[:, :-1])[:, -_ENDING:].float()
        targets = offered[:, -_ENDING:, None]
        chosen = torch.log_softmax(logits, -1).gather(-1, targets)
        scores.append(chosen.view(count, -1).sum(1))
    own, *others = scores
    # A model that cannot tell them apart has not answered.
    answer: torch.Tensor = own > torch.stack(others).amax(0)
    return answer


def standard_error(accuracy: float, items: int) -> float:
    """Of a share of so many items, all independent."""
    return float(np.sqrt(accuracy * (1 - accuracy) / items))
