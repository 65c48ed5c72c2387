"""Cells of other people's logs as numbers."""

from __future__ import annotations

__all__ = ["as_number", "as_step"]

_LARGEST = 2.0**53


def as_number(cell: object) -> float | None:
    """The number in a cell, NaN and infinities included; None for anything else."""
    if isinstance(cell, str):
        return _parsed(cell)
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        return _finite_integer(cell)
    return None


def _finite_integer(cell: float) -> float | None:
    try:
        return float(cell)
    except OverflowError:  # an integer beyond all floats is no measurement
        return None


def _parsed(cell: str) -> float | None:
    text = cell.strip().strip('"')
    if not text or "_" in text:  # float("1_0") is Python's idea, not a log's
        return None
    try:
        return float(text)
    except ValueError:
        return None


def as_step(cell: object) -> int | None:
    """The whole number in a cell, exact; None if there is none."""
    value = as_number(cell)
    if value is None or not value.is_integer() or abs(value) > _LARGEST:
        return None
    return int(value)
