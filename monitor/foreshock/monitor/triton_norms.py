"""The Triton kernel behind `fused_norms`: the L2 norms of many tensors in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FIELDS", "norms_kernel"]

FIELDS = 8
"""Numbers of 64 bits a tensor in the table; the last three are not used."""


@triton.jit(do_not_specialize=["members"])
def norms_kernel(
    table_ptr,
    partials_ptr,
    counter_ptr,
    norms_ptr,
    members,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    FIELDS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Of each tensor: its first program, its programs, address, elements, place of its norm.

    Each program adds up TILES tiles; the last one of a tensor adds these sums, in a fixed order.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, MEMBERS)
    firsts = tl.load(table_ptr + lane * FIELDS, mask=lane < members, other=0x7FFFFFFF)
    member = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    entry = table_ptr + member * FIELDS
    first = tl.load(entry).to(tl.int32)
    programs = tl.load(entry + 1).to(tl.int32)
    x_ptr = tl.load(entry + 2).to(tl.pointer_type(KIND))
    elements = tl.load(entry + 3)
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
        elements = tl.multiple_of(elements, 16)
    begin = (program - first).to(tl.int64) * (TILE * TILES)
    sums = tl.zeros((TILE,), tl.float32)
    for tile in range(TILES):
        place = begin + tile * TILE + tl.arange(0, TILE)
        x = tl.load(x_ptr + place, mask=place < elements, other=0.0).to(tl.float32)
        sums += x * x
    tl.store(partials_ptr + program, tl.sum(sums.to(tl.float64), 0))
    # Every store of this program before the count, every count before the last one's loads.
    tl.debug_barrier()
    finished = tl.atomic_add(counter_ptr + member, 1, sem="acq_rel", scope="gpu")
    if finished == programs - 1:
        tl.debug_barrier()
        several = tl.arange(0, 256)
        total = tl.zeros((256,), tl.float64)
        for start in range(0, programs, 256):
            inside = start + several < programs
            total += tl.load(
                partials_ptr + first + start + several,
                mask=inside,
                other=0.0,
                cache_modifier=".cg",
            )
        norm = tl.sqrt(tl.sum(total, 0))
        tl.store(norms_ptr + tl.load(entry + 4), norm)
        tl.store(counter_ptr + member, 0)
