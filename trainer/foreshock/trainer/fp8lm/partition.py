"""Who keeps which tensors: whole ones, given out greedily, or runs of blocks of equal length.

Whole tensors travel with their one scale (FP8-LM, Algorithm 1); with a scale per block a tensor
can be cut, and no process waits for one that was given a larger tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "Piece",
    "block_partition",
    "greedy_partition",
    "loads",
    "padding_waste",
    "whole_tensors",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of the flattened tensor number `tensor`."""

    tensor: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.stop - self.start


def greedy_partition(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Tensor numbers of each rank, largest tensors first, to whoever has the least.

    Sorted by (-size, index mod ranks); ties go to the lowest rank (FP8-LM, Algorithm 1). No rank
    has more than the mean plus the largest tensor.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index % ranks))
    parts: list[list[int]] = [[] for _ in range(ranks)]
    held = [0] * ranks
    for index in order:
        rank = held.index(min(held))
        parts[rank].append(index)
        held[rank] += sizes[index]
    return parts


def whole_tensors(sizes: Sequence[int], ranks: int) -> list[list[Piece]]:
    """`greedy_partition` as pieces."""
    parts = greedy_partition(sizes, ranks)
    return [[Piece(index, 0, sizes[index]) for index in part] for part in parts]


def block_partition(sizes: Sequence[int], ranks: int, block: int) -> list[list[Piece]]:
    """Pieces of each rank: all blocks of all tensors in a row, cut into equal runs.

    Each piece starts at a block's start; no rank has more than one block beyond the mean.
    """
    blocks = [-(-size // block) for size in sizes]
    total = sum(blocks)
    parts: list[list[Piece]] = [[] for _ in range(ranks)]
    before = 0
    for tensor, (count, size) in enumerate(zip(blocks, sizes, strict=True)):
        for rank in range(ranks):
            first = max(total * rank // ranks, before) - before
            last = min(total * (rank + 1) // ranks, before + count) - before
            if first < last:
                parts[rank].append(Piece(tensor, first * block, min(last * block, size)))
        before += count
    return parts


def loads(sizes: Sequence[int], parts: Sequence[Sequence[int]]) -> list[int]:
    """Elements of each rank."""
    return [sum(sizes[index] for index in part) for part in parts]


def padding_waste(held: Sequence[int]) -> float:
    """Share of a gather's volume that is padding, when every rank sends as much as the largest."""
    largest = max(held)
    return 1 - sum(held) / (largest * len(held)) if largest else 0.0
