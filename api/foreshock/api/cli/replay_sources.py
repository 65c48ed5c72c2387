"""What `foreshock replay` is given: files and folders of past runs, or runs of a service.

Every attempt comes out by itself, in the order of its steps. Scores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from foreshock.api.cli.importers.points import clock
from foreshock.api.cli.importing import Destination, Reading, run_name
from foreshock.api.cli.sides import launch_records, parse_side, registrations
from foreshock.api.cli.transfer import TransferError, holds_records, is_spool, read_records
from foreshock.monitor.client import ClientError
from foreshock.monitor.record import StepRecord, table_to_records

__all__ = ["Source", "read_sources"]

_LOGS: Final = (".csv", ".parquet", ".pq", ".arrow", ".arrows", ".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class Source:
    """One attempt of a run.

    Attributes:
        run: Its name.
        attempt: From 1.
        records: By rising steps.
        timed: Whether their times were measured; a log without any has some made up.
    """

    run: str
    attempt: int
    records: tuple[StepRecord, ...]
    timed: bool = True


def read_sources(given: Sequence[str], reading: Reading, service: Destination) -> Iterator[Source]:
    """Every attempt of everything that was given, one after the other.

    Args:
        given: A file, a spool, a folder of files or of one training, or the name of a run.
        reading: How to read logs of others.
        service: Where names are looked up.

    Raises:
        ImportProblem: A log cannot be read.
        TransferError: There is no such file or run, or nothing in it.
    """
    for text in given:
        path = Path(text)
        if not path.exists():
            yield from _from_service(text, service)
        elif path.is_dir() and not reading.asked and is_spool(path):
            yield from _from_spool(path)
        elif path.is_dir() and (files := _files(path)):
            for file in files:
                yield from _from_file(file, reading)
        else:
            yield from _from_file(path, reading)


def _files(folder: Path) -> list[Path]:
    """Files of one run each that lie in a folder; none in the folder of one training."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _LOGS and p.is_file())
    return [p for p in found if p.name != "trainer_state.json"]


def _from_service(text: str, service: Destination) -> Iterator[Source]:
    side = parse_side(text)
    name = str(side.run)
    if side.attempt is not None:
        numbers = [side.attempt]
    else:
        with service.client() as client:
            try:
                numbers = [attempt.number for attempt in client.run(name).history]
            except ClientError as error:
                raise TransferError(
                    f"{text} is no file or folder here, and as a run: {error}"
                ) from None
    for number in numbers:
        table = parse_side(f"{name}@{number}").load(Reading(), service)
        yield from _attempts(name, [table], first=number)


def _from_spool(root: Path) -> Iterator[Source]:
    launches: dict[str, list[pa.Table]] = {}
    for registration in registrations(root):
        name = registration.parent.parent.name
        table = launch_records(registration.parent)
        if table.num_rows:
            launches.setdefault(name, []).append(table)
    if not launches:
        raise TransferError(f"{root} holds no record")
    for name, tables in launches.items():
        yield from _attempts(name, tables)


def _from_file(path: Path, reading: Reading) -> Iterator[Source]:
    if path.is_file() and not reading.asked and holds_records(path):
        yield from _attempts(run_name(path), [read_records(path)])
        return
    for run in reading.read(path).runs:
        name = run.name or run_name(path)
        for number, records in enumerate(run.attempts, 1):
            if records:
                timed = any(record.time != clock(record.step, None) for record in records)
                yield Source(name, number, records, timed)


def _attempts(name: str, tables: Sequence[pa.Table], *, first: int = 1) -> Iterator[Source]:
    """Launches, taken apart where steps go back: a rollback within one."""
    number = first
    for table in tables:
        records = table_to_records(table)
        start = 0
        for at in range(1, len(records) + 1):
            if at == len(records) or records[at].step <= records[at - 1].step:
                yield Source(name, number, tuple(records[start:at]))
                start, number = at, number + 1
