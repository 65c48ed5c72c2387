"""Rollups: what blocks of 64 steps say in sum; long and old stretches are read without rows.

A block of one attempt, one tensor and one statistic (or one scalar) becomes one row: how many
finite values, their smallest, mean and largest, how many others, the first step. Whether a row of
facts is the one that a read would pick among several of a step is decided here, once: `picked`
holds a bit for each kind of read. Pure; knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.store_schema import NO_EXPERT
from foreshock.monitor.record import STATISTICS

__all__ = [
    "BLOCK_STEPS",
    "OF_FORMAT",
    "OF_FORMAT_WORST",
    "OF_RUN",
    "roll_scalars",
    "roll_steps",
    "roll_tensors",
]

BLOCK_STEPS: Final = 64

OF_RUN: Final = 1
"""`picked`: a series of the format that the run used shows this row (scalars: always)."""
OF_FORMAT: Final = 2
"""`picked`: a series of a format by name shows it."""
OF_FORMAT_WORST: Final = 4
"""`picked`: a heatmap of a format by name counts it."""

_Ints = np.ndarray[Any, np.dtype[np.int64]]
_Floats = np.ndarray[Any, np.dtype[np.float64]]
_Mask = np.ndarray[Any, np.dtype[np.bool_]]

_IDENTITY: Final = (
    "layer",
    "role",
    "call_index",
    "expert",
    "format",
    "granularity",
    "what_if",
)
_SCALAR: Final[dict[str, Any]] = {
    "layer": pa.scalar(0, pa.uint16()),
    "role": pa.scalar("", pa.string()),
    "call_index": pa.scalar(0, pa.int32()),
    "expert": pa.scalar(NO_EXPERT, pa.int32()),
    "format": pa.scalar("", pa.string()),
    "granularity": pa.scalar("", pa.string()),
    "what_if": pa.scalar(False, pa.bool_()),
    "picked": pa.scalar(OF_RUN, pa.uint8()),
}
"""What stands in a scalar's row for a tensor's identity."""


def roll_steps(rows: pa.Table) -> pa.Table:
    """What the blocks of an attempt hold.

    Args:
        rows: step and ver of every row of `steps`, older versions included.

    Returns:
        block; facts and versions, the number of rows and the sum of their ver, by which a block is
        known to be as it was; newest, their highest ver; held, a bit for each step; first_step;
        last_step. By block.
    """
    step, ver = (rows[name].to_numpy().astype(np.int64) for name in ("step", "ver"))
    order = np.argsort(step, kind="stable")
    step, ver = step[order], ver[order]
    block = step // BLOCK_STEPS
    starts = _starts(block)
    bits = np.left_shift(np.uint64(1), (step % BLOCK_STEPS).astype(np.uint64))
    lengths = np.diff(np.append(starts, len(step)))
    return pa.table(
        {
            "block": block[starts],
            "facts": lengths,
            "versions": np.add.reduceat(ver, starts) if len(starts) else ver,
            "newest": np.maximum.reduceat(ver, starts) if len(starts) else ver,
            "held": (np.bitwise_or.reduceat(bits, starts) if len(starts) else bits).view(np.int64),
            "first_step": step[starts],
            "last_step": step[starts + lengths - 1],
        }
    )


def roll_scalars(rows: pa.Table) -> pa.Table:
    """Blocks of scalars.

    Args:
        rows: step, name and value, one row per step and name.
    """
    names = _encoded(rows["name"])
    codes = names.indices.to_numpy().astype(np.int64)
    step = rows["step"].to_numpy().astype(np.int64)
    values = rows["value"].to_numpy().astype(np.float64)
    order, starts = _blocks([codes], step)
    sums = _sums(values[order], np.ones(len(order), bool), step[order], starts)
    table = sums.append_column("name", names.dictionary.take(pa.array(codes[order][starts])))
    for column, value in _SCALAR.items():
        table = table.append_column(column, pa.repeat(value, table.num_rows))
    return table


def roll_tensors(rows: pa.Table) -> pa.Table:
    """Blocks of tensor statistics.

    Args:
        rows: step, ver, the identity (layer by id, expert without nulls) and `STATISTICS`, one row
            per step and identity: the newest.
    """
    step, ver = (rows[name].to_numpy().astype(np.int64) for name in ("step", "ver"))
    codes = {name: _codes(rows[name]) for name in _IDENTITY}
    picked = _picked(codes, step, ver)
    order, starts = _blocks([*codes.values(), picked], step)
    identity = rows.select(list(_IDENTITY)).take(pa.array(order[starts]))
    identity = identity.append_column("picked", pa.array(picked[order][starts].astype(np.uint8)))
    tables = []
    for name in STATISTICS:
        column = rows[name]
        if column.null_count == len(column):
            continue
        present = column.is_valid().to_numpy()[order]
        values = column.cast(pa.float64()).fill_null(0.0).to_numpy()[order]
        sums = _sums(values, present, step[order], starts)
        table = sums.append_column("name", pa.repeat(pa.scalar(name), len(starts)))
        for field in identity.schema:
            table = table.append_column(field.name, identity[field.name])
        tables.append(table.filter(pc.greater(pc.add(table["finite"], table["others"]), 0)))
    return pa.concat_tables(tables) if tables else pa.table({})


def _starts(values: _Ints) -> _Ints:
    if len(values) == 0:
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))


def _blocks(keys: Sequence[_Ints], step: _Ints) -> tuple[_Ints, _Ints]:
    """The order that puts rows of a key and block side by side, and where each block begins."""
    block = step // BLOCK_STEPS
    code = _together([*keys, block])
    order = np.argsort(code, kind="stable").astype(np.int64)
    return order, _starts(code[order])


def _sums(values: _Floats, present: _Mask, step: _Ints, starts: _Ints) -> pa.Table:
    """Per stretch from `starts`: what a rollup's row holds."""
    finite = present & np.isfinite(values)
    others = present & ~finite
    if len(starts) == 0:
        starts = np.zeros(0, np.int64)
        counted = lowest = highest = total = odd = first = many = np.zeros(0)
    else:
        counted = np.add.reduceat(finite.astype(np.int64), starts)
        lowest = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
        highest = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
        total = np.add.reduceat(np.where(finite, values, 0.0), starts)
        many = np.add.reduceat(others.astype(np.int64), starts)
        # NaN is larger than any number here, as reads have it.
        odd = np.maximum.reduceat(np.where(others, values, -np.inf), starts)
        first = np.minimum.reduceat(np.where(present, step, np.iinfo(np.int64).max), starts)
    block = step[starts] // BLOCK_STEPS
    none, no_other = counted == 0, many == 0
    with np.errstate(invalid="ignore"):
        mean = total / np.maximum(counted, 1)
    return pa.table(
        {
            "block": pa.array(block, pa.int64()),
            "first_step": pa.array(first.astype(np.int64)),
            "finite": pa.array(counted.astype(np.uint16)),
            "smallest": pa.array(lowest, pa.float64(), mask=none),
            "average": pa.array(mean, pa.float64(), mask=none),
            "largest": pa.array(highest, pa.float64(), mask=none),
            "others": pa.array(many.astype(np.uint16)),
            "other": pa.array(odd, pa.float64(), mask=no_other, from_pandas=False),
        }
    )


