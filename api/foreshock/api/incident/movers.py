"""Which series moved most up to the step: its value against what was usual before. Pure."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from foreshock.api.incident.facts import FloatArray, Grid

__all__ = ["Mover", "movers"]

# What a doubling adds to a statistic that is a logarithm.
_DOUBLINGS: Final = (("_log2", 1.0), ("_db", 10 * float(np.log10(2))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """One series; `change` in doublings, also where the statistic is a logarithm itself."""

    layer: str
    role: str
    statistic: str
    usual: float
    now: float
    change: float


def movers(grids: Iterable[Grid], bucket: int, count: int = 25) -> list[Mover]:
    """The series furthest from their usual value, furthest first.

    Args:
        grids: Values by layer and bucket.
        bucket: That of the step; usual is the median of the first half of those before it.
        count: At most so many.
    """
    found: list[Mover] = []
    for grid in grids:
        before = grid.values[:, : max(1, bucket // 2)]
        usual, now = _median(before), _latest(grid.values[:, : bucket + 1])
        unit = next((size for part, size in _DOUBLINGS if part in grid.statistic), None)
        if unit is not None:
            change = (now - usual) / unit
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                change = np.log2(now / usual)
        for line in np.flatnonzero(np.isfinite(change)):
            found.append(
                Mover(
                    layer=grid.layers[line],
                    role=grid.role,
                    statistic=grid.statistic,
                    usual=float(usual[line]),
                    now=float(now[line]),
                    change=float(change[line]),
                )
            )
    return sorted(found, key=lambda mover: -abs(mover.change))[:count]


def _median(values: FloatArray) -> FloatArray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a layer without a value has no median
        return np.asarray(np.nanmedian(values, axis=1))


def _latest(values: FloatArray) -> FloatArray:
    """The last finite value of each line."""
    finite = np.isfinite(values)
    place = values.shape[1] - 1 - np.argmax(finite[:, ::-1], axis=1)
    latest = values[np.arange(len(values)), place]
    return np.where(finite.any(axis=1), latest, np.nan)
