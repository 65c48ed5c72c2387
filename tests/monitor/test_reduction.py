"""Merging over processes on paper: two reductions give what merging the sums gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.monitor.entry import Entry
from foreshock.monitor.placement import Part
from foreshock.monitor.record import FIELD_REDUCTIONS, TensorIdentity
from foreshock.monitor.reduction import Agreement, Merged, RankStep, pack, unpack, words_of
from foreshock.monitor.table import FIELDS, SumTable

RANKS = st.integers(2, 5)
MAGNITUDE = st.floats(0, 2.0**60, width=32)
LAYERS = ("a", "b", "c")


def identity(layer: str, role: str = "input") -> TensorIdentity:
    return TensorIdentity(layer, role, "e4m3")


@st.composite
def values(draw: st.DrawFn) -> dict[str, float]:
    found = {
        name: float(draw(st.integers(0, 10**6)))
        for name, how in FIELD_REDUCTIONS.items()
        if how == "sum"
    }
    found["observations"] = float(draw(st.integers(1, 9)))
    for name in ("sum2", "sum4", "error2"):
        found[name] = draw(st.floats(0, 1e30))
    found["amax"] = draw(st.one_of(st.just(-np.inf), MAGNITUDE))
    found["min_nonzero"] = draw(st.one_of(st.just(np.inf), MAGNITUDE))
    for name in ("headroom_log2", "scale_log2", "scale_log2_max"):
        found[name] = draw(st.floats(-100, 100, width=32))
    return found


def table(
    rank: int,
    of: dict[str, dict[str, float]],
    channels: dict[str, np.ndarray[Any, Any]] | None = None,
    role: str = "input",
    **entry: Any,
) -> SumTable:
    entries = tuple(Entry(identity(layer, role), 0, **entry) for layer in of)
    rows = np.array([[row[name] for name in FIELDS] for row in of.values()]).reshape(
        -1, len(FIELDS)
    )
    return SumTable.of(
        entries,
        rows,
        np.full(len(rows), np.inf),
        rank=rank,
        vectors={"channels": {identity(layer, role): c for layer, c in (channels or {}).items()}},
    )


def step(rank: int, sums: SumTable | None = None, **more: Any) -> RankStep:
    defaults: dict[str, Any] = {"scalars": {}, "gradients": {}, "parameters": {}}
    return RankStep(3, rank, **(defaults | more), table=sums)


def merge(steps: list[RankStep], shares: dict[str, float | None] | None = None) -> Merged:
    """What the ranks arrive at: agree, pack, reduce, unpack."""
    words = [words_of(each, shares or {}) for each in steps]
    agreement = Agreement.of(words)
    assert all(agreement.covers(each) for each in words)
    packed = [pack(each, agreement, complete=True, tensors=True) for each in steps]
    sums = np.sum([vectors[0] for vectors in packed], axis=0)
    maxes = np.max([vectors[1] for vectors in packed], axis=0)
    with np.errstate(invalid="ignore"):
        return unpack(sums, maxes, agreement, tensors=True)


@settings(max_examples=60, deadline=None)
@given(st.data(), RANKS)
def test_a_merge_of_ranks_is_a_merge_of_sums(data: st.DataObject, ranks: int) -> None:
    parts = []
    for rank in range(ranks):
        layers = data.draw(st.sets(st.sampled_from(LAYERS)))
        parts.append(table(rank, {layer: data.draw(values()) for layer in sorted(layers)}))
    merged = merge([step(rank, part) for rank, part in enumerate(parts)])
    assert merged.ranks == ranks
    assert merged.in_step
    found = merged.table
    assert found is not None
    expected = {layer for part in parts for layer in (e.identity.layer for e in part.entries)}
    assert {entry.identity.layer for entry in found.entries} == expected
    for row, entry in enumerate(found.entries):
        together = None
        for part in parts:
            for at, other in enumerate(part.entries):
                if other.identity == entry.identity:
                    alone = part.sums(np.array([at]))
                    together = alone if together is None else together.merge(alone)
        assert together is not None
        ours = found.sums(np.array([row]))
        for name, how in FIELD_REDUCTIONS.items():
            want, have = getattr(together, name), getattr(ours, name)
            if how == "sum":
                np.testing.assert_allclose(have, want, rtol=1e-12, err_msg=name)
            else:
                np.testing.assert_array_equal(have, want, err_msg=name)
        assert found.values[row, FIELDS.index("amax")] == together.amax[0]
        if np.isfinite(together.amax[0]):
            assert found.ranks[row] == together.amax_rank[0], "the first of two equal extremes"


@settings(max_examples=30, deadline=None)
@given(RANKS, st.integers(1, 7))
def test_channels_add_up(ranks: int, width: int) -> None:
    one = dict.fromkeys(FIELDS, 1.0)
    generator = np.random.default_rng(ranks)
    channels = [generator.random(width) for _ in range(ranks)]
    steps = [step(r, table(r, {"a": one}, {"a": c})) for r, c in enumerate(channels)]
    found = merge(steps).table
    assert found is not None
    np.testing.assert_allclose(found.vectors["channels"][0], np.sum(channels, axis=0))


def test_copies_count_once_and_pieces_add_up() -> None:
    one = dict.fromkeys(FIELDS, 1.0) | {"numel": 10.0}
    copies = merge([step(r, table(r, {"a": one}, role="weight")) for r in range(3)]).table
    assert copies is not None
    assert copies.values[0, FIELDS.index("numel")] == 10
    pieces = merge(
        [step(r, table(r, {"a": one}, role="weight", part=Part(sharded=True))) for r in range(3)]
    ).table
    assert pieces is not None
    assert pieces.values[0, FIELDS.index("numel")] == 30


@pytest.mark.parametrize("odd", [0, 2, 4])
def test_the_rank_with_another_scale_is_named(odd: int) -> None:
    steps = []
    for rank in range(5):
        row = dict.fromkeys(FIELDS, 1.0) | {"scale_log2": 7.0 + 2.5 * (rank == odd)}
        steps.append(step(rank, table(rank, {"a": row}, agreed=True)))
    (event,) = merge(steps).events
    assert (event.kind, event.rank, event.layer, event.role) == (
        "rank_disagrees",
        odd,
        "a",
        "input",
    )
    assert "9.5" in str(event.detail)
    same = [
        step(rank, table(rank, {"a": dict.fromkeys(FIELDS, 1.0)}, agreed=True)) for rank in range(5)
    ]
    assert not merge(same).events


def test_the_rank_with_another_weight_is_named() -> None:
    steps = []
    for rank in range(4):
        row = dict.fromkeys(FIELDS, 1.0) | {"amax": 3.0 + 1e-3 * (rank == 2)}
        steps.append(step(rank, table(rank, {"a": row}, role="weight")))
    (event,) = merge(steps).events
    assert (event.rank, event.role) == (2, "weight")


def test_the_first_nonfinite_element_keeps_micro_batch_and_rank() -> None:
    steps = []
    for rank, first in enumerate((np.inf, 5.0, 2.0, 2.0)):
        sums = table(rank, {"a": dict.fromkeys(FIELDS, 1.0)})
        sums.first[:] = first
        steps.append(step(rank, sums))
    (event,) = merge(steps).events
    assert (event.kind, event.micro_batch, event.rank) == ("nonfinite", 2, 2)


def test_scalars_are_means_but_the_slowest_rank_counts() -> None:
    steps = [
        step(rank, scalars={"loss": float(rank), "step_seconds": float(rank)}) for rank in range(3)
    ]
    assert merge(steps).scalars == {"loss": 1.0, "step_seconds": 2.0}
    steps[1] = step(1, scalars={"loss": np.nan, "step_seconds": 1.0}, broken=True)
    merged = merge(steps)
    assert np.isnan(merged.scalars["loss"])
    assert merged.first_broken == 1


def test_norms_of_copies_pieces_and_experts() -> None:
    steps = [
        step(0, gradients={"copied": 3.0, "sharded": 3.0, "expert": 7.0}),
        step(1, gradients={"copied": 3.0, "sharded": 4.0}),
    ]
    merged = merge(steps, {"sharded": 1.0, "copied": None, "expert": None})
    assert merged.gradients == pytest.approx({"copied": 3.0, "sharded": 5.0, "expert": 7.0})
    # Hybrid sharding: 4 ranks hold 2 different halves, each twice.
    halves = [step(rank, gradients={"w": 3.0 + rank % 2}) for rank in range(4)]
    assert merge(halves, {"w": 2.0}).gradients == pytest.approx({"w": 5.0})


def test_ranks_at_different_steps_are_noticed() -> None:
    late = step(1)
    late.step = 4
    assert not merge([step(0), late]).in_step


def test_a_new_name_is_noticed() -> None:
    agreement = Agreement.of([words_of(step(0), {})])
    new = step(1, table(1, {"a": dict.fromkeys(FIELDS, 1.0)}))
    assert not agreement.covers(words_of(new, {}))
    sums, maxes = pack(new, agreement, complete=False, tensors=True)
    assert unpack(sums, maxes, agreement, tensors=True).incomplete
