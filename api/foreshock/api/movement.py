"""How far each series of a window has moved from where it began, in its own unit and noise.

Plain before-and-after comparisons for the diagnosis; it draws no conclusions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from foreshock.monitor.record import TensorIdentity

__all__ = ["Movements", "ScalarMove", "move_of", "movements_of", "onset"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

_BASE: Final = (0.25, 0.6)
"""Between these shares a window is taken for normal: after a warm-up, before the trouble."""
_RECENT: Final = 5
_LOOK_BACK: Final = 60
"""Records before a series left its band among which its movement may have begun."""
_MOVED: Final = 5.0
# Statistics compared as log2, with a floor; the others are logs already.
_LOG_FLOOR: Final = {
    "kurtosis": 1e-30,
    "channel_kurtosis": 1e-30,
    "top_channel_share": 1e-30,
    "amax": 1e-45,
    "rms": 1e-45,
}
_SMALLEST_NOISE: Final = {"overflow_ratio": 1e-3, "underflow_ratio": 1e-3, "sqnr_db": 0.2}
_JUDGED: Final = (
    "kurtosis",
    "channel_kurtosis",
    "amax",
    "rms",
    "headroom_log2",
    "sqnr_db",
    "overflow_ratio",
    "underflow_ratio",
)


@dataclass(frozen=True, slots=True)
class ScalarMove:
    """What one scalar did.

    Attributes:
        change: Recent median less the median at the start (log2 if asked for).
        sigmas: The same in units of its noise.
        since: Step at which the movement began that it has not come back from; None without one.
        jump: Step of the first abrupt rise (within two records, beyond 8 noise sigmas).
        jump_sigmas: Its height in noise sigmas.
        jump_height: Its height, in the unit of `change`.
    """

    change: float
    sigmas: float
    since: int | None
    jump: int | None
    jump_sigmas: float = 0.0
    jump_height: float = 0.0


def move_of(
    steps: npt.NDArray[np.int64], values: FloatArray | None, *, log: bool
) -> ScalarMove | None:
    """How one scalar moved; None when it was measured too rarely.

    Args:
        steps: (T,).
        values: (T,), NaN where not measured.
        log: Compare log2.
    """
    if values is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        series = np.log2(values) if log else np.asarray(values, dtype=np.float64)
    seen = np.flatnonzero(np.isfinite(series))
    if seen.size < 9:
        return None
    when, series = steps[seen], series[seen]
    base = series[_base(seen.size)]
    level = float(np.median(base))
    sigma = 1.4826 * float(np.median(np.abs(base - level))) + 1e-3 * (1 + abs(level))
    recent = float(np.median(series[-_RECENT:]))
    jump, height = _jump(series, sigma)
    return ScalarMove(
        change=recent - level,
        sigmas=abs(recent - level) / sigma,
        since=onset(when, (series - level) / sigma),
        jump=None if jump is None else int(when[jump]),
        jump_sigmas=height,
        jump_height=height * sigma,
    )


def _base(count: int) -> slice:
    first = int(_BASE[0] * count)
    return slice(first, max(first + 3, int(_BASE[1] * count)))


def _jump(series: FloatArray, sigma: float) -> tuple[int | None, float]:
    """First place where a value stands 8 sigmas over the median of the eight before it."""
    for index in range(6, series.size):
        before = series[max(0, index - 9) : index - 1]
        height = (series[index] - float(np.median(before))) / sigma
        if height > 8.0:
            return index, float(height)
    return None, 0.0


def onset(steps: npt.NDArray[np.int64], distance: FloatArray, *, forgiven: int = 1) -> int | None:
    """Step at which the movement began that a series has not come back from.

    A slow ramp leaves the band of its noise long after it began. So the beginning is where a hinge
    (level, then a straight line) or a step (level, then another) fits best, by least squares, up to
    shortly after it left the band.

    Args:
        steps: (T,).
        distance: (T,) from the usual level in units of the noise; NaN where not measured.
        forgiven: So many records in a row within the band do not count as having come back.
    """
    seen = np.flatnonzero(np.isfinite(distance))
    left = _left(np.abs(distance[seen]) > _MOVED, forgiven)
    if left is None:
        return None
    first = max(0, left - _LOOK_BACK)
    near = seen[first : left + 4]
    found = _bend(steps[near].astype(np.float64), distance[near], left - first)
    return int(steps[near[found]])


def _left(away: npt.NDArray[np.bool_], forgiven: int) -> int | None:
    """First record of the final stretch that is away."""
    places = np.flatnonzero(away)
    if not places.size or places[-1] < len(away) - max(_RECENT, forgiven + 1):
        return None
    returns = np.flatnonzero(np.diff(places) > forgiven + 1)
    return int(places[returns[-1] + 1]) if returns.size else int(places[0])


def _bend(when: FloatArray, distance: FloatArray, latest: int) -> int:
    """Index, at most `latest`, from which on a series is best explained by a line or a step."""
    best, chosen = np.inf, latest
    for index in range(latest + 1):
        calm = distance[:index]
        rest = float(calm @ calm)
        for shape in (when[index:] - when[max(index - 1, 0)], np.ones(len(when) - index)):
            tail = distance[index:]
            size = float(shape @ shape)
            slope = float(shape @ tail) / size if size else 0.0
            error = rest + float(np.square(tail - slope * shape).sum())
            if error < best:
                best, chosen = error, index
    return chosen


@dataclass(frozen=True, slots=True)
class _Series:
    """One statistic over the tensor records: (records, rows)."""

    values: FloatArray
    level: FloatArray
    sigma: FloatArray
    recent: FloatArray
    peak: FloatArray


@dataclass(frozen=True, slots=True)
class Movements:
    """Before and after of every tensor row.

    Attributes:
        steps: (records,) steps with tensor statistics.
        identities: One per row.
        series: Statistic to its values and levels.
    """

    steps: npt.NDArray[np.int64]
    identities: Sequence[TensorIdentity]
    series: Mapping[str, _Series] = field(default_factory=dict)

    def _nothing(self) -> FloatArray:
        return np.full(len(self.identities), np.nan)

    def change(self, statistic: str) -> FloatArray:
        """(rows,) recent median less the level at the start; NaN where not measured."""
        series = self.series.get(statistic)
        return self._nothing() if series is None else series.recent - series.level

    def peak_change(self, statistic: str) -> FloatArray:
        """(rows,) as `change`, of a high quantile of the recent values: for what comes and goes."""
        series = self.series.get(statistic)
        return self._nothing() if series is None else series.peak - series.level

    def sigmas(self, statistic: str) -> FloatArray:
        """(rows,) size of the larger of both changes in units of the row's noise."""
        series = self.series.get(statistic)
        if series is None:
            return self._nothing()
        moved = np.fmax(np.abs(series.recent - series.level), series.peak - series.level)
        return np.asarray(moved / series.sigma)

    def before(self, statistic: str, row: int) -> float:
        """Level at the start of the window."""
        return float(self.series[statistic].level[row])

    def after(self, statistic: str, row: int) -> float:
        """Recent median."""
        return float(self.series[statistic].recent[row])

    def stuck(self, statistic: str) -> npt.NDArray[np.bool_]:
        """(rows,) whether the last eight values are one and the same, but for their rounding."""
        series = self.series.get(statistic)
        if series is None or len(series.values) < 8:
            return np.zeros(len(self.identities), dtype=np.bool_)
        return np.asarray(np.ptp(series.values[-8:], axis=0) < 1e-4)

    def worst_change(self, statistic: str, rows: IntArray) -> float:
        """Largest rise of a statistic over some rows, 0 when not measured."""
        change = self.change(statistic)[rows]
        return float(np.nanmax(change)) if np.isfinite(change).any() else 0.0

    def _away(self, statistic: str) -> npt.NDArray[np.bool_]:
        series = self.series[statistic]
        distance = np.abs(series.values - series.level) / series.sigma
        return np.asarray(distance > _MOVED)

    def breadth(self) -> float:
        """Share of rows of which some judged statistic has moved."""
        moved = np.zeros(len(self.identities), dtype=np.bool_)
        for name in _JUDGED:
            if name in self.series:
                moved |= np.nan_to_num(self.sigmas(name)) > _MOVED
        return float(moved.mean()) if moved.size else 0.0

    def moved_before(self, step: int) -> float:
        """Share of rows of which a statistic had left its band for two records before a step."""
        earlier = self.steps < step
        if np.count_nonzero(earlier) < 3 or not len(self.identities):
            return 0.0
        moved = np.zeros(len(self.identities), dtype=np.bool_)
        for name in _JUDGED:
            if name in self.series:
                moved |= self._away(name)[earlier][-3:].sum(axis=0) >= 2
        return float(moved.mean())

    def since(self, row: int, statistic: str | None = None) -> int | None:
        """Step from which on a row has been away from its band."""
        names = [statistic] if statistic else [n for n in _JUDGED if n in self.series]
        found = [onset(self.steps, self._distance(name, row)) for name in names]
        known = [step for step in found if step is not None]
        return min(known) if known else None

    def _distance(self, statistic: str, row: int) -> FloatArray:
        series = self.series[statistic]
        return np.asarray((series.values[:, row] - series.level[row]) / series.sigma[row])

    def ranked(self, rows: IntArray, statistic: str) -> tuple[int, ...]:
        """Rows by how far they moved against their start, furthest first, early ones ahead."""
        size = np.nan_to_num(np.abs(self.change(statistic)))[rows]
        late = 0.01 * (self._left_band(statistic)[rows] - self.steps[-1])
        return tuple(int(row) for row in rows[np.lexsort((rows, late - size))])

    def _left_band(self, statistic: str) -> npt.NDArray[np.int64]:
        """(rows,) step at which each left its band for good; the last step where it has not."""
        away = self._away(statistic)
        last = len(away) - 1
        first = np.full(away.shape[1], last)
        reach = np.full(away.shape[1], last - _RECENT + 1)
        for record in range(last, -1, -1):
            going = away[record] & (record >= reach)
            first = np.where(going, record, first)
            # A single record within the band is no return.
            reach = np.where(going, record - 2, reach)
        return np.asarray(self.steps[first])

    def broadest(self) -> tuple[int, ...]:
        """Rows whose statistics moved, first and furthest first."""
        total = np.zeros(len(self.identities))
        for name in _JUDGED:
            if name in self.series:
                total = np.fmax(total, np.minimum(np.nan_to_num(self.sigmas(name)), 1e3))
        moved = np.flatnonzero(total > _MOVED)
        if not moved.size:
            return ()
        names = [name for name in _JUDGED if name in self.series]
        first = np.min([self._left_band(name) for name in names], axis=0)[moved]
        order = np.lexsort((-total[moved], first))
        return tuple(int(row) for row in moved[order][:12])

    def largest_by_layer(self, values: FloatArray) -> list[tuple[str, int]]:
        """Each layer's row with the largest value, largest layer first; NaN rows left out."""
        best: dict[str, int] = {}
        for row in (int(r) for r in np.flatnonzero(np.isfinite(values))):
            layer = self.identities[row].layer
            if layer not in best or values[row] > values[best[layer]]:
                best[layer] = row
        return sorted(best.items(), key=lambda item: -values[item[1]])

    def name(self, row: int) -> str:
        """Layer and role, for a sentence."""
        identity = self.identities[row]
        return f"{identity.layer} ({identity.role})"


