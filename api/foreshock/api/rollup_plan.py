"""Where a read of many steps takes rollups and where it takes rows. Pure.

The default view shows the highest attempt at each step, a rollup holds one attempt. So a block of
64 steps is read from a rollup where one attempt holds every step that the view shows there, and
where the rollup still says what the rows say; every other block is read from rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from foreshock.api.rollups import BLOCK_STEPS
from foreshock.api.store import CHUNK_STEPS, StaleChunk, View

__all__ = ["ROLLED_FROM_STEPS", "Grid", "Plan", "Stretch", "plan", "stale_chunks"]

ROLLED_FROM_STEPS: Final = 20_000
"""Ranges of more steps than this are read from rollups, if their buckets are wide enough."""

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """Buckets of equal width in steps, the first from `origin`."""

    origin: int
    width: int

    @classmethod
    def over(cls, bounds: tuple[int, int], points: int, *, aligned: bool) -> Grid:
        """At most `points` buckets over these steps.

        Args:
            bounds: First and last step.
            points: Most buckets.
            aligned: Whether every bucket has to consist of whole blocks.
        """
        unit = BLOCK_STEPS if aligned else 1
        origin = bounds[0] // unit * unit
        width = max(1, -(-(bounds[1] - origin + 1) // points))
        return cls(origin, -(-width // unit) * unit)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks of one attempt, ends included, that are read from rollups."""

    attempt: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is read from where: rollups, and rows of these views.

    Attributes:
        rolled: Read from rollups.
        raw: Read from rows.
        expired: Whether rows of something in `rolled` are gone, so that there is no choice.
    """

    rolled: tuple[Stretch, ...]
    raw: tuple[View, ...]
    expired: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of each block of each attempt, by block and attempt."""

    block: _Array
    attempt: _Array
    held: _Array
    newest: _Array
    fresh: _Array
    expired: _Array


def _known(rolled: pa.Table, raw: pa.Table) -> _Known:
    """Put what rollups and rows say of a block side by side.

    Args:
        rolled: attempt, block, facts, versions, held.
        raw: attempt, block, facts, versions, newest.
    """
    parts = [_columns(rolled), _columns(raw)]
    block, attempt = (np.concatenate([part[name] for part in parts]) for name in _KEY)
    order = np.lexsort((attempt, block))
    block, attempt = block[order], attempt[order]
    changed = (block[1:] != block[:-1]) | (attempt[1:] != attempt[:-1])
    starts = np.flatnonzero(np.append(True, changed)) if len(block) else np.zeros(0, np.int64)

    def of(side: int, name: str) -> _Array:
        mine = parts[side].get(name)
        if mine is None:
            mine = np.zeros(len(parts[side]["block"]), np.int64)
        padding = np.zeros(len(parts[1 - side]["block"]), np.int64)
        whole = np.concatenate([mine, padding] if side == 0 else [padding, mine])[order]
        return np.add.reduceat(whole, starts) if len(starts) else whole

    facts, now = of(0, "facts"), of(1, "facts")
    same = (facts == now) & (of(0, "versions") == of(1, "versions"))
    # Rows are only ever added, except that old ones expire.
    expired = (facts > 0) & (now < facts)
    return _Known(
        block=block[starts],
        attempt=attempt[starts],
        held=of(0, "held").view(np.uint64),
        newest=of(1, "newest"),
        fresh=(facts > 0) & (same | expired),
        expired=expired,
    )


_KEY: Final = ("block", "attempt")


def _columns(table: pa.Table) -> dict[str, _Array]:
    return {name: table[name].to_numpy().astype(np.int64) for name in table.column_names}


