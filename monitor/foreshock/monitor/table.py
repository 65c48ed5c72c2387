"""The sums of one step as a table: one row per tensor, micro-batches merged.

Pure numpy. What ranks merge and what a record is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np

from foreshock.monitor.entry import Entry
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import FIELD_REDUCTIONS, TensorIdentity, TensorSums

__all__ = ["FIELDS", "NEUTRAL", "VECTORS", "SumTable", "extremes_only"]

Array = np.ndarray[Any, np.dtype[np.float64]]

FIELDS: Final = tuple(FIELD_REDUCTIONS)
NEUTRAL: Final = np.array(
    [{"sum": 0.0, "max": -np.inf, "min": np.inf}[h] for h in FIELD_REDUCTIONS.values()]
)
_OBSERVATIONS: Final = FIELDS.index("observations")
_NONFINITE: Final = FIELDS.index("nonfinite")
VECTORS: Final = ("channels", "blocks", "exponents", "mus")
_COLUMNS: Final = {
    how: np.array([i for i, h in enumerate(FIELD_REDUCTIONS.values()) if h == how])
    for how in ("sum", "max", "min")
}


def extremes_only(kept: Array, entries: Sequence[Entry]) -> Array:
    """Rows of sums of tensors of which only extremes are known.

    Args:
        kept: Largest magnitude and scale in force, shape (tensors, 2).
        entries: Of the tensors, each of which was seen once.
    """
    rows = np.tile(NEUTRAL, (len(entries), 1))
    if not entries:
        return rows
    amax, scale = kept.T
    largest = np.array([FORMATS[entry.identity.format].largest for entry in entries])
    with np.errstate(divide="ignore", invalid="ignore"):
        rows[:, FIELDS.index("scale_log2")] = rows[:, FIELDS.index("scale_log2_max")] = np.log2(
            scale
        )
        rows[:, FIELDS.index("headroom_log2")] = np.log2(largest / (amax * scale))
    rows[:, FIELDS.index("amax")] = amax
    rows[:, _OBSERVATIONS] = 1.0
    return rows


@dataclass(slots=True)
class SumTable:
    """Sums of the tensors of one step.

    Attributes:
        entries: One per row; identities are unique.
        values: Shape (rows, fields).
        first: First micro-batch with a non-finite element, +inf for none; shape (rows,).
        ranks: Rank that holds the largest magnitude; shape (rows,).
        vectors: By name (channels, blocks, exponents, mus) and row: channel sums, histograms of
            block scales and of elements by power of two, sum and count of the factor mu.
    """

    entries: tuple[Entry, ...]
    values: Array
    first: Array
    ranks: Array
    vectors: dict[str, dict[int, Array]] = field(
        default_factory=lambda: {name: {} for name in VECTORS}
    )

    @classmethod
    def of(
        cls,
        entries: Sequence[Entry],
        values: Array,
        first: Array,
        *,
        rank: int,
        vectors: Mapping[str, Mapping[TensorIdentity, Array]],
    ) -> Self:
        """Merge observations of the same tensor; rows that saw nothing are left out.

        Args:
            entries: Whose observation each row is.
            values: Shape (observations, fields).
            first: Shape (observations,).
            rank: This process.
            vectors: By name and identity.
        """
        row_of: dict[TensorIdentity, int] = {}
        kept: list[Entry] = []
        rows = np.full(len(entries), -1)
        for position, entry in enumerate(entries):
            if values[position, _OBSERVATIONS] == 0:
                continue
            row = row_of.get(entry.identity)
            if row is None:
                row = row_of[entry.identity] = len(kept)
                kept.append(entry)
            rows[position] = row
        merged = np.tile(NEUTRAL, (len(kept), 1))
        firsts = np.full(len(kept), np.inf)
        seen = rows >= 0
        target, source = rows[seen], values[seen]
        # Mostly each tensor has been seen once, and then its row is the next one.
        once = len(target) == len(kept)
        for how, combine in (("sum", np.add), ("max", np.fmax), ("min", np.fmin)):
            at = _COLUMNS[how]
            if once:
                merged[:, at] = combine(merged[:, at], source[:, at])
            else:
                combine.at(merged, (target[:, None], at[None, :]), source[:, at])
        np.fmin.at(firsts, target, first[seen])
        return cls(
            tuple(kept),
            merged,
            firsts,
            np.full(len(kept), float(rank)),
            {
                name: {row_of[i]: v for i, v in vectors.get(name, {}).items() if i in row_of}
                for name in VECTORS
            },
        )

    def sorted(self, order: Mapping[str, int], roles: Sequence[str]) -> Self:
        """The rows in the order in which they stand in a record."""

        def place(row: int) -> tuple[object, ...]:
            identity = self.entries[row].identity
            return (
                order.get(identity.layer, len(order)),
                identity.layer,
                identity.call_index,
                roles.index(identity.role),
                identity.what_if,
                identity.format,
            )

        rows = sorted(range(len(self.entries)), key=place)
        at = np.array(rows, dtype=int)
        return type(self)(
            tuple(self.entries[row] for row in rows),
            self.values[at],
            self.first[at],
            self.ranks[at],
            {
                name: {new: of[old] for new, old in enumerate(rows) if old in of}
                for name, of in self.vectors.items()
            },
        )

    def sums(self, rows: Any) -> TensorSums:
        """Some of the rows as sums; all of them have the same vectors, of the same widths."""
        identities = [self.entries[row].identity for row in rows]
        values: dict[str, Any] = {
            name: self.values[rows, column] for column, name in enumerate(FIELDS)
        }
        stacked = {
            name: np.stack([of[row] for row in rows]) if rows[0] in of else None
            for name, of in self.vectors.items()
        }
        return TensorSums(
            **values,
            amax_rank=self.ranks[rows],
            quantized=np.array([FORMATS[i.format].scaled for i in identities], dtype=bool),
            channel_sum2=stacked["channels"],
            block_scales=stacked["blocks"],
            exponents=stacked["exponents"],
        )

    def alike(self) -> list[Any]:
        """Rows in groups that have the same vectors, of the same widths."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row in range(len(self.entries)):
            widths = tuple(len(of.get(row, ())) for of in self.vectors.values())
            groups.setdefault(widths, []).append(row)
        return [np.array(rows) for rows in groups.values()]
