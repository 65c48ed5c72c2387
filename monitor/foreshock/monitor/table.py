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

__all__ = ["FIELDS", "NEUTRAL", "SumTable"]

Array = np.ndarray[Any, np.dtype[np.float64]]

FIELDS: Final = tuple(FIELD_REDUCTIONS)
NEUTRAL: Final = np.array(
    [{"sum": 0.0, "max": -np.inf, "min": np.inf}[h] for h in FIELD_REDUCTIONS.values()]
)
_OBSERVATIONS: Final = FIELDS.index("observations")
_NONFINITE: Final = FIELDS.index("nonfinite")
_COLUMNS: Final = {
    how: np.array([i for i, h in enumerate(FIELD_REDUCTIONS.values()) if h == how])
    for how in ("sum", "max", "min")
}


@dataclass(slots=True)
class SumTable:
    """Sums of the tensors of one step.

    Attributes:
        entries: One per row; identities are unique.
        values: Shape (rows, fields).
        first: First micro-batch with a non-finite element, +inf for none; shape (rows,).
        ranks: Rank that holds the largest magnitude; shape (rows,).
        channels, blocks: Channel sums and block-scale histograms by row.
    """

    entries: tuple[Entry, ...]
    values: Array
    first: Array
    ranks: Array
    channels: dict[int, Array] = field(default_factory=dict)
    blocks: dict[int, Array] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        entries: Sequence[Entry],
        values: Array,
        first: Array,
        *,
        rank: int,
        channels: Mapping[TensorIdentity, Array],
        blocks: Mapping[TensorIdentity, Array],
    ) -> Self:
        """Merge observations of the same tensor; rows that saw nothing are left out.

        Args:
            entries: Whose observation each row is.
            values: Shape (observations, fields).
            first: Shape (observations,).
            rank: This process.
            channels: By identity.
            blocks: By identity.
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
        for how, combine in (("sum", np.add), ("max", np.fmax), ("min", np.fmin)):
            at = _COLUMNS[how]
            combine.at(merged, (target[:, None], at[None, :]), source[:, at])
        np.fmin.at(firsts, target, first[seen])
        return cls(
            tuple(kept),
            merged,
            firsts,
            np.full(len(kept), float(rank)),
            {row_of[identity]: c for identity, c in channels.items() if identity in row_of},
            {row_of[identity]: b for identity, b in blocks.items() if identity in row_of},
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
            {new: self.channels[old] for new, old in enumerate(rows) if old in self.channels},
            {new: self.blocks[old] for new, old in enumerate(rows) if old in self.blocks},
        )

    def sums(self, rows: Any, channels: Array | None) -> TensorSums:
        """Some of the rows as sums, with channel sums of one width."""
        identities = [self.entries[row].identity for row in rows]
        values: dict[str, Any] = {
            name: self.values[rows, column] for column, name in enumerate(FIELDS)
        }
        return TensorSums(
            **values,
            amax_rank=self.ranks[rows],
            quantized=np.array([FORMATS[i.format].scaled for i in identities], dtype=bool),
            channel_sum2=channels,
        )

    def by_width(self) -> list[tuple[Any, Array | None]]:
        """Rows that share a number of features, with their channel sums."""
        groups: dict[int, list[int]] = {}
        for row in range(len(self.entries)):
            found = self.channels.get(row)
            groups.setdefault(-1 if found is None else len(found), []).append(row)
        return [
            (np.array(rows), None if width < 0 else np.stack([self.channels[r] for r in rows]))
            for width, rows in groups.items()
        ]