def stale_chunks(rolled: pa.Table, raw: pa.Table) -> list[StaleChunk]:
    """Chunks that have to be rolled, or rolled again; by attempt and chunk.

    Args:
        rolled: attempt, block, facts, versions, held of every rollup of a run.
        raw: attempt, block, facts, versions, newest of every block with rows.
    """
    known = _known(rolled, raw)
    newest: dict[tuple[int, int], int] = {}
    chunks = known.block // (CHUNK_STEPS // BLOCK_STEPS)
    for place in np.flatnonzero(~known.fresh):
        key = int(known.attempt[place]), int(chunks[place])
        newest[key] = 0
    for attempt, chunk, number in (
        zip(known.attempt.tolist(), chunks.tolist(), known.newest.tolist(), strict=True)
        if newest
        else ()
    ):
        if (attempt, chunk) in newest:
            newest[attempt, chunk] = max(newest[attempt, chunk], number)
    # Where rows of a chunk have expired, rolling again would lose them.
    lost = {
        (int(known.attempt[place]), int(chunks[place])) for place in np.flatnonzero(known.expired)
    }
    return [StaleChunk(*key, newest[key]) for key in sorted(newest) if key not in lost]


def plan(view: View, rolled: pa.Table, raw: pa.Table) -> Plan:
    """Which blocks of a view are read from rollups.

    Args:
        view: The records, narrowed to steps that there are.
        rolled: attempt, block, facts, versions, held: the newest rollup of each block that the
            view touches, of one attempt if the view names one.
        raw: attempt, block, facts, versions, newest: what the rows of those blocks are now.
    """
    known = _known(rolled, raw)
    inside = known.held & _range(known.block, view)
    shown = ~(known.fresh & (inside == 0))
    whole = inside == known.held
    block, attempt = known.block[shown], known.attempt[shown]
    usable = (known.fresh & whole)[shown]
    starts = np.flatnonzero(np.append(True, block[1:] != block[:-1])) if len(block) else block
    counts = np.diff(np.append(starts, len(block)))
    chosen = np.where(usable[starts], attempt[starts], _ROWS)
    for place in np.flatnonzero(counts > 1):
        rows = np.flatnonzero(shown)[starts[place] : starts[place] + counts[place]]
        chosen[place] = _choose(known, inside, whole, rows)
    needed = known.expired[shown] & (attempt == np.repeat(chosen, counts))
    return replace(_stretches(view, block[starts], chosen), expired=bool(needed.any()))


_ROWS: Final = -1


def _choose(known: _Known, inside: _Array, whole: _Array, rows: _Array) -> int:
    """The attempt whose rollup shows a block that several attempts hold, or `_ROWS`."""
    if not known.fresh[rows].all():
        return _ROWS
    visible, above = [], np.uint64(0)
    for row in rows[::-1]:
        if inside[row] & ~above:
            visible.append(row)
        above |= inside[row]
    # When rows have expired a block in which attempts meet shows the highest of them alone.
    if len(visible) > 1 and not known.expired[visible].any():
        return _ROWS
    return int(known.attempt[visible[0]]) if whole[visible[0]] else _ROWS


def _range(block: _Array, view: View) -> _Array:
    """Per block, the bits of the steps that lie in a view."""
    every = np.full(len(block), ~np.uint64(0))
    low = np.uint64((~0 << (view.first_step % BLOCK_STEPS)) & _ALL)
    high = np.uint64(_ALL >> (BLOCK_STEPS - 1 - view.last_step % BLOCK_STEPS))
    every[block == view.first_step // BLOCK_STEPS] &= low
    every[block == view.last_step // BLOCK_STEPS] &= high
    return every


_ALL: Final = 2**BLOCK_STEPS - 1


def _stretches(view: View, block: _Array, chosen: _Array) -> Plan:
    rolled, raw = [], []
    if len(block):
        starts = np.flatnonzero(np.append(True, chosen[1:] != chosen[:-1]))
        ends = np.append(starts[1:], len(block)) - 1
        for start, end in zip(starts, ends, strict=True):
            first, last, attempt = int(block[start]), int(block[end]), int(chosen[start])
            if attempt != _ROWS:
                rolled.append(Stretch(attempt, first, last))
                continue
            low = max(view.first_step, first * BLOCK_STEPS)
            high = min(view.last_step, last * BLOCK_STEPS + BLOCK_STEPS - 1)
            raw.append(View(view.run_id, view.attempt, low, high))
    return Plan(tuple(rolled), tuple(raw))
