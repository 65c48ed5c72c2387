"""Where two runs part: the first step at which a series leaves the other beyond the seed's noise.

The difference of two healthy runs wanders; a parting is a difference that stays beyond k units of
noise for several logged steps, k chosen so that all series together seldom part by chance. Pure:
series in, partings out. docs/import-compare.md has the measured rate of false partings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import t as student

from foreshock.api.compare_series import (
    FloatArray,
    IntArray,
    RunSeries,
    Series,
    SeriesKey,
    averaged,
    averaging_width,
    smallest_noise,
    to_unit,
)

__all__ = ["CompareError", "Comparison", "Parting", "Rule", "compare_runs"]

Kind = Literal["nonfinite", "sustained"]

_REFERENCE: Final = 10
"""Logged steps at the start whose median difference counts as the seeds' own."""
_LEVEL: Final = 8
_LAG: Final = 4
_AVERAGED: Final = 16
"""Logged steps whose mean is compared too: a lasting gap may be smaller than one step's noise."""
_AVERAGES_SUSTAINED: Final = 3
# Weights start alike and turn each in its own time: no noise before announces it.
_STATE: Final = frozenset({"weight", "master_weight", "weight_gathered", "exp_avg", "exp_avg_sq"})
_STATE_FLOORS: Final = 2.0
_TAIL_FREEDOM: Final = 8.0
# Series whose value is a setting: equal runs have it equal, so no reference is taken off.
_SETTINGS: Final = frozenset({"learning_rate"})


class CompareError(ValueError):
    """The two runs cannot be compared; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When a difference counts as a parting.

    Attributes:
        sustained: Logged steps in a row that the difference has to stay away.
        family_error: Wanted chance that any of all series parts by chance.
        units: Noise units to stay beyond; None chooses them from `family_error` and the number of
            series and steps (Bonferroni over non-overlapping stretches, with the tails of a Student
            distribution of 8 degrees of freedom, heavier than those of measured healthy pairs).
    """

    sustained: int = 5
    family_error: float = 0.05
    units: float | None = None

    def __post_init__(self) -> None:
        if self.sustained < 1:
            raise CompareError(f"sustained is {self.sustained}; allowed: 1 or more")
        if not 0 < self.family_error < 1:
            raise CompareError(f"family error is {self.family_error}; allowed: between 0 and 1")
        if self.units is not None and not self.units > 0:
            raise CompareError(f"noise units is {self.units}; allowed: above 0")

    def threshold(self, stretches: int) -> float:
        """Noise units for so many stretches of all series together."""
        if self.units is not None:
            return self.units
        return float(student.isf(self.family_error / max(stretches, 1) / 2, _TAIL_FREEDOM))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """One series that parts.

    Attributes:
        step: First step of the stretch.
        key: Which series.
        kind: Whether one side is not finite, or the difference stays beyond the noise.
        a: Value of A at the step, as logged.
        b: Value of B at the step.
        units: Difference over the stretch in noise units, at its smallest; infinite for nonfinite.
        largest_units: The same for the worst later stretch.
        asked: Noise units beyond which a difference counts.
    """

    step: int
    key: SeriesKey
    kind: Kind
    a: float
    b: float
    units: float
    largest_units: float
    asked: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out.

    Attributes:
        partings: First step first, then the largest effect.
        series: Series compared.
        too_short: Series in both runs with too few common steps.
        only_a: Series that only A has.
        only_b: Series that only B has.
        first_step: First common step.
        last_step: Last common step.
    """

    partings: tuple[Parting, ...]
    series: int
    too_short: int
    only_a: int
    only_b: int
    first_step: int
    last_step: int


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both sides of one series at their common steps; `finite` selects the rows of x and y."""

    key: SeriesKey
    steps: IntArray
    a: FloatArray
    b: FloatArray
    finite: IntArray
    x: FloatArray
    y: FloatArray


