"""Where records go besides the spool: any callable, in the monitor's worker thread.

A sink that raises is counted and called again with the next record; it never stops the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.monitor.record import SCHEMA, StepRecord, table_to_records

__all__ = ["ClosableSink", "ParquetSink", "Sink", "StepRecordSink"]

Sink = Callable[[pa.RecordBatch], None]
"""Takes one record, a batch of `record.SCHEMA` with one row."""


@runtime_checkable
class ClosableSink(Protocol):
    """A sink that wants to know when the watch ends."""

    def __call__(self, record: pa.RecordBatch, /) -> None:
        """Take one record."""

    def close(self) -> None:
        """No record will follow."""


class StepRecordSink:
    """Hands records to a function as `StepRecord`s: slower, for people and for scorers."""

    def __init__(self, function: Callable[[StepRecord], object]) -> None:
        self._function = function

    def __call__(self, record: pa.RecordBatch, /) -> None:
        """Take one record."""
        for step in table_to_records(pa.Table.from_batches([record])):
            self._function(step)


class ParquetSink:
    """Writes records to one Parquet file, which is whole only once the watch is closed.

    Args:
        path: The file, overwritten.
        rows: Records per row group.

    Raises:
        OSError: The file cannot be made.
        ValueError: rows is below 1.
    """

    def __init__(self, path: Path | str, *, rows: int = 256) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; allowed: 1 or more")
        self._writer = pq.ParquetWriter(Path(path), SCHEMA, compression="zstd")
        self._rows = rows
        self._pending: list[pa.RecordBatch] = []

    def __call__(self, record: pa.RecordBatch, /) -> None:
        """Take one record."""
        self._pending.append(record)
        if len(self._pending) >= self._rows:
            self._write()

    def close(self) -> None:
        """Write what is left and finish the file."""
        self._write()
        self._writer.close()

    def _write(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending, SCHEMA))
            self._pending = []
