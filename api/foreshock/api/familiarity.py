"""Is this run like the ones that the model learned from? And is a fleet drifting away from them?

Both compare features with quantiles of the healthy training records, which the model card carries.
A record is unfamiliar when its features lie outside the range of nearly all of them by more than
held-out training groups ever did but for a stated share. The fleet's drift is the population
stability index (PSI) over the deciles: below 0.1 alike, above 0.25 something changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt

from foreshock.api.features import FEATURES

if TYPE_CHECKING:
    from foreshock.api.corpus import CorpusRun

__all__ = ["FleetDrift", "Reference", "Unfamiliarity", "reference_of"]

FloatArray = npt.NDArray[np.float64]

_TAIL: Final = 0.001
_ALLOWED: Final = 0.01
_EVERY: Final = 16


@dataclass(frozen=True, slots=True)
class Unfamiliarity:
    """How one record differs from the training records.

    Attributes:
        distance: Root mean square of how far features lie outside their range, in its widths.
        unlike: Whether that is more than the limit.
        signals: The furthest features, at most three.
    """

    distance: float
    unlike: bool
    signals: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What healthy training records look like.

    Attributes:
        names: Of the features.
        low, high: (features,) their 0.1 % and 99.9 % quantiles.
        deciles: (features, 9).
        limit: Distance from which on a record is unfamiliar.
        false_share: Share of the healthy records of held-out groups beyond the limit; the limit is
            chosen on half of them and the share measured on the other half.
    """

    names: tuple[str, ...]
    low: FloatArray
    high: FloatArray
    deciles: FloatArray
    limit: float
    false_share: float

    def judge(self, row: FloatArray) -> Unfamiliarity:
        """Compare one record.

        Args:
            row: (features,) of `names`; NaN = not measured, neither familiar nor not.
        """
        outside = _outside(row, self.low, self.high)
        distance = float(_distance(outside))
        furthest = np.argsort(-np.nan_to_num(outside), kind="stable")[:3]
        names = tuple(self.names[i] for i in furthest.tolist() if outside[i] > 0)
        return Unfamiliarity(distance, distance > self.limit, names)

    def as_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "names": list(self.names),
            "low": _rounded(self.low),
            "high": _rounded(self.high),
            "deciles": _rounded(self.deciles),
            "limit": self.limit,
            "false_share": self.false_share,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """As a model card has it."""
        return cls(
            names=tuple(document["names"]),
            low=np.array(document["low"], dtype=np.float64),
            high=np.array(document["high"], dtype=np.float64),
            deciles=np.array(document["deciles"], dtype=np.float64),
            limit=float(document["limit"]),
            false_share=float(document["false_share"]),
        )


class FleetDrift:
    """Population stability of a stream of records, of any number of runs; constant memory.

    Args:
        reference: Of the model.
        memory: Records after which an old one counts half.
    """

    def __init__(self, reference: Reference, memory: float = 10_000.0) -> None:
        self._reference = reference
        self._keep = np.exp2(-1.0 / memory)
        self._counts = np.zeros((len(reference.names), reference.deciles.shape[1] + 1))
        self._rows = np.arange(len(reference.names))

    def update(self, row: FloatArray) -> None:
        """Take in one record: (features,) of the reference's names."""
        known = ~np.isnan(row)
        place = np.count_nonzero(row[:, None] > self._reference.deciles, axis=1)
        self._counts *= self._keep
        self._counts[self._rows[known], place[known]] += 1.0

    def index(self) -> dict[str, float]:
        """PSI by signal group (the first part of a name), the mean over its features."""
        total = self._counts.sum(axis=1)
        groups: dict[str, list[float]] = {}
        for name, counts, rows in zip(self._reference.names, self._counts, total, strict=True):
            if rows >= 100:
                groups.setdefault(name.split(".")[0], []).append(_psi(counts))
        return {group: float(np.mean(values)) for group, values in groups.items()}


def reference_of(runs: Sequence[CorpusRun], names: Sequence[str]) -> Reference | None:
    """The reference of some features over the healthy records of training runs.

    Args:
        runs: Training runs.
        names: Features.

    Returns:
        None where there are too few groups or records to tell.
    """
    columns = [FEATURES.index(name) for name in names]
    groups = sorted({run.group for run in runs})
    parts: dict[str, list[FloatArray]] = {group: [] for group in groups}
    for run in runs:
        rows = run.features[run.healthy][::_EVERY][:, columns].astype(np.float64)
        parts[run.group].append(rows)
    if len(groups) < 4:
        return None
    # Ranges from two quarters, the limit from the third, its false share from the fourth.
    order = np.random.default_rng(0).permutation(len(groups))
    quarter = [np.concatenate([r for i in order[k::4] for r in parts[groups[i]]]) for k in range(4)]
    if min(len(q) for q in quarter) < 100:
        return None
    low, high = _range(np.concatenate(quarter[:2]))
    limit = float(np.quantile(_distance(_outside(quarter[2], low, high)), 1 - _ALLOWED))
    false = float(np.mean(_distance(_outside(quarter[3], low, high)) > limit))
    everything = np.concatenate(quarter)
    low, high = _range(everything)
    return Reference(
        names=tuple(names),
        low=low,
        high=high,
        deciles=_quantiles(everything, np.arange(1, 10) / 10).T,
        limit=limit,
        false_share=false,
    )


def _range(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    low, high = _quantiles(rows, np.array([_TAIL, 1 - _TAIL]))
    return low, high


def _quantiles(rows: FloatArray, shares: FloatArray) -> FloatArray:
    """(shares, features) of what is known; 0 for a feature that never was."""
    found = np.zeros((len(shares), rows.shape[1]))
    for index in range(rows.shape[1]):
        column = rows[:, index]
        column = column[~np.isnan(column)]
        if column.size:
            found[:, index] = np.quantile(column, shares)
    return found


def _outside(rows: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    width = np.maximum(high - low, 0.1)
    return np.asarray(np.maximum(np.maximum(rows - high, low - rows) / width, 0.0))


def _distance(outside: FloatArray) -> FloatArray:
    count = np.maximum(np.count_nonzero(~np.isnan(outside), axis=-1), 1)
    return np.asarray(np.sqrt(np.nansum(np.square(outside), axis=-1) / count))


def _psi(counts: FloatArray) -> float:
    """Against equal shares: that is what deciles are."""
    share = np.maximum(counts / counts.sum(), 1e-4)
    expected = 1.0 / counts.size
    return float(np.sum((share - expected) * np.log(share / expected)))


def _rounded(values: FloatArray) -> list[Any]:
    rounded: list[Any] = np.round(values, 4).tolist()
    return rounded
