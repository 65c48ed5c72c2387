"""Which part of a weight is whose: cutting tensors into pieces, and joining them again.

A cut has sections, each split evenly: queries, keys and values stand below each other in one
weight, and every process has heads of all three. No processes here, only tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cut", "joined_states", "own_states"]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is cut into as many pieces as there are processes.

    Attributes:
        axis: Along which.
        sections: Lengths that add up to the axis; each is split evenly.
        ranks: Number of pieces.
    """

    axis: int
    sections: tuple[int, ...]
    ranks: int

    def __post_init__(self) -> None:
        for length in self.sections:
            if length % self.ranks:
                raise ValueError(f"{length} does not split over {self.ranks} processes")

    def piece(self, whole: Tensor, rank: int) -> Tensor:
        """The piece of one process, a tensor of its own."""
        parts = torch.split(whole, list(self.sections), self.axis)
        own = [part.chunk(self.ranks, self.axis)[rank] for part in parts]
        return torch.cat(own, self.axis).clone()

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole of all pieces, in rank order."""
        lengths = [length // self.ranks for length in self.sections]
        split = [torch.split(piece, lengths, self.axis) for piece in pieces]
        return torch.cat(
            [torch.cat(section, self.axis) for section in zip(*split, strict=True)], self.axis
        )


Change = Callable[[Tensor, Cut], Tensor]


def joined_states(
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    names: Sequence[str],
    cuts: Mapping[str, Cut],
    whole: Change,
) -> dict[str, Any]:
    """States of one process's model and optimizer as a lone process would have them.

    Args:
        model: Its state_dict.
        optimizer: Its state_dict.
        names: Of the parameters, in the optimizer's order.
        cuts: By parameter name.
        whole: From a piece to the whole; every process has to call it alike.
    """
    return _changed(model, optimizer, names, cuts, whole)


def own_states(
    held: Mapping[str, Any], names: Sequence[str], cuts: Mapping[str, Cut], rank: int
) -> dict[str, Any]:
    """The other way round: from whole states, such as `joined_states` gives, to a process's own."""
    return _changed(
        held["model"], held["optimizer"], names, cuts, lambda x, cut: cut.piece(x, rank)
    )


def _changed(
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    names: Sequence[str],
    cuts: Mapping[str, Cut],
    change: Change,
) -> dict[str, Any]:
    weights = {n: change(x, cuts[n]) if n in cuts else x for n, x in model.items()}
    states = {}
    for number, values in optimizer["state"].items():
        cut = cuts.get(names[number])
        # Step counts and the like have no axes; moments and masters are as their parameter.
        states[number] = {
            key: change(x, cut) if cut is not None and isinstance(x, Tensor) and x.dim() else x
            for key, x in values.items()
        }
    return {"model": weights, "optimizer": {**optimizer, "state": states}}
