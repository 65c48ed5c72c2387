"""A run's records as many series over steps, each in the unit in which it is compared.

Knows what each statistic's unit and smallest noise are, and which of them depend on a format; draws
no conclusions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.monitor.record import STATISTICS, TensorIdentity, flatten_tensors

__all__ = [
    "RunSeries",
    "Series",
    "SeriesKey",
    "averaged",
    "averaging_width",
    "series_of",
    "smallest_noise",
    "tensor_key",
    "to_unit",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_RATIOS: Final = frozenset({"underflow_ratio", "subnormal_ratio", "overflow_ratio", "zero_ratio"})
_LOGS: Final = frozenset(
    {
        "amax",
        "rms",
        "kurtosis",
        "kurtosis_sequence_mean",
        "channel_kurtosis",
        "top_channel_share",
        "min_nonzero",
        "mu",
        "grad_norm",
        "update_ratio",
        "param_norm",
        "learning_rate",
        "loss_scale",
    }
)
_OF_FORMAT: Final = frozenset(
    {
        "underflow_ratio",
        "subnormal_ratio",
        "overflow_ratio",
        "headroom_log2",
        "sqnr_db",
        "scale_log2",
        "scale_log2_max",
    }
)
# Names of things and counts of time: they differ between equal runs and say nothing of training.
_NOT_COMPARED: Final = frozenset(
    {"amax_rank", "top_channel", "tokens", "step_seconds", "overhead_ratio", "epoch", "total_flos"}
)
_KNOWN_SCALARS: Final = frozenset({"loss", "max_attention_logit"}) | (_LOGS - set(STATISTICS))
_LIMIT: Final = 300.0


@dataclass(frozen=True, slots=True, order=True)
class SeriesKey:
    """What a series is of.

    Attributes:
        statistic: Name of the statistic or scalar; "nonfinite" for the count of such elements.
        layer: Qualified module name; empty for a scalar of the whole run.
        role: Role of the tensor; empty for a scalar.
        call_index: Call of the module.
        expert: Expert, -1 outside mixtures.
        format: Format with granularity, where the statistic depends on it; else empty.
    """

    statistic: str
    layer: str = ""
    role: str = ""
    call_index: int = 0
    expert: int = -1
    format: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """What was measured of one key: steps that rise, and values as logged."""

    steps: IntArray
    values: FloatArray


RunSeries = Mapping[SeriesKey, Series]


def to_unit(statistic: str, values: FloatArray) -> FloatArray:
    """Values in the unit of comparison: log2, square root of a share, or as they are.

    An exact cast has an infinite sqnr_db, which becomes the largest number; every other non-finite
    value stays NaN.
    """
    if statistic != "sqnr_db":
        values = np.where(np.isfinite(values), values, np.nan)
    if statistic in _RATIOS:
        # The spread of a count's square root does not depend on the count.
        return np.sqrt(np.maximum(values, 0.0))
    if statistic in _LOGS:
        values = np.log2(np.maximum(values, 0.0) + 1e-45)
    return np.clip(values, -_LIMIT, _LIMIT)


def smallest_noise(key: SeriesKey, level: float) -> float:
    """Changes below a few of these are nobody's concern, in the unit of comparison."""
    if key.statistic in _RATIOS or key.statistic in ("loss", "learning_rate"):
        return 0.01
    if key.statistic == "sqnr_db":
        return 0.2
    known = key.layer or key.statistic in _KNOWN_SCALARS
    return 0.03 if known else 1e-3 * abs(level) + 1e-12


def averaging_width(series: Series, count: int) -> int:
    """Steps that hold so many logged ones."""
    gaps = np.diff(series.steps)
    return count * max(1, int(np.median(gaps))) if len(gaps) else count


def averaged(series: Series, width: int) -> Series:
    """Means over stretches of `width` steps that are logged whole; NaN where a value is not finite.

    Args:
        series: Steps and values.
        width: Steps of a stretch; stretches begin at its multiples, so that runs agree on them.
    """
    if not len(series.steps):
        return series
    starts, at, counts = np.unique(
        series.steps // width * width, return_inverse=True, return_counts=True
    )
    means = np.bincount(at, weights=series.values) / counts
    whole = counts >= np.median(counts)
    return Series(starts[whole], means[whole])


def series_of(table: pa.Table) -> RunSeries:
    """All series of a run that can be compared; what-if rows are left out.

    Args:
        table: Conformed and validated records. Where a step stands more than once, the last one
            counts: it is the newest attempt's.
    """
    table = _newest(table)
    return {**_scalar_series(table), **_tensor_series(table)}


def _newest(table: pa.Table) -> pa.Table:
    steps = table["step"].to_numpy()
    _, last = np.unique(steps[::-1], return_index=True)
    return table.take(pa.array(len(steps) - 1 - last)).combine_chunks()


def _scalar_series(table: pa.Table) -> dict[SeriesKey, Series]:
    points: dict[str, tuple[list[int], list[float]]] = {}
    for step, scalars in zip(table["step"].to_pylist(), table["scalars"].to_pylist(), strict=True):
        for name, value in scalars or ():
            if value is not None and name not in _NOT_COMPARED:
                steps, values = points.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return {
        SeriesKey(name): Series(np.array(steps, np.int64), np.array(values, np.float64))
        for name, (steps, values) in points.items()
    }


def _tensor_series(table: pa.Table) -> dict[SeriesKey, Series]:
    flat = flatten_tensors(table)
    flat = flat.filter(pc.invert(pc.fill_null(flat["what_if"], False)))
    if flat.num_rows == 0:
        return {}
    names = ("layer", "role", "call_index", "expert", "format", "granularity")
    columns = [pc.fill_null(flat[n], -1 if n == "expert" else 0) if n in names[2:4] else flat[n]
               for n in names]  # fmt: skip
    joined = pc.binary_join_element_wise(*(c.cast(pa.string()) for c in columns), "\x1f")
    encoded = joined.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    steps = flat["step"].to_numpy()[order]
    found: dict[SeriesKey, Series] = {}
    for name in STATISTICS:
        column = flat[name]
        present = column.is_valid().to_numpy()[order]
        values = column.cast(pa.float64()).fill_null(0.0).to_numpy()[order]
        for code, text in enumerate(encoded.dictionary.to_pylist()):
            rows = slice(int(bounds[code]), int(bounds[code + 1]))
            keep = present[rows]
            key = _tensor_key(name, text)
            if keep.any() and key is not None:
                found[key] = Series(steps[rows][keep], values[rows][keep])
    return found


def _tensor_key(statistic: str, text: str) -> SeriesKey | None:
    layer, role, call_index, expert, format_, granularity = text.split("\x1f")
    number = None if expert == "-1" else int(expert)
    return tensor_key(
        statistic,
        TensorIdentity(layer, role, format_, int(call_index), number, granularity=granularity),
    )


def tensor_key(statistic: str, identity: TensorIdentity) -> SeriesKey | None:
    """The key of a statistic of a tensor; None for what is not compared."""
    if statistic in _NOT_COMPARED:
        return None
    return SeriesKey(
        "nonfinite" if statistic == "nonfinite_count" else statistic,
        identity.layer,
        identity.role,
        identity.call_index,
        -1 if identity.expert is None else identity.expert,
        f"{identity.format}/{identity.granularity}" if statistic in _OF_FORMAT else "",
    )
