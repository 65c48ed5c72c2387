"""Compares two runs of the store: the same judgement as `compare.py`, from reads of bounded size.

All scalars, and one statistic of one role over the layers. Short ranges step by step; long ones by
blocks of 64 steps, as rollups hold them. Knows no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from foreshock.api.compare import CompareError, Comparison, Parting, Rule, compare_runs
from foreshock.api.compare_series import FloatArray, IntArray, RunSeries, Series, SeriesKey
from foreshock.api.rollups import BLOCK_STEPS
from foreshock.api.store import Store, View

__all__ = ["MOST_LAYERS", "StoredComparison", "compare_stored"]

MOST_LAYERS: Final = 96
"""Layers that are judged, those that moved most: a judgement takes some 10 ms each."""

_EXACT_STEPS: Final = 20_000
_TENSOR_POINTS: Final = 512
_ROUNDS: Final = 4
_FAMILY_ERROR: Final = 0.05
_SUSTAINED: Final = 5
_NOT_COMPARED: Final = frozenset({"tokens", "step_seconds", "overhead_ratio", "monitor_bytes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredComparison:
    """What came out.

    Attributes:
        first_step, last_step: The steps that both runs have.
        width: Steps that one judged value of a scalar stands for.
        layer_width: The same of a layer's statistic: the worst of so many steps.
        layers: Layers of both runs with the statistic.
        judged_layers: How many of them were judged.
        series: Series judged or too short, scalars included.
        too_short: Series with too few common values.
        partings: First step first, then the largest effect.
    """

    first_step: int
    last_step: int
    width: int
    layer_width: int
    layers: int
    judged_layers: int
    series: int
    too_short: int
    partings: tuple[Parting, ...]


def compare_stored(
    store: Store, a: View, b: View, *, role: str, statistic: str
) -> StoredComparison:
    """Find where B parts from A.

    Args:
        store: Where both are.
        a: One run or attempt, and the range of steps.
        b: The other, likewise.
        role: Role of the tensors that are compared.
        statistic: Their statistic.

    Raises:
        CompareError: No step is in both.
    """
    a, b = _common(store, a, b)
    steps = a.last_step - a.first_step + 1
    width = 1 if steps <= _EXACT_STEPS else BLOCK_STEPS
    scalars = _judged(_scalars(store, a, width), _scalars(store, b, width), Rule())
    layer_width = -(-steps // _TENSOR_POINTS)
    left, right = (_layers(store, view, role, statistic, layer_width) for view in (a, b))
    both = sorted(left.keys() & right.keys())
    chosen = _most_moved(left, right, both)
    # What was not chosen counts too: the threshold is that of all of them.
    stretches = sum(len(left[key].steps) // _SUSTAINED for key in both)
    rule = Rule(units=Rule(family_error=_FAMILY_ERROR / 2).threshold(stretches))
    tensors = _judged({k: left[k] for k in chosen}, {k: right[k] for k in chosen}, rule)
    found = [part for part in (scalars, tensors) if part is not None]
    partings = [parting for part in found for parting in part.partings]
    return StoredComparison(
        first_step=a.first_step,
        last_step=a.last_step,
        width=width,
        layer_width=layer_width,
        layers=len(both),
        judged_layers=len(chosen),
        series=sum(part.series for part in found),
        too_short=sum(part.too_short for part in found),
        partings=tuple(sorted(partings, key=lambda p: (p.step, -p.units, p.key))),
    )


def _common(store: Store, a: View, b: View) -> tuple[View, View]:
    """Both views over the steps from the first to the last that both hold, as far as they agree."""
    for _ in range(_ROUNDS):
        left, right = store.bounds(a), store.bounds(b)
        if left is None or right is None:
            raise CompareError("no step is in both runs")
        first, last = max(left[0], right[0]), min(left[1], right[1])
        if first > last:
            raise CompareError("no step is in both runs")
        a = replace(a, first_step=first, last_step=last)
        b = replace(b, first_step=first, last_step=last)
        if left == right:
            break
    return a, b


def _scalars(store: Store, view: View, width: int) -> RunSeries:
    points = -(-(view.last_step - view.first_step + 1) // width)
    found: dict[SeriesKey, Series] = {}
    for name in store.scalar_names(view.run_id):
        if name in _NOT_COMPARED:
            continue
        series = store.scalar_series(view, name, points)
        steps = np.array(series.step, np.int64) // width * width
        values = np.array(series.mean, np.float64)
        # A bucket with any value that is not finite counts as lost.
        values[np.array(series.nonfinite, np.int64) > 0] = np.nan
        if len(steps):
            found[SeriesKey(name)] = _one_each(steps, values)
    return found


def _one_each(steps: IntArray, values: FloatArray) -> Series:
    kept, first = np.unique(steps, return_index=True)
    return Series(kept, values[first])


def _layers(store: Store, view: View, role: str, statistic: str, width: int) -> RunSeries:
    points = -(-(view.last_step - view.first_step + 1) // width)
    heatmap = store.heatmap(view, role, statistic, points)
    places = np.array(heatmap.steps, np.int64)
    places = view.first_step + (places - view.first_step) // width * width
    found: dict[SeriesKey, Series] = {}
    for layer, row in heatmap.values.items():
        present = np.array([value is not None for value in row])
        if present.any():
            values = np.array([np.nan if value is None else value for value in row], np.float64)
            key = SeriesKey(statistic, layer, role)
            found[key] = _one_each(places[present], values[present])
    return found


def _most_moved(a: RunSeries, b: RunSeries, keys: list[SeriesKey]) -> list[SeriesKey]:
    if len(keys) <= MOST_LAYERS:
        return keys
    return sorted(keys, key=lambda key: -_movement(a[key], b[key]))[:MOST_LAYERS]


def _movement(a: Series, b: Series) -> float:
    """How far the two come to differ from how they began, in their own scatter."""
    _, left, right = np.intersect1d(a.steps, b.steps, assume_unique=True, return_indices=True)
    difference = b.values[right] - a.values[left]
    if not np.isfinite(difference).all():
        return np.inf
    if len(difference) < 2:
        return 0.0
    scatter = float(np.median(np.abs(np.diff(difference)))) + 1e-12
    return float(np.abs(difference - np.median(difference[:10])).max()) / scatter


def _judged(a: RunSeries, b: RunSeries, rule: Rule) -> Comparison | None:
    try:
        return compare_runs(a, b, rule=rule)
    except CompareError:
        return None  # nothing of this kind is in both
