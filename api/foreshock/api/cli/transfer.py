"""Records between files and a service. Sends what a spool would, so a repeat is recognised."""

from __future__ import annotations

import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from foreshock.monitor.client import Client, ClientError
from foreshock.monitor.record import (
    RecordError,
    conform,
    json_to_table,
    read_stream,
    validate,
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

_ARROW_SUFFIXES: Final = (".arrow", ".arrows")
_PARQUET_MAGIC: Final = b"PAR1"
_BATCH_RECORDS: Final = 64
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


def send_table(table: pa.Table, announcement: Mapping[str, object], client: Client) -> Sent:
    """Send records as one launch.

    Args:
        table: One or more records.
        announcement: Body of POST /runs, without first_step.
        client: Of the service.

    Raises:
        TransferError: The service does not answer or says no.
    """
    members: dict[str, Any] = {**announcement, "first_step": table["step"][0].as_py()}
    launch = str(members["launch_id"])
    repeats = 0
    with _told():
        run_id = client.announce(**members).run_id
        with _progress() as progress:
            firsts = range(0, table.num_rows, _BATCH_RECORDS)
            for sequence, first in enumerate(progress.track(firsts, description="batches")):
                batch = table.slice(first, _BATCH_RECORDS)
                repeats += client.put_batch(run_id, f"{launch}-0-{sequence}", batch).duplicate
        # A log is over: nothing more will come, and nobody need be told so.
        client.end(run_id)
    return Sent(len(firsts), repeats)


@contextmanager
def _told() -> Generator[None]:
    """Turn what a client raises into one line."""
    try:
        yield
    except ClientError as error:
        raise TransferError(str(error)) from None


def _progress() -> Progress:
    return Progress(console=Console(stderr=True))


def fetch_records(client: Client, run: str, target: Path, query: Mapping[str, str | int]) -> int:
    """Write the records of a run to a file, which is there whole or not at all.

    Returns:
        Its size in bytes.

    Raises:
        TransferError: The suffix is unknown, or the service does not answer or says no.
    """
    with client, _told():
        return client.save_records(run, target, **query)


def fetch_table(client: Client, run: str, query: Mapping[str, str | int]) -> pa.Table:
    """The records of a run, conformed and validated.

    Raises:
        TransferError: The service does not answer or says no.
    """
    with _told():
        return validate(conform(client.records(run, **query)))
