"""Numbers as block characters: what is drawn is what was measured, whatever that was."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.cli.charts import BLOCKS, CROSS, GAP, buckets, columns, mean, sparkline
from foreshock.api.cli.score_picture import ScoreTrace, picture

VALUES = st.lists(st.none() | st.floats(), max_size=60)


@given(VALUES, st.integers(1, 40), st.integers(1, 8))
def test_every_picture_has_its_size_and_shows_every_bucket(
    values: list[float | None], width: int, height: int
) -> None:
    lines = columns(values, width, height)
    shown = buckets(values, width)
    assert len(lines) == height
    assert {len(line) for line in lines} == {min(width, len(values))}
    for value, mark in zip(shown, lines[-1], strict=True):
        if value is None:
            assert mark == GAP
        elif math.isfinite(value):
            assert mark in BLOCKS
        else:
            assert mark == CROSS


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=40))
def test_a_higher_number_is_never_drawn_lower(values: list[float]) -> None:
    lines = columns(values, len(values), 3)
    heights = [
        sum(BLOCKS.index(line[i]) + 1 for line in lines if line[i] != GAP)
        for i in range(len(values))
    ]
    pairs = sorted(zip(values, heights, strict=True))
    assert [height for _, height in pairs] == sorted(heights)


def test_ends_of_the_axis() -> None:
    assert sparkline([1.0, 2.0, 3.0], 3) == "▁▅█"
    assert sparkline([5.0, 5.0], 2) == "▁▁"
    assert columns([0.5], 1, 2, low=0.0, high=1.0) == ["▁", "█"]
    assert columns([9.0, -9.0], 2, 2, low=0.0, high=1.0) == ["█ ", "█▁"]


def test_one_bad_value_makes_its_bucket_bad() -> None:
    """A spike to infinity is not averaged away."""
    values = [1.0, 2.0, math.inf, 2.0, None, None]
    shown = buckets(values, 3)
    assert shown[0] == 1.5
    assert shown[1] is not None
    assert math.isnan(shown[1])
    assert shown[2] is None
    assert sparkline(values, 3) == f"▁{CROSS}{GAP}"
    assert mean([1.0, 3.0]) == 2.0


@pytest.mark.parametrize(("width", "height"), [(0, 1), (1, 0)])
def test_no_room_is_an_error(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 or more"):
        columns([1.0], width, height)


def trace(losses: list[float | None], risks: list[float | None], states: list[str]) -> ScoreTrace:
    return ScoreTrace(list(range(len(losses))), losses, {10: risks, 1000: [None] * 9}, states)


def test_a_score_picture_has_loss_risk_and_alarm_below_each_other() -> None:
    losses: list[float | None] = [4.0, 3.0, 2.0, 2.0, 5.0, math.nan]
    drawn = picture(
        trace(losses, [None, 0.0, 0.1, 0.2, 0.8, 0.8], ["ok"] * 3 + ["pending"] + ["firing"] * 2),
        80,
    )
    assert drawn[0] == "loss"
    assert drawn[1].split() == ["5", "█"]
    assert drawn[6].split() == ["2", f"█▇▁▁█{CROSS}"] or drawn[6].endswith(f"█{CROSS}")
    assert "risk within 10 steps" in drawn
    assert any(line.split()[:1] == ["80.0%"] for line in drawn)
    alarm = next(line for line in drawn if "alarm" in line)
    assert alarm.endswith("·▲▲")
    # Marks stand below the rows they belong to.
    assert alarm.index("▲") == drawn[1].index("█")
    assert max(map(len, drawn)) <= 80


def test_a_loss_over_many_decades_is_drawn_on_a_logarithm() -> None:
    losses: list[float | None] = [2.0, 20.0, 200.0, 2000.0]
    drawn = picture(trace(losses, [None] * 4, ["ok"] * 4), 80)
    assert drawn[0] == "loss, logarithmic"
    heights = [sum(line[10 + i : 11 + i].strip() != "" for line in drawn[1:7]) for i in range(4)]
    assert heights == [1, 3, 4, 6]
    assert not any("risk" in line for line in drawn)
