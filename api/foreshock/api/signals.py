"""One small vector per record, whatever the model: what the forecaster may look at.

Extremes and medians over layers, so that neither depth, width nor format shows. The learning rate,
the step number and names of faults are deliberately not among the signals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from foreshock.monitor.record import TensorIdentity

__all__ = [
    "EXTREMES",
    "FLOORS",
    "FOLDS",
    "FOLD_STATISTICS",
    "LIMIT",
    "LOSS_SIGNALS",
    "SCALAR_SIGNALS",
    "SIGNALS",
    "SIGNAL_ROLES",
    "TENSOR_SIGNALS",
    "fold_statistics",
    "nonfinite_share",
    "scalar_signals",
    "summarise",
    "worst_layers",
    "worst_rows",
]

FloatArray = npt.NDArray[np.float64]
Fold = Literal["max", "min", "median"]

SIGNAL_ROLES: Final = ("input", "weight", "grad_output")
"""The operands of a linear layer's GEMMs: measured at every instrumented layer."""

LOSS_SIGNALS: Final = ("loss", "loss_nonfinite")
SCALAR_SIGNALS: Final = (
    *LOSS_SIGNALS,
    "grad_norm",
    "grad_norm_nonfinite",
    "update_ratio",
    "param_norm",
)
"""`grad_norm`, `update_ratio` and `param_norm` are log2; `*_nonfinite` is 0 or 1."""


@dataclass(frozen=True, slots=True)
class _Fold:
    """How one statistic becomes signals: log2(value + floor) or the value, then folds."""

    statistic: str
    folds: tuple[Fold, ...]
    floor: float | None


# Ratios get a floor near one element in a hundred thousand: below it a change is a matter of
# single elements.
_FOLDS: Final = (
    _Fold("kurtosis", ("max", "median"), 1e-30),
    _Fold("channel_kurtosis", ("max", "median"), 1e-30),
    _Fold("headroom_log2", ("min", "median"), None),
    _Fold("underflow_ratio", ("max", "median"), 1e-5),
    _Fold("subnormal_ratio", ("max", "median"), 1e-5),
    _Fold("overflow_ratio", ("max", "median"), 1e-6),
    _Fold("sqnr_db", ("min", "median"), None),
    _Fold("rms", ("max", "median"), 1e-45),
    _Fold("amax", ("max", "median"), 1e-45),
)
LIMIT: Final = 200.0
"""Logarithms and decibels are held within this and its negative."""
_SIGNS: Final = np.array([-1.0 if "min" in fold.folds else 1.0 for fold in _FOLDS])[:, None]

FOLD_STATISTICS: Final = tuple(fold.statistic for fold in _FOLDS)
"""The statistics that are folded over layers, in the order of `fold_statistics`' rows."""
FOLDS: Final = tuple(fold.folds for fold in _FOLDS)
"""How each of them is folded."""
FLOORS: Final = tuple(fold.floor for fold in _FOLDS)
"""What is added to each of them before its logarithm; None takes the value itself."""

TENSOR_SIGNALS: Final = (
    "nonfinite_tensors",
    *(
        f"{role}.{fold.statistic}.{how}"
        for role in SIGNAL_ROLES
        for fold in _FOLDS
        for how in fold.folds
    ),
)
SIGNALS: Final[tuple[str, ...]] = (*SCALAR_SIGNALS, *TENSOR_SIGNALS)
"""Names of the entries of a signal vector, in order; tensor signals are `role.statistic.fold`."""

EXTREMES: Final = tuple(
    f"{role}.{fold.statistic}.{'min' if 'min' in fold.folds else 'max'}"
    for role in SIGNAL_ROLES
    for fold in _FOLDS
)
"""The signals that are one layer's value, in the order of `worst_rows` role by role."""


