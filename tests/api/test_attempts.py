"""Which attempt a record belongs to: the definition against the incremental code."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.attempts import StreamPoint, assign_epochs


def epochs(
    steps: list[int], before: StreamPoint | None = None, after: StreamPoint | None = None
) -> list[int]:
    return list(assign_epochs(np.array(steps, np.int64), before, after))


def point(sequence: int, epoch: int, last_step: int) -> StreamPoint:
    return StreamPoint(sequence, epoch, epoch, last_step)


def test_rising_steps_stay_and_a_step_back_starts_the_next() -> None:
    assert epochs([0, 1, 5]) == [0, 0, 0]
    assert epochs([6, 7], point(1, 0, 5)) == [0, 0]
    assert epochs([5, 6], point(1, 0, 5)) == [1, 1]
    assert epochs([6, 7, 3, 4, 4], point(1, 2, 5)) == [2, 2, 3, 3, 4]


def test_a_late_batch_belongs_to_its_neighbours() -> None:
    assert epochs([10, 11], point(1, 0, 9), point(3, 0, 29)) == [0, 0]
    # The step back happened inside the late batch.
    assert epochs([10, 11, 3], point(1, 0, 9), point(3, 1, 9)) == [0, 0, 1]
    # Its steps overlap but nothing came after a step back: it cannot open an attempt of its own.
    assert epochs([5, 6], point(1, 0, 9), point(3, 0, 29)) == [0, 0]
    assert epochs([2, 3], None, point(3, 0, 29)) == [0, 0]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.data())
def test_batches_in_order_agree_with_the_definition(steps: list[int], data: st.DataObject) -> None:
    expected, epoch, last = [], 0, -1
    for step in steps:
        epoch += step <= last
        last = step
        expected.append(epoch)
    found: list[int] = []
    before = None
    sequence = 0
    while len(found) < len(steps):
        size = data.draw(st.integers(1, len(steps) - len(found)))
        piece = steps[len(found) : len(found) + size]
        got = epochs(piece, before)
        found += got
        before = StreamPoint(sequence, got[0], got[-1], piece[-1])
        sequence += 1
    assert found == expected


@pytest.mark.parametrize("after", [None, point(9, 4, 100)])
def test_epochs_never_fall(after: StreamPoint | None) -> None:
    got = epochs([5, 1, 7, 7, 2], point(1, 3, 6), after)
    assert got == sorted(got)
    assert got[0] >= 3