def compare_runs(
    a: RunSeries, b: RunSeries, *, seeds: Sequence[RunSeries] = (), rule: Rule | None = None
) -> Comparison:
    """Find where B parts from A.

    Args:
        a: One run.
        b: The other.
        seeds: Further seeds of A's recipe: with them the noise is the spread between seeds, and
            differences from the first step on count too.
        rule: When a difference counts.

    Raises:
        CompareError: No series, or no step, is in both.
    """
    rule = rule or Rule()
    common = sorted(a.keys() & b.keys())
    if not common:
        raise CompareError("no series is in both runs")
    fine = _Scale.of(common, a, b, seeds, rule)
    if not fine.pairs:
        raise CompareError("no step is in both runs")
    coarse = _Scale.of_averages(common, a, b, seeds, replace(rule, sustained=_AVERAGES_SUSTAINED))
    lost = [p for pair in fine.pairs if (p := _first_nonfinite(pair)) is not None]
    parted: dict[SeriesKey, Parting] = {}
    for parting in _parted([fine, coarse], rule):
        before = parted.get(parting.key)
        parted[parting.key] = parting if before is None else min(before, parting, key=_rank)
    return Comparison(
        partings=tuple(sorted([*lost, *parted.values()], key=_rank)),
        series=len(fine.pairs),
        too_short=len(common) - len(fine.long) - sum(k.statistic == "nonfinite" for k in common),
        only_a=len(a.keys() - b.keys()),
        only_b=len(b.keys() - a.keys()),
        first_step=int(min(p.steps[0] for p in fine.pairs)),
        last_step=int(max(p.steps[-1] for p in fine.pairs)),
    )