def summarise(
    identities: Sequence[TensorIdentity] | None,
    statistics: Mapping[str, Any] | None,
    scalars: Mapping[str, Any],
) -> FloatArray:
    """Fold one record, or E records of equal layout, into signal vectors.

    Args:
        identities: One per row of the statistics; None off the cadence. What-if rows are ignored.
        statistics: Name to values of shape (rows,) or (E, rows); masked or NaN = not measured.
            None off the cadence.
        scalars: Name to a number or an array (E,). A name that stands there was measured, so NaN is
            a non-finite measurement; leave out (or give None for) what was not measured.

    Returns:
        float64 of shape (len(SIGNALS),) or (E, len(SIGNALS)), NaN = not measured, otherwise finite.
    """
    scalar_part = _scalar_signals(scalars)
    if identities is None or statistics is None or not identities:
        shape = (*scalar_part.shape[:-1], len(TENSOR_SIGNALS))
        return np.concatenate([scalar_part, np.full(shape, np.nan)], axis=-1)
    tensor_part = _tensor_signals(identities, statistics)
    lead = np.broadcast_shapes(scalar_part.shape[:-1], tensor_part.shape[:-1])
    parts = [np.broadcast_to(p, (*lead, p.shape[-1])) for p in (scalar_part, tensor_part)]
    return np.concatenate(parts, axis=-1)


def worst_layers(
    identities: Sequence[TensorIdentity], statistics: Mapping[str, Any]
) -> dict[str, str]:
    """Which layer holds each extreme of one record: signal name to qualified module name.

    Args:
        identities: One per row.
        statistics: Name to values of shape (rows,).
    """
    worst: dict[str, str] = {}
    for place, role in enumerate(SIGNAL_ROLES):
        rows = _rows_of(identities, role)
        if rows.size == 0:
            continue
        found = worst_rows(_stacked(statistics, rows, ()))
        names = EXTREMES[place * len(_FOLDS) : (place + 1) * len(_FOLDS)]
        for name, row in zip(names, found.tolist(), strict=True):
            if row >= 0:
                worst[name] = identities[int(rows[row])].layer
    return worst


def worst_rows(values: FloatArray) -> npt.NDArray[np.intp]:
    """Which row holds each statistic's bad end: the largest, or the smallest where that is bad.

    Args:
        values: (..., FOLD_STATISTICS, rows), NaN = not measured.

    Returns:
        (..., FOLD_STATISTICS) rows; -1 where no value is finite.
    """
    with np.errstate(invalid="ignore"):
        key = np.where(np.isnan(values), -np.inf, values * _SIGNS)
    known = np.isfinite(values).any(axis=-1)
    return np.where(known, key.argmax(axis=-1), -1)


def _scalar_signals(scalars: Mapping[str, Any]) -> FloatArray:
    if all(isinstance(value, float | int) for value in scalars.values()):
        return scalar_signals(scalars)
    loss, loss_bad = _measured(scalars, "loss")
    grad, grad_bad = _measured(scalars, "grad_norm")
    update, _ = _measured(scalars, "update_ratio")
    norm, _ = _measured(scalars, "param_norm")
    columns = (
        np.clip(loss, -1e30, 1e30),
        loss_bad,
        _log2(grad),
        grad_bad,
        _log2(update),
        _log2(norm),
    )
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def scalar_signals(scalars: Mapping[str, float]) -> FloatArray:
    """The scalar part of one record's signals, (len(SCALAR_SIGNALS),): the live path of a step."""
    row = []
    for name in ("loss", "grad_norm", "update_ratio", "param_norm"):
        value = scalars.get(name, math.nan)
        finite = math.isfinite(value)
        if name == "loss":
            row.append(min(max(value, -1e30), 1e30) if finite else math.nan)
        else:
            row.append(_log2_of(value) if finite else math.nan)
        if name in ("loss", "grad_norm"):
            row.append(float(not finite) if name in scalars else math.nan)
    return np.array(row)


def _log2_of(value: float, floor: float = 1e-45) -> float:
    return min(max(float(np.log2(max(value, 0.0) + floor)), -LIMIT), LIMIT)


def _measured(scalars: Mapping[str, Any], name: str) -> tuple[FloatArray, FloatArray]:
    """Finite values (else NaN), and a flag: 1 non-finite, 0 finite, NaN not measured."""
    value = scalars.get(name)
    if value is None:
        return np.array(np.nan), np.array(np.nan)
    data = np.array(np.ma.getdata(value), dtype=np.float64)
    mask = np.ma.getmaskarray(value) if isinstance(value, np.ma.MaskedArray) else False
    finite = np.isfinite(data)
    flag = np.where(mask, np.nan, np.where(finite, 0.0, 1.0))
    return np.where(finite & ~mask, data, np.nan), flag


def _log2(values: FloatArray, floor: float = 1e-45) -> FloatArray:
    with np.errstate(invalid="ignore"):
        result = np.log2(np.maximum(values, 0.0) + floor)
    # As np.clip, at a part of its cost on small arrays.
    return np.asarray(np.minimum(np.maximum(result, -LIMIT), LIMIT))


