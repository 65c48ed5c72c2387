"""The Triton kernel that measures many tensors in one launch, found through a table of addresses.

What is done with a tensor is `triton_kernels.accumulate`, program by program as if the tensor had a
launch of its own, so its sums are the same to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foreshock.monitor.triton_kernels import accumulate

__all__ = ["FIELDS", "MEMBERS", "table_kernel"]

FIELDS = 16
"""Numbers of 64 bits a tensor in the table."""
MEMBERS = 64
"""Most tensors in a table."""


@triton.jit
def _whole(place):
    return tl.load(place).to(tl.int32)


@triton.jit
def _real(place):
    return tl.load(place).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["members"])
def table_kernel(
    table_ptr,
    control_ptr,
    partials_ptr,
    counter_ptr,
    members,
    KIND: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WHOLE_COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    ERROR: tl.constexpr,
    CODES: tl.constexpr,
    SEQUENCES: tl.constexpr,
    FOLD: tl.constexpr,
    HALF: tl.constexpr,
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
    PARTIALS: tl.constexpr,
    FIELDS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """The fields of a tensor are named in `together.Member`; the first program is the first."""
    if tl.load(control_ptr) == 0:
        return
    program = tl.program_id(0)
    lane = tl.arange(0, MEMBERS)
    firsts = tl.load(table_ptr + lane * FIELDS, mask=lane < members, other=0x7FFFFFFF)
    member = tl.sum((firsts <= program).to(tl.int32), 0) - 1
    entry = table_ptr + member * FIELDS
    first = _whole(entry)
    programs = _whole(entry + 1)
    # Only what is aligned comes into a table: the compiler cannot see that in an address.
    x_ptr = tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(KIND)), 16)
    row_ptr = tl.load(entry + 3).to(tl.pointer_type(tl.float64))
    scale_ptr = tl.load(entry + 4).to(tl.pointer_type(tl.float32))
    accumulate(
        x_ptr,
        row_ptr,
        scale_ptr,
        control_ptr,
        # 16 fields for each program.
        partials_ptr + first * 16,
        counter_ptr + member,
        partials_ptr,
        partials_ptr,
        _whole(entry + 5),
        _whole(entry + 6),
        tl.multiple_of(_whole(entry + 7), 16),
        tl.multiple_of(_whole(entry + 8), 16),
        tl.multiple_of(tl.load(entry + 9), 16),
        _whole(entry + 10),
        _whole(entry + 11),
        _real(entry + 12),
        _real(entry + 13),
        _real(entry + 14),
        _real(entry + 15),
        COLUMN_BLOCKS,
        TILE_ROWS,
        TILE_COLUMNS,
        WHOLE_COLUMNS,
        SCALED,
        ERROR,
        False,
        CODES,
        False,
        SEQUENCES,
        False,
        False,
        FOLD,
        HALF,
        UNROLL,
        PTX,
        PARTIALS,
        program - first,
        programs,
    )
