"""Records between files and a service. Sends what a spool would, so a repeat is recognised."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
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

__all__ = [
    "Sent",
    "TransferError",
    "fetch_records",
    "fetch_table",
    "holds_records",
    "is_spool",
    "launch_of",
    "read_records",
    "send_spool",
    "send_table",
]

_ARROW: Final = "application/vnd.apache.arrow.stream"
_MEDIA_TYPES: Final = {
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": _ARROW,
    ".csv": "text/csv",
    ".json": "application/json",
}
_ARROW_SUFFIXES: Final = (".arrow", ".arrows")
_PARQUET_MAGIC: Final = b"PAR1"
_BATCH_RECORDS: Final = 64
_TRIES: Final = 8
_NAMESPACE: Final = uuid.UUID("6f2d2c1e-6a0f-4d0b-9a7c-0d6f3a3c5b11")


class TransferError(Exception):
    """What went wrong, in one line."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a table of records.

    Attributes:
        batches: All of them.
        repeats: Those that were there already.
    """

    batches: int
    repeats: int


def is_spool(root: Path) -> bool:
    """Whether a folder is one that a watched job writes to."""
    return any(root.glob("*/*/*/run.json"))


def send_spool(root: Path, url: str, token: str | None) -> int:
    """Send all that ended processes left in a spool, oldest launch first.

    Returns:
        The number of batches.

    Raises:
        TransferError: Something had to stay.
    """
    try:
        service = Service(url, token=token)
    except ValueError as error:
        raise TransferError(str(error)) from None
    try:
        with _progress() as progress:
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
    return shipped.batches


def holds_records(path: Path) -> bool:
    """Whether a file holds records of ours rather than somebody's log; by its contents.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(256)
    if head.startswith(_PARQUET_MAGIC):
        try:
            names = pq.read_schema(path).names
        except pa.ArrowException:
            return False
        return bool({"scalars", "tensors"} & set(names))
    if path.suffix in _ARROW_SUFFIXES:
        return True
    return head.lstrip().startswith(b"{") and b'"records"' in head


def read_records(path: Path) -> pa.Table:
    """A file of records: Parquet, Arrow or JSON.

    Raises:
        TransferError: It is none, or holds none.
    """
    try:
        table = _read(path)
    except (RecordError, pa.ArrowException) as error:
        raise TransferError(f"{path}: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise TransferError(f"{path} holds no record")
    return table


def _read(path: Path) -> pa.Table:
    if path.suffix in _ARROW_SUFFIXES:
        return read_stream(path.read_bytes())
    if path.suffix == ".json":
        return json_to_table(path.read_bytes())
    return validate(conform(pq.read_table(path)))


def launch_of(project: str, run: str, contents: str) -> str:
    """The launch_id of what is imported: the same contents and name are the same launch.

    Args:
        project: Its project.
        run: Its name.
        contents: A digest.
    """
    return str(uuid.uuid5(_NAMESPACE, f"{project}/{run}/{contents}"))


def send_table(table: pa.Table, announcement: Mapping[str, object], client: httpx.Client) -> Sent:
    """Send records as one launch.

    Args:
        table: One or more records.
        announcement: Body of POST /runs, without first_step.
        client: Of the service.

    Raises:
        TransferError: The service does not answer or says no.
    """
    body = {**announcement, "first_step": table["step"][0].as_py()}
    run_id = _answered(client, "POST", "runs", json=body).json()["run_id"]
    launch = announcement["launch_id"]
    repeats = 0
    with _progress() as progress:
        firsts = range(0, table.num_rows, _BATCH_RECORDS)
        for sequence, first in enumerate(progress.track(firsts, description="batches")):
            # Not compressed: the same records give the same bytes on every machine.
            batch = write_stream(table.slice(first, _BATCH_RECORDS), compression=None)
            address = f"runs/{run_id}/batches/{launch}-0-{sequence}"
            headers = {"Content-Type": _ARROW}
            answer = _answered(client, "PUT", address, content=batch, headers=headers)
            repeats += answer.json()["duplicate"]
    return Sent(len(firsts), repeats)


def _progress() -> Progress:
    return Progress(console=Console(stderr=True))


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


def fetch_table(client: httpx.Client, run: str, query: Mapping[str, str | int]) -> pa.Table:
    """The records of a run, conformed and validated.

    Raises:
        TransferError: The service does not answer or says no.
    """
    return read_stream(b"".join(_streamed(client, run, _ARROW, query)))


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
