"""Who keeps which tensors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.trainer.fp8lm.partition import (
    block_partition,
    greedy_partition,
    loads,
    padding_waste,
)

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("sizes", "ranks", "parts", "held"),
    [
        ([4, 4, 2, 2, 1, 1], 2, [[0, 2, 4], [1, 3, 5]], [7, 7]),
        ([10, 7, 6, 5, 4, 3], 3, [[0, 5], [1, 4], [2, 3]], [13, 11, 11]),
    ],
)
def test_algorithm_1(sizes: list[int], ranks: int, parts: list[list[int]], held: list[int]) -> None:
    found = greedy_partition(sizes, ranks)
    assert [sorted(part) for part in found] == parts
    assert loads(sizes, found) == held


@given(SIZES, st.integers(1, 9))
def test_greedy_gives_all_and_no_rank_much(sizes: list[int], ranks: int) -> None:
    parts = greedy_partition(sizes, ranks)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert max(loads(sizes, parts)) <= sum(sizes) / ranks + max(sizes)


@given(SIZES, st.integers(1, 9), st.sampled_from([1, 32, 128]))
def test_blocks_are_cut_evenly(sizes: list[int], ranks: int, block: int) -> None:
    parts = block_partition(sizes, ranks, block)
    covered = {(p.tensor, at) for part in parts for p in part for at in range(p.start, p.stop)}
    assert len(covered) == sum(sizes) == sum(p.numel for part in parts for p in part)
    assert all(p.start % block == 0 for part in parts for p in part)
    assert all(len({p.tensor for p in part}) == len(part) for part in parts)
    counts = [sum(-(-p.numel // block) for p in part) for part in parts]
    assert max(counts) - min(counts) <= 1


def test_whole_tensors_waste_where_blocks_do_not() -> None:
    """The linears of a 7B GPT over 64 processes: one tensor is more than a fair share."""
    sizes = [s for _ in range(32) for s in (3 * 4096**2, 4096**2, 4 * 4096**2, 4 * 4096**2)]
    waste = padding_waste(loads(sizes, greedy_partition(sizes, 64)))
    assert waste > 0.1
    cut = [sum(p.numel for p in part) for part in block_partition(sizes, 64, 128)]
    assert padding_waste(cut) < 1e-4
