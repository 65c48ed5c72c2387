"""Records between files and a service. Sends what a spool would, so a repeat is recognised."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from foreshock.monitor.record import (
    RecordError,
    conform,
    json_to_table,
    read_stream,
    validate,
    write_stream,
)
from foreshock.monitor.shipping import Service, ship_leftovers

__all__ = ["TransferError", "fetch_records", "send_file", "send_spool"]

_ARROW: Final = "application/vnd.apache.arrow.stream"
_MEDIA_TYPES: Final = {
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": _ARROW,
    ".csv": "text/csv",
    ".json": "application/json",
}
_BATCH_RECORDS: Final = 64
_TRIES: Final = 8
_NAMESPACE: Final = uuid.UUID("6f2d2c1e-6a0f-4d0b-9a7c-0d6f3a3c5b11")


class TransferError(Exception):
    """What went wrong, in one line."""


def send_spool(root: Path, url: str, token: str | None) -> str:
    """Send all that ended processes left in a spool, oldest launch first.

    Raises:
        TransferError: There is no spool, or something had to stay.
    """
    if not any(root.glob("*/*/*/run.json")):
        raise TransferError(f"{root} holds no spool (<project>/<run>/<launch>-<rank>/run.json)")
    try:
        service = Service(url, token=token)
    except ValueError as error:
        raise TransferError(str(error)) from None
    try:
        with Progress() as progress:
            task = progress.add_task("batches", total=None)
            shipped = ship_leftovers(
                service, root, progress=lambda _: progress.update(task, advance=1)
            )
    finally:
        service.close()
    if shipped.waiting or shipped.refused:
        raise TransferError(
            f"{shipped.batches} batches sent, {shipped.waiting} wait, {shipped.refused} refused: "
            f"{shipped.reason}"
        )
    return f"{shipped.batches} batches sent"


def send_file(path: Path, *, project: str, run: str, client: httpx.Client) -> str:
    """Send a file of records as one launch of a run.

    The launch_id follows from the contents and the name, so that a repeat is the same launch.

    Raises:
        TransferError: The file is no file of records, or the service refuses it.
    """
    contents = hashlib.sha256(path.read_bytes()).hexdigest()
    launch = str(uuid.uuid5(_NAMESPACE, f"{project}/{run}/{contents}"))
    try:
        table = _read(path)
    except (RecordError, pa.ArrowException) as error:
        raise TransferError(f"{path}: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise TransferError(f"{path} holds no record")
    announcement = {
        "project": project,
        "run": run,
        "launch_id": launch,
        "first_step": table["step"][0].as_py(),
    }
    with client:
        run_id = _answered(client, "POST", "runs", json=announcement).json()["run_id"]
        repeats = 0
        with Progress() as progress:
            batches = range(0, table.num_rows, _BATCH_RECORDS)
            for sequence, first in enumerate(progress.track(batches, description="batches")):
                # Not compressed: the same records give the same bytes on every machine.
                body = write_stream(table.slice(first, _BATCH_RECORDS), compression=None)
                address = f"runs/{run_id}/batches/{launch}-0-{sequence}"
                headers = {"Content-Type": _ARROW}
                answer = _answered(client, "PUT", address, content=body, headers=headers)
                repeats += answer.json()["duplicate"]
    known = f", {repeats} of {len(batches)} batches were there already" if repeats else ""
    return f"{table.num_rows} records of run {run}{known}"


def _read(path: Path) -> pa.Table:
    if path.suffix == ".parquet":
        return validate(conform(pq.read_table(path)))
    if path.suffix in (".arrow", ".arrows"):
        return read_stream(path.read_bytes())
    if path.suffix == ".json":
        return json_to_table(path.read_bytes())
    raise TransferError(f"{path} is none of: a spool folder, .parquet, .arrow, .json")


def _answered(
    client: httpx.Client,
    method: str,
    address: str,
    *,
    json: Mapping[str, object] | None = None,
    content: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> httpx.Response:
    """Ask until the service is not too busy.

    Raises:
        TransferError: It does not answer, or says no.
    """
    for attempt in range(_TRIES):
        try:
            response = client.request(method, address, json=json, content=content, headers=headers)
        except httpx.TransportError as error:
            raise TransferError(f"{client.base_url} does not answer: {error}") from None
        if response.status_code != 503:
            break
        time.sleep(0.1 * 2**attempt)
    if not response.is_success:
        raise TransferError(_reason(response))
    return response


def _reason(response: httpx.Response) -> str:
    try:
        return f"{response.status_code}: {response.json()['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code}: {response.text[:200]}"


def fetch_records(
    client: httpx.Client, run: str, target: Path, query: Mapping[str, str | int]
) -> int:
    """Write the records of a run to a file, which is there whole or not at all.

    Returns:
        Its size in bytes.

    Raises:
        TransferError: The suffix is unknown, or the service does not answer or says no.
    """
    media_type = _MEDIA_TYPES.get(target.suffix)
    if media_type is None:
        raise TransferError(f"{target} is none of: {', '.join(_MEDIA_TYPES)}")
    partial = target.with_name(target.name + ".partial")
    try:
        with client, partial.open("wb") as file:
            for piece in _streamed(client, run, media_type, query):
                file.write(piece)
        size = partial.stat().st_size
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _streamed(
    client: httpx.Client, run: str, media_type: str, query: Mapping[str, str | int]
) -> Iterator[bytes]:
    address = f"runs/{run}/records"
    headers = {"Accept": media_type}
    try:
        with client.stream("GET", address, params=dict(query), headers=headers) as response:
            if not response.is_success:
                response.read()
                raise TransferError(_reason(response))
            yield from response.iter_bytes()
    except httpx.TransportError as error:
        raise TransferError(f"{client.base_url} does not answer: {error}") from None