def movements_of(
    steps: npt.NDArray[np.int64],
    identities: Sequence[TensorIdentity],
    statistics: Mapping[str, FloatArray],
) -> Movements:
    """Compare the last tensor records of a window with an earlier part of it.

    Args:
        steps: (T,).
        identities: One per row; what-if rows count for nothing.
        statistics: Name to (T, rows), NaN where not measured.
    """
    if not identities or not statistics:
        return Movements(steps[:0], ())
    measured = np.zeros(len(steps), dtype=np.bool_)
    for values in statistics.values():
        measured |= np.isfinite(values).any(axis=-1)
    real = np.array([not identity.what_if for identity in identities])
    if np.count_nonzero(measured) < 6:
        return Movements(steps[measured], identities)
    series = {}
    for name in {*_JUDGED, "scale_log2", "top_channel_share"}:
        if name in statistics:
            series[name] = _series_of(name, np.where(real, statistics[name], np.nan)[measured])
    return Movements(steps[measured], identities, series)


def _series_of(name: str, values: FloatArray) -> _Series:
    floor = _LOG_FLOOR.get(name)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = values if floor is None else np.log2(values + floor)
    logs = np.clip(logs, -300.0, 300.0)
    base = logs[_base(len(logs))]
    level = _median(base)
    spread = 1.4826 * _median(np.abs(base - level))
    recent = logs[-_RECENT:]
    return _Series(
        values=logs,
        level=level,
        sigma=spread + _SMALLEST_NOISE.get(name, 0.03),
        recent=_median(recent),
        peak=_second_largest(logs[-_RECENT - 1 :]),
    )


def _median(values: FloatArray) -> FloatArray:
    """Median over records, NaN where a row has none; no warning for such rows."""
    ordered = np.sort(values, axis=0)
    count = np.count_nonzero(~np.isnan(ordered), axis=0)
    last = np.maximum(count - 1, 0)
    low = np.take_along_axis(ordered, (last // 2)[None], axis=0)[0]
    high = np.take_along_axis(ordered, ((last + 1) // 2)[None], axis=0)[0]
    return np.asarray((low + high) / 2)


def _second_largest(values: FloatArray) -> FloatArray:
    filled = np.where(np.isnan(values), -np.inf, values)
    second = np.sort(filled, axis=0)[-2]
    return np.where(np.isfinite(second), second, np.nan)