def _picked(codes: dict[str, _Ints], step: _Ints, ver: _Ints) -> _Ints:
    """Which reads would take each row, as bits."""
    used = codes["what_if"] == 0
    tensor = [codes[name] for name in ("layer", "role", "call_index", "expert")]
    form, granularity = codes["format"], codes["granularity"]
    rank = [ver, used.astype(np.int64)]
    picked = np.zeros(len(step), np.int64)
    rows = np.flatnonzero(used)
    of_run = _newest([*tensor, step], [*rank, granularity, form], rows)
    everything = np.arange(len(step))
    picked[of_run] |= OF_RUN
    picked[_newest([*tensor, form, step], [*rank, granularity], everything)] |= OF_FORMAT
    picked[_newest([*tensor, form, granularity, step], rank, everything)] |= OF_FORMAT_WORST
    return picked


def _newest(keys: Sequence[_Ints], rank: Sequence[_Ints], rows: _Ints) -> _Ints:
    """Of `rows`, those that rank highest within their key."""
    code = _together([key[rows] for key in keys])
    ordered = np.sort(code)
    if len(_starts(ordered)) == len(rows):
        return rows
    order = np.lexsort((*(each[rows] for each in reversed(rank)), code))
    ends = np.append(_starts(code[order])[1:], len(order)) - 1
    found: _Ints = rows[order[ends]]
    return found


# Below it the product with one more column of 32 bits fits 64.
_DENSE_BELOW: Final = 2**30


def _together(columns: Sequence[_Ints]) -> _Ints:
    """One number per row, equal where all columns are."""
    code: _Ints = np.zeros(len(columns[0]), np.int64)
    most = 0
    for column in columns:
        if len(column) == 0:
            break
        low = int(column.min())
        width = int(column.max()) - low + 1
        if width == 1:
            continue
        if most >= _DENSE_BELOW or width >= _DENSE_BELOW:
            code = np.unique(code, return_inverse=True)[1].astype(np.int64)
            column = np.unique(column, return_inverse=True)[1].astype(np.int64)
            low, width, most = 0, int(column.max()) + 1, int(code.max())
        code = code * width + (column - low)
        most = most * width + width - 1
    return code


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    plain = column.cast(pa.string()).combine_chunks()
    plain = plain if isinstance(plain, pa.Array) else pa.concat_arrays(plain.chunks)
    encoded: pa.DictionaryArray = plain.dictionary_encode()
    return encoded


def _codes(column: pa.ChunkedArray) -> _Ints:
    """Whole numbers that sort as the values do."""
    kind = column.type
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind):
        encoded = _encoded(column)
        # As bytes, for that is how both engines compare texts.
        words = [word.encode() for word in encoded.dictionary.to_pylist()]
        rank = np.argsort(np.argsort(np.array(words, object))) if words else np.zeros(0)
        ranked: _Ints = rank.astype(np.int64)[encoded.indices.to_numpy()]
        return ranked
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    numbers: _Ints = column.to_numpy().astype(np.int64)
    return numbers
