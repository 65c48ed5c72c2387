"""Numbers as lines of text: a sparkline, and columns several lines high. Knows no run.

Non-finite numbers are drawn as a cross and never left out: they are what people look for. What was
not measured (None) is a gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["BLOCKS", "CROSS", "GAP", "buckets", "columns", "mean", "sparkline"]

BLOCKS: Final = "▁▂▃▄▅▆▇█"
CROSS: Final = "\u00d7"
GAP: Final = " "

Reduce = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    """The mean; not finite as soon as one value is not."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def buckets(
    values: Sequence[float | None], count: int, reduce: Reduce = mean
) -> list[float | None]:
    """At most `count` numbers in place of many, each from neighbours of about the same number.

    Args:
        values: In order; None is not measured.
        count: 1 or more.
        reduce: What stands for the measured values of one bucket, of which there is at least one.

    Returns:
        None where nothing in a bucket was measured.

    Raises:
        ValueError: The count is below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; allowed: 1 or more")
    number = min(count, len(values))
    edges = [len(values) * i // number for i in range(number + 1)] if number else [0]
    pieces = [values[a:b] for a, b in itertools.pairwise(edges)]
    known = [[value for value in piece if value is not None] for piece in pieces]
    return [reduce(piece) if piece else None for piece in known]


def sparkline(values: Sequence[float | None], width: int, reduce: Reduce = mean) -> str:
    """One line; the smallest finite bucket is the lowest block, the largest the full one."""
    return "".join(columns(values, width, 1, reduce=reduce))


def columns(
    values: Sequence[float | None],
    width: int,
    height: int,
    *,
    low: float | None = None,
    high: float | None = None,
    reduce: Reduce = mean,
) -> list[str]:
    """Columns of block characters, eighths of a line apart.

    Args:
        values: In order; None is not measured.
        width: Most characters in a line.
        height: Lines.
        low: Lower end of the axis; default: the smallest finite bucket. What lies beyond an end is
            drawn at it.
        high: Its upper end; default: the largest one.
        reduce: As for `buckets`.

    Returns:
        `height` lines, the top one first, all equally long.

    Raises:
        ValueError: Width or height is below 1.
    """
    if height < 1:
        raise ValueError(f"height is {height}; allowed: 1 or more")
    heights = _heights(buckets(values, width, reduce), height, low, high)
    return ["".join(_cell(h, row) for h in heights) for row in reversed(range(height))]


def _heights(
    shown: Sequence[float | None], height: int, low: float | None, high: float | None
) -> list[int | str]:
    """Eighths of a line per column, 1 or more; or the character that stands in its lowest line."""
    finite = [value for value in shown if value is not None and math.isfinite(value)]
    bottom = low if low is not None else min(finite, default=0.0)
    top = high if high is not None else max(finite, default=1.0)
    # Halves: the span of two floats may not be one.
    span = top / 2 - bottom / 2
    steps = len(BLOCKS) * height - 1

    def place(value: float | None) -> int | str:
        if value is None:
            return GAP
        if not math.isfinite(value):
            return CROSS
        share = (value / 2 - bottom / 2) / span if span > 0 else 0.0
        return 1 + round(min(1.0, max(0.0, share)) * steps)

    return [place(value) for value in shown]


def _cell(filled: int | str, row: int) -> str:
    if isinstance(filled, str):
        return filled if row == 0 else GAP
    eighths = filled - len(BLOCKS) * row
    return GAP if eighths <= 0 else BLOCKS[min(eighths, len(BLOCKS)) - 1]
