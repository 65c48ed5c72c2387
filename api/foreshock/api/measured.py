"""The tensors of a run as they were measured last, those first where a statistic is worst.

Not every step measures tensors, nor every measured step every statistic, so the newest step that
did is found first, in heatmaps: they are cheap over any range. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.store import SMALLEST_IS_WORST, Store, View
from foreshock.api.store_schema import STORED_TENSOR_FIELDS

__all__ = ["TensorChoice", "newest_measured", "worst_tensors"]

_SPANS: Final = (64, 1024)
"""How many steps are looked at before the whole range is."""

_BUCKETS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChoice:
    """Which tensors are meant.

    Attributes:
        role: Their role.
        statistic: They have it, and are ordered by it.
        format: Number format, what-if rows included; None = every one.
    """

    role: str
    statistic: str
    format: str | None = None


def newest_measured(store: Store, view: View, choice: TensorChoice) -> int | None:
    """The newest step of a view with such a tensor, or None."""
    bounds = store.bounds(view)
    if bounds is None:
        return None
    first, last = bounds
    formats = _formats(store, view, choice)
    for span in (*_SPANS, last - first + 1):
        window = replace(view, first_step=max(first, last - span + 1), last_step=last)
        found = [_last_filled(store, window, choice, name) for name in formats]
        if any(step is not None for step in found):
            return max(step for step in found if step is not None)
        if window.first_step == first:
            break
    return None


def worst_tensors(store: Store, view: View, choice: TensorChoice, limit: int) -> pa.Table:
    """The tensors of the newest step that has such, worst first.

    Args:
        store: Where they are.
        view: Which records are looked at.
        choice: Which tensors.
        limit: Most rows.

    Returns:
        `step` and `STORED_TENSOR_FIELDS`. Not finite comes before everything; what is equally bad
        stays in stored order. No row where nothing was measured, or records have expired.
    """
    step = newest_measured(store, view, choice)
    if step is None:
        return _NOTHING
    rows = store.tensor_rows(replace(view, first_step=step, last_step=step))
    rows = rows.filter(_chosen(rows, choice))
    values = rows[choice.statistic].cast(pa.float64()).to_numpy()
    badness = -values if choice.statistic in SMALLEST_IS_WORST else values
    order = np.argsort(-np.where(np.isfinite(values), badness, np.inf), kind="stable")
    return rows.take(pa.array(order[:limit])).select(_NOTHING.column_names)


_NOTHING: Final = pa.schema([pa.field("step", pa.int64()), *STORED_TENSOR_FIELDS]).empty_table()


def _formats(store: Store, view: View, choice: TensorChoice) -> Sequence[str | None]:
    """Formats that heatmaps are asked for; None is the one that the run uses."""
    if choice.format is not None:
        return (choice.format,)
    # What nobody computes in, such as the underflow of a BF16 run, stands on what-if rows only.
    return (None, *store.tensor_kinds(view.run_id).formats)


def _last_filled(store: Store, view: View, choice: TensorChoice, name: str | None) -> int | None:
    """The last step of a view where a heatmap has a value."""
    bounds = store.bounds(view)
    if bounds is None:
        return None
    view = replace(view, first_step=bounds[0], last_step=bounds[1])
    heatmap = store.heatmap(view, choice.role, choice.statistic, _BUCKETS, name)
    filled = [
        place
        for place in range(len(heatmap.steps))
        if any(row[place] is not None for row in heatmap.values.values())
    ]
    if not filled:
        return None
    # Each bucket ends where the next one begins.
    edges = (*heatmap.steps, view.last_step + 1)
    first = max(edges[filled[-1]], view.first_step)
    last = min(edges[filled[-1] + 1] - 1, view.last_step)
    if first == last:
        return first
    narrow = replace(view, first_step=first, last_step=last)
    # Where rows have expired, a bucket is a block of 64 steps and gets no narrower.
    return None if narrow == view else _last_filled(store, narrow, choice, name)


def _chosen(rows: pa.Table, choice: TensorChoice) -> Any:
    kept = pc.and_(pc.equal(rows["role"], choice.role), pc.is_valid(rows[choice.statistic]))
    if choice.format is not None:
        kept = pc.and_(kept, pc.equal(rows["format"], choice.format))
    return kept
