"""Fewer lines of a heatmap than layers: which are meant, and neighbours put together. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LayerChoice", "LayerRows", "layer_rows"]

Row = tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """Which layers are meant, and in how many lines.

    Attributes:
        match: What names have to contain; upper and lower case are one.
        start: The first layer that counts, by its whole name; empty for the first of all.
        span: How many layers from there count; None for all.
        most: At most so many lines; None for a line each.
    """

    match: str = ""
    start: str = ""
    span: int | None = None
    most: int | None = None

    def names(self, known: Sequence[str]) -> list[str]:
        """The layers, of those that are known, in their order."""
        text = self.match.casefold()
        names = [name for name in known if text in name.casefold()]
        if self.start:
            names = names[names.index(self.start) :] if self.start in names else []
        return names[: self.span]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Lines of a heatmap, from the first layer to the last.

    Attributes:
        layers: The first layer of each line.
        counts: How many layers each line stands for.
        values: (lines, buckets), None where nothing was measured.
    """

    layers: list[str]
    counts: list[int]
    values: list[Row]


def layer_rows(
    values: Mapping[str, Row], order: Iterable[str], choice: LayerChoice, *, smallest: bool
) -> LayerRows:
    """The chosen layers, in at most so many lines.

    Neighbours share a line only where there are more layers than lines, and then equally many;
    what counts of them is the worst value.

    Args:
        values: One line per layer.
        order: Names of layers, from the first to the last; those without a line are left out.
        choice: Which are meant.
        smallest: Whether the smallest value is the worst one.
    """
    names = choice.names([name for name in order if name in values])
    size = 1 if choice.most is None else max(1, -(-len(names) // choice.most))
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    return LayerRows(
        layers=[group[0] for group in groups],
        counts=[len(group) for group in groups],
        values=[_worst([values[name] for name in group], smallest=smallest) for group in groups],
    )


def _worst(rows: Sequence[Row], *, smallest: bool) -> Row:
    if len(rows) == 1:
        return rows[0]
    return tuple(_worst_of(cells, smallest=smallest) for cells in zip(*rows, strict=True))


def _worst_of(cells: Iterable[float | None], *, smallest: bool) -> float | None:
    """Among finite values the worst; without any, NaN before an infinity, as in a bucket."""
    known = [cell for cell in cells if cell is not None]
    finite = [cell for cell in known if math.isfinite(cell)]
    if finite:
        return min(finite) if smallest else max(finite)
    if any(math.isnan(cell) for cell in known):
        return math.nan
    return max(known, default=None)
