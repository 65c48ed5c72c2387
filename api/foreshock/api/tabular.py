"""Tables as bytes on the wire: Arrow, Parquet and CSV, in pieces, however long the table is.

Knows no route and no store. In CSV null is an empty cell; non-finite numbers are words, as in JSON.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.api.bodies import CSV, PARQUET
from foreshock.api.wire import ARROW
from foreshock.monitor.record import encode_number

__all__ = ["TABLE_WRITERS", "csv_lines", "csv_rows", "write_arrow", "write_csv", "write_parquet"]

_PIECE: Final = 256 * 1024


def write_arrow(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """An Arrow IPC stream."""
    sink = _Sink()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        for table in tables:
            writer.write_table(table)
            yield sink.take()
    yield sink.take()


def write_parquet(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """A Parquet file, by way of the disk: its index stands at the end."""
    with tempfile.TemporaryFile() as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        yield from _pieces(file)


def write_csv(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """A header, then one line per row."""
    yield csv_lines([schema.names])
    for table in tables:
        yield csv_rows(table)


def csv_rows(table: pa.Table) -> bytes:
    """The lines of a table, without a header."""
    columns = table.to_pydict().values()
    return csv_lines([map(_cell, row) for row in zip(*columns, strict=True)])


def csv_lines(rows: Iterable[Iterable[object]]) -> bytes:
    """Rows of cells as CSV in UTF-8."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(rows)
    return sink.getvalue().encode()


def _cell(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    return encode_number(value) if isinstance(value, float) else value


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(_PIECE):
        yield piece


class _Sink(io.RawIOBase):
    """Collects what a writer writes until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


TABLE_WRITERS: Final[Mapping[str, Callable[[pa.Schema, Iterable[pa.Table]], Iterator[bytes]]]] = {
    ARROW: write_arrow,
    PARQUET: write_parquet,
    CSV: write_csv,
}