def _parted(scales: Sequence[_Scale], rule: Rule) -> Iterator[Parting]:
    """Partings of the run's scalars and of its tensors: half of the error is granted to each.

    Thousands of tensors would else ask the loss for more than anybody can wait for.
    """
    half = replace(rule, family_error=rule.family_error / 2)
    for scalars in (True, False):
        judged = [
            (scale, p) for scale in scales for p in scale.long if (not p.key.layer) == scalars
        ]
        asked = half.threshold(sum(len(p.finite) // s.sustained for s, p in judged))
        for scale, pair in judged:
            noise = scale.noise(pair)
            absolute = scale.spread is not None
            parting = _first_sustained(pair, noise, scale.sustained, asked, absolute)
            if parting is not None:
                yield parting


@dataclass(frozen=True, slots=True)
class _Scale:
    """All series at one resolution; `long` are those with enough steps to be judged."""

    pairs: Sequence[_Pair]
    long: Sequence[_Pair]
    spread: _SeedSpread | None
    sustained: int

    @classmethod
    def of(
        cls,
        keys: Iterable[SeriesKey],
        a: RunSeries,
        b: RunSeries,
        seeds: Sequence[RunSeries],
        rule: Rule,
    ) -> _Scale:
        pairs = [p for key in keys if (p := _pair(key, a[key], b[key])) is not None]
        least = rule.sustained if seeds else 2 * _REFERENCE + rule.sustained
        long = [p for p in pairs if len(p.finite) >= least and p.key.statistic != "nonfinite"]
        spread = _SeedSpread.of(long, [a, *seeds]) if seeds else None
        return cls(pairs, long, spread, rule.sustained)

    @classmethod
    def of_averages(
        cls,
        keys: Iterable[SeriesKey],
        a: RunSeries,
        b: RunSeries,
        seeds: Sequence[RunSeries],
        rule: Rule,
    ) -> _Scale:
        """Means over many steps of the run's own scalars: small gaps that last."""
        scalars = [key for key in keys if not key.layer and key.statistic not in _SETTINGS]
        widths = {key: averaging_width(a[key], _AVERAGED) for key in scalars}
        a, b, *seeds = (
            {key: averaged(run[key], widths[key]) for key in scalars if key in run}
            for run in (a, b, *seeds)
        )
        return cls.of(scalars, a, b, seeds, rule)

    def noise(self, pair: _Pair) -> FloatArray:
        """Of a healthy difference at the pair's finite steps."""
        return _own_noise(pair, self.sustained) if self.spread is None else self.spread.noise(pair)


def _rank(parting: Parting) -> tuple[int, float, SeriesKey]:
    return parting.step, -parting.units, parting.key


def _pair(key: SeriesKey, a: Series, b: Series) -> _Pair | None:
    if np.array_equal(a.steps, b.steps):  # nearly always, and much quicker
        steps, va, vb = a.steps, a.values, b.values
    else:
        steps, left, right = np.intersect1d(
            a.steps, b.steps, assume_unique=True, return_indices=True
        )
        va, vb = a.values[left], b.values[right]
    if not len(steps):
        return None
    x, y = to_unit(key.statistic, va), to_unit(key.statistic, vb)
    finite = np.flatnonzero(~np.isnan(x) & ~np.isnan(y))
    return _Pair(key, steps, va, vb, finite, x[finite], y[finite])


def _first_nonfinite(pair: _Pair) -> Parting | None:
    lost_a, lost_b = _lost(pair.key, pair.a), _lost(pair.key, pair.b)
    differs = np.flatnonzero(lost_a != lost_b)
    if not differs.size:
        return None
    at = int(differs[0])
    return Parting(
        step=int(pair.steps[at]),
        key=pair.key,
        kind="nonfinite",
        a=float(pair.a[at]),
        b=float(pair.b[at]),
        units=np.inf,
        largest_units=np.inf,
    )


def _lost(key: SeriesKey, values: FloatArray) -> FloatArray:
    if key.statistic == "nonfinite":
        return np.asarray(values > 0, dtype=np.float64)
    if key.statistic == "sqnr_db":  # infinite when the cast is exact
        return np.asarray(np.isnan(values), dtype=np.float64)
    return np.asarray(~np.isfinite(values), dtype=np.float64)


def _first_sustained(
    pair: _Pair, noise: FloatArray, sustained: int, threshold: float, absolute: bool
) -> Parting | None:
    difference = pair.y - pair.x
    if not absolute and pair.key.statistic not in _SETTINGS:
        difference = difference - np.median(difference[:_REFERENCE])
    windows = sliding_window_view(difference / noise, sustained)
    # On one and the same side all along: a difference that changes sign is noise, however large.
    held = np.where(
        (np.sign(windows) == np.sign(windows[:, :1])).all(axis=1), np.abs(windows).min(axis=1), 0.0
    )
    hits = np.flatnonzero(held > threshold)
    if not hits.size:
        return None
    first = int(hits[0])
    at = int(pair.finite[first])
    return Parting(
        step=int(pair.steps[at]),
        key=pair.key,
        kind="sustained",
        a=float(pair.a[at]),
        b=float(pair.b[at]),
        units=float(held[first]),
        largest_units=float(held.max()),
        asked=threshold,
    )


def _own_noise(pair: _Pair, sustained: int) -> FloatArray:
    """Noise of the difference at each logged step, from both runs' earlier steps alone.

    Step-to-step residuals around a causal level of each run, and on top of them the wandering of
    the difference, as that of a random walk whose increments are seen so far.
    """
    floor = smallest_noise(pair.key, float(np.median(np.abs(pair.x))))
    count = len(pair.x)
    if pair.key.statistic in _SETTINGS:
        return np.full(count, floor)
    if pair.key.role in _STATE:
        floor *= _STATE_FLOORS
    residual = _earlier_spread(pair.x, sustained) ** 2 + _earlier_spread(pair.y, sustained) ** 2
    walk = _earlier_walk(pair.y - pair.x, residual, sustained)
    elapsed = np.maximum(np.arange(count) - _REFERENCE / 2, 0.0) / sustained
    return np.asarray(np.sqrt(residual + walk * elapsed + floor**2))


def _earlier_walk(difference: FloatArray, residual: FloatArray, sustained: int) -> FloatArray:
    """Variance that the difference gains from one stretch to the next, as known at each step.

    From increments over several stretches once there are enough of them: residuals weigh less in
    those.
    """
    count = len(difference)
    blocks = count // sustained
    levels = np.median(difference[: blocks * sustained].reshape(blocks, sustained), axis=1)
    white = 3.14 / sustained * residual  # what residuals alone make of two medians' difference
    # Blocks that ended before the stretch in question began.
    ended = (np.arange(count) - sustained) // sustained
    walk = np.zeros(count)
    for lag in (1, _LAG):
        if blocks <= lag:
            break
        squares = pd.Series((levels[lag:] - levels[:-lag]) ** 2).expanding().median()
        last = ended - lag - 1
        enough = last >= (0 if lag == 1 else _LAG)
        gained = (2.2 * np.asarray(squares)[np.where(enough, last, 0)] - white) / lag
        walk = np.where(enough, np.maximum(gained, 0.0), walk)
    return walk


def _earlier_spread(values: FloatArray, sustained: int) -> FloatArray:
    """Robust spread of one step around its neighbours, from the steps before each stretch.

    Differences of neighbours over the square root of two: a trend leaves them nearly alone.
    """
    count = len(values)
    residuals = np.abs(np.diff(values, prepend=values[:1])) / np.sqrt(2)
    residuals[0] = residuals[1] if count > 1 else 0.0
    seen = pd.Series(residuals).expanding()
    # The high quantile for series that stand still and jump, such as a delayed scale.
    spread = np.maximum(1.4826 * np.asarray(seen.median()), 0.6 * np.asarray(seen.quantile(0.9)))
    last = np.maximum(np.arange(count) - sustained, _REFERENCE) - 1
    return np.asarray(spread[np.minimum(last, count - 1)])


@dataclass(frozen=True, slots=True)
class _SeedSpread:
    """Between-seed spread of each series, and the middle one of like series."""

    own: Mapping[SeriesKey, Series]
    alike: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, pairs: Iterable[_Pair], seeds: Sequence[RunSeries]) -> _SeedSpread:
        own: dict[SeriesKey, Series] = {}
        groups: dict[tuple[str, str], list[float]] = {}
        for pair in pairs:
            spread = _between(pair.key, seeds)
            if spread is not None:
                own[pair.key] = spread
                group = (pair.key.statistic, pair.key.role)
                groups.setdefault(group, []).append(float(np.median(spread.values)))
        return cls(own, {group: float(np.median(found)) for group, found in groups.items()})

    def noise(self, pair: _Pair) -> FloatArray:
        """Noise of a difference of two seeds at the pair's finite steps."""
        floor = smallest_noise(pair.key, float(np.median(np.abs(pair.x))))
        least = self.alike.get((pair.key.statistic, pair.key.role), np.inf)
        if pair.key.statistic in _SETTINGS:
            return np.full(len(pair.x), floor)
        own = self.own.get(pair.key)
        if own is None:
            return np.full(len(pair.x), np.hypot(least, floor))
        values = np.interp(pair.steps[pair.finite], own.steps, own.values)
        return np.asarray(np.sqrt(np.maximum(values, least) ** 2 + floor**2))


def _between(key: SeriesKey, seeds: Sequence[RunSeries]) -> Series | None:
    """Root mean square difference over pairs of seeds, largest so far: early ones may be alike."""
    held = [seed[key] for seed in seeds if key in seed]
    pairs = [p for one, other in combinations(held, 2) if (p := _pair(key, one, other)) is not None]
    if not any(len(pair.finite) for pair in pairs):
        return None
    steps, at = np.unique(np.concatenate([p.steps[p.finite] for p in pairs]), return_inverse=True)
    squares = np.concatenate([(p.x - p.y) ** 2 for p in pairs])
    means = np.bincount(at, weights=squares) / np.bincount(at)
    window = min(2 * _LEVEL, len(means))
    padded = np.concatenate([np.full(window - 1, means[:window].mean()), means])
    smooth = sliding_window_view(padded, window).mean(axis=1)
    return Series(steps, np.sqrt(np.maximum.accumulate(smooth)))