def _rows_of(identities: Sequence[TensorIdentity], role: str) -> npt.NDArray[np.intp]:
    rows = [i for i, identity in enumerate(identities) if identity.role == role]
    return np.array([i for i in rows if not identities[i].what_if], dtype=np.intp)


def _column(
    statistics: Mapping[str, Any], name: str, rows: npt.NDArray[np.intp]
) -> FloatArray | None:
    values = statistics.get(name)
    if values is None:
        return None
    return _filled(values)[..., rows]


def _filled(values: Any) -> FloatArray:
    """Float64 with NaN where masked; np.ma's own functions cost ten times as much."""
    data = np.array(np.ma.getdata(values), dtype=np.float64)
    mask = np.ma.getmask(values)
    if mask is not np.ma.nomask:
        data[mask] = np.nan
    return data


def _stacked(
    statistics: Mapping[str, Any], rows: npt.NDArray[np.intp], lead: tuple[int, ...]
) -> FloatArray:
    """(..., FOLD_STATISTICS, rows) as measured, NaN where a statistic is missing."""
    values = np.full((*lead, len(_FOLDS), rows.size), np.nan)
    for index, name in enumerate(FOLD_STATISTICS):
        column = _column(statistics, name, rows)
        if column is not None:
            values[..., index, :] = column
    return values


def _tensor_signals(
    identities: Sequence[TensorIdentity], statistics: Mapping[str, Any]
) -> FloatArray:
    lead = np.shape(next(iter(statistics.values())))[:-1] if statistics else ()
    rows = {role: _rows_of(identities, role) for role in SIGNAL_ROLES}
    every = np.concatenate(list(rows.values()))
    counts = _column(statistics, "nonfinite_count", every)
    if counts is None or every.size == 0:
        parts = [np.full((*lead, 1), np.nan)]
    else:
        parts = [nonfinite_share(counts, np.array(every.size))[..., None]]
    parts += [fold_statistics(_stacked(statistics, rows[role], lead)) for role in SIGNAL_ROLES]
    return np.concatenate(parts, axis=-1)


def nonfinite_share(counts: FloatArray, rows: npt.NDArray[np.intp]) -> FloatArray:
    """Share of tensors with a non-finite element.

    Args:
        counts: (..., rows) non-finite elements, NaN = not measured or no row.
        rows: (...) how many of the rows there are.
    """
    with np.errstate(invalid="ignore"):
        bad = np.count_nonzero(np.nan_to_num(counts) > 0, axis=-1)
    return np.asarray(bad / rows, dtype=np.float64)


def fold_statistics(values: FloatArray) -> FloatArray:
    """One role's signals of records, by one sort over its rows.

    Args:
        values: (..., FOLD_STATISTICS, rows) as measured, NaN = not measured or no row.

    Returns:
        (..., signals of one role).
    """
    scaled = np.empty_like(values)
    for index, fold in enumerate(_FOLDS):
        column = values[..., index, :]
        if fold.floor is not None:
            scaled[..., index, :] = _log2(column, fold.floor)
        else:
            # An exact cast has an infinite sqnr; a NaN stays what it is.
            np.minimum(np.maximum(column, -LIMIT), LIMIT, out=scaled[..., index, :])
    return _fold_rows(scaled)


def _fold_rows(values: FloatArray) -> FloatArray:
    """Fold (..., statistics, rows) into (..., signals of one role) by one sort over rows."""
    *lead, _, rows = values.shape
    if rows == 0:
        return np.full((*lead, sum(len(f.folds) for f in _FOLDS)), np.nan)
    ordered = np.sort(values, axis=-1)  # NaN last
    valid = np.count_nonzero(~np.isnan(ordered), axis=-1, keepdims=True)
    last = np.maximum(valid - 1, 0)

    def at(index: npt.NDArray[np.intp]) -> FloatArray:
        return np.take_along_axis(ordered, index, axis=-1)[..., 0]

    folded = {
        "min": ordered[..., 0],
        "max": at(last),
        "median": (at(last // 2) + at((last + 1) // 2)) / 2,
    }
    columns = [folded[how][..., i] for i, fold in enumerate(_FOLDS) for how in fold.folds]
    return np.stack(columns, axis=-1)
