"""The Triton kernel that adds up what programs left for each column."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["channels_kernel"]


@triton.jit
def channels_kernel(
    partials_ptr,
    channels_ptr,
    control_ptr,
    columns,
    sequences,
    splits,
    COLUMN_BLOCKS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Column sums of all programs, in a fixed order, added to the channels."""
    if tl.load(control_ptr) == 0:
        return
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < columns
    block = column // TILE_COLUMNS
    within = column % TILE_COLUMNS
    total = tl.zeros((DEPTH, TILE), tl.float64)
    lane = tl.arange(0, DEPTH)
    # The programs of a column block: all splits of all sequences.
    for first in range(0, sequences * splits, DEPTH):
        piece = first + lane
        program = (piece // splits)[:, None] * COLUMN_BLOCKS + block[None, :]
        program = program * splits + (piece % splits)[:, None]
        place = program.to(tl.int64) * TILE_COLUMNS + within[None, :]
        there = (piece < sequences * splits)[:, None] & inside[None, :]
        total += tl.load(partials_ptr + place, mask=there, other=0.0)
    added = tl.sum(total, 0)
    tl.store(
        channels_ptr + column,
        tl.load(channels_ptr + column, mask=inside, other=0.0) + added,
        mask=inside,
    )
