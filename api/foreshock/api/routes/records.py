"""Read whole records back: Arrow, Parquet, CSV or JSON, whatever Accept asks for."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import IO, Annotated, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from fastapi import APIRouter, Header
from fastapi.responses import StreamingResponse

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import CSV, PARQUET, RECORDS_ANSWER
from foreshock.api.openapi import errors
from foreshock.api.problems import Problem
from foreshock.api.routes.parameters import SelectionDep
from foreshock.api.services import ServicesDep
from foreshock.api.store import Store, View
from foreshock.api.store_rows import widen
from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import SCHEMA, encode_number, records_to_json, table_to_records

__all__ = ["router"]

router = APIRouter(tags=["reading"])

_PIECE: Final = 256 * 1024


@router.get(
    "/runs/{run}/records",
    response_class=StreamingResponse,
    dependencies=[READ],
    responses=errors(406, also={200: {"content": RECORDS_ANSWER}}),
)
def get_run_records(
    chosen: SelectionDep,
    services: ServicesDep,
    accept: Annotated[str, Header(include_in_schema=False)] = "*/*",
) -> StreamingResponse:
    """Records by step, as stored. CSV holds the scalars only, one column each."""
    media_type = _chosen(accept)
    body = _WRITERS[media_type](services.store, chosen.view)
    return StreamingResponse(body, media_type=media_type)


def _chosen(accept: str) -> str:
    wanted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    for name in wanted:
        if name in _WRITERS:
            return name
        if name in ("*/*", "application/*", ""):
            return JSON
    raise Problem(406, f"records come as {', '.join(_WRITERS)}")


def _arrow(store: Store, view: View) -> Iterator[bytes]:
    sink = _Sink()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, SCHEMA, options=options) as writer:
        for table in store.record_chunks(view):
            writer.write_table(table)
            yield sink.take()
    yield sink.take()


def _parquet(store: Store, view: View) -> Iterator[bytes]:
    with tempfile.TemporaryFile() as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
            for table in store.record_chunks(view):
                writer.write_table(table)
        yield from _pieces(file)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(_PIECE):
        yield piece


def _csv(store: Store, view: View) -> Iterator[bytes]:
    names = store.scalar_names(view.run_id)
    yield _csv_lines([["step", "time", *names]])
    for steps, scalars in store.scalar_chunks(view):
        columns = widen(steps, scalars, names).to_pydict().values()
        yield _csv_lines([map(_csv_value, row) for row in zip(*columns, strict=True)])


def _csv_lines(rows: Iterable[Iterable[object]]) -> bytes:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(rows)
    return sink.getvalue().encode()


def _csv_value(value: object) -> object:
    """A cell: empty for not measured, non-finite numbers as in JSON."""
    if isinstance(value, datetime):
        return value.isoformat()
    return encode_number(value) if isinstance(value, float) else value


def _json(store: Store, view: View) -> Iterator[bytes]:
    opening = b'{"records":['
    between = opening
    for table in store.record_chunks(view):
        whole = records_to_json(table_to_records(table))
        yield between + whole[len(opening) : -len(b"]}")]
        between = b","
    yield opening + b"]}" if between == opening else b"]}"


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


_WRITERS: Final[dict[str, Callable[[Store, View], Iterator[bytes]]]] = {
    JSON: _json,
    ARROW: _arrow,
    PARQUET: _parquet,
    CSV: _csv,
}
