"""Records as arrays over time, as the diagnosis looks at them.

Reads no store and draws no conclusion.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from foreshock.api.columns import RecordColumns, RecordReader
from foreshock.api.diagnosis import RunWindow
from foreshock.monitor.record import STATISTICS, TensorIdentity

__all__ = ["run_window"]


def run_window(table: pa.Table) -> RunWindow:
    """Records as arrays over time.

    Args:
        table: T records of `SCHEMA`, sorted by step.

    Returns:
        Steps (T,), scalars (T,) each (non-finite ones NaN too) and statistics (T, rows) each, NaN
        where not measured; rows are all tensors that stand in any of the records.
    """
    records = list(RecordReader().read(table))
    names = sorted({name for record in records for name in record.scalars})
    rows: dict[TensorIdentity, int] = {}
    for record in records:
        for identity in record.layout.identities if record.layout is not None else ():
            rows.setdefault(identity, len(rows))
    statistics = {name: np.full((len(records), len(rows)), np.nan) for name in STATISTICS}
    for time, record in enumerate(records):
        _place(statistics, time, record, rows)
    return RunWindow(
        steps=np.array([record.step for record in records], dtype=np.int64),
        scalars={
            name: _finite([record.scalars.get(name, np.nan) for record in records])
            for name in names
        },
        identities=tuple(rows),
        statistics=statistics,
        events=tuple((record.step, event.kind) for record in records for event in record.events),
    )


def _finite(values: list[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    array = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _place(
    statistics: dict[str, np.ndarray[Any, np.dtype[np.float64]]],
    time: int,
    record: RecordColumns,
    rows: dict[TensorIdentity, int],
) -> None:
    if record.layout is None or record.statistics is None:
        return
    place = [rows[identity] for identity in record.layout.identities]
    for name, values in statistics.items():
        measured = record.statistics[name]
        values[time, place] = np.where(np.ma.getmaskarray(measured), np.nan, measured.data)
