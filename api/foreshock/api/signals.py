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
    "LOSS_SIGNALS",
    "SCALAR_SIGNALS",
    "SIGNALS",
    "SIGNAL_ROLES",
    "TENSOR_SIGNALS",
    "summarise",
    "worst_layers",
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
_LIMIT: Final = 200.0

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
    for role in SIGNAL_ROLES:
        rows = _rows_of(identities, role)
        if rows.size == 0:
            continue
        for fold in _FOLDS:
            values = _column(statistics, fold.statistic, rows)
            if values is None or not np.isfinite(values).any():
                continue
            for how in fold.folds:
                if how == "median":
                    continue
                pick = np.nanargmin(values) if how == "min" else np.nanargmax(values)
                name = f"{role}.{fold.statistic}.{how}"
                worst[name] = identities[int(rows[int(pick)])].layer
    return worst


def _scalar_signals(scalars: Mapping[str, Any]) -> FloatArray:
    if all(isinstance(value, float | int) for value in scalars.values()):
        return _one_record(scalars)
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


def _one_record(scalars: Mapping[str, float]) -> FloatArray:
    """As for arrays, without their overhead: the live path of every step."""
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
    return min(max(float(np.log2(max(value, 0.0) + floor)), -_LIMIT), _LIMIT)


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
    return np.clip(result, -_LIMIT, _LIMIT)


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


def _tensor_signals(
    identities: Sequence[TensorIdentity], statistics: Mapping[str, Any]
) -> FloatArray:
    lead = np.shape(next(iter(statistics.values())))[:-1] if statistics else ()
    parts = [_nonfinite_share(identities, statistics, lead)]
    for role in SIGNAL_ROLES:
        rows = _rows_of(identities, role)
        values = np.full((*lead, len(_FOLDS), rows.size), np.nan)
        for index, fold in enumerate(_FOLDS):
            column = _column(statistics, fold.statistic, rows)
            if column is not None:
                values[..., index, :] = _transform(column, fold)
        parts.append(_fold_rows(values))
    return np.concatenate(parts, axis=-1)


def _nonfinite_share(
    identities: Sequence[TensorIdentity], statistics: Mapping[str, Any], lead: tuple[int, ...]
) -> FloatArray:
    rows = np.concatenate([_rows_of(identities, role) for role in SIGNAL_ROLES])
    counts = _column(statistics, "nonfinite_count", rows)
    if counts is None or rows.size == 0:
        return np.full((*lead, 1), np.nan)
    return np.asarray((np.nan_to_num(counts) > 0).mean(axis=-1, keepdims=True), dtype=np.float64)


def _transform(column: FloatArray, fold: _Fold) -> FloatArray:
    if fold.floor is not None:
        return _log2(column, fold.floor)
    # An exact cast has an infinite sqnr; a NaN stays what it is.
    return np.clip(column, -_LIMIT, _LIMIT)


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
