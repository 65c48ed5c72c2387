"""What `foreshock compare` is given as a run: a name on the service, a spool, a file, a log.

`NAME@2` is an attempt, `FOLDER@NAME` a run of a spool or of a log of several. Loads, compares
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from foreshock.api.cli.importing import Destination, Reading, one_run
from foreshock.api.cli.transfer import (
    TransferError,
    fetch_table,
    holds_records,
    is_spool,
    read_records,
)
from foreshock.monitor.record import RecordError, conform, read_stream, records_to_table, validate

__all__ = ["Side", "launch_records", "parse_side", "registrations"]

_ATTEMPT = re.compile(r"(?P<rest>.+)@(?P<attempt>\d+)")


@dataclass(frozen=True, slots=True)
class Side:
    """One run to compare.

    Attributes:
        given: As the user wrote it.
        path: A file or folder, or None for a run of the service.
        run: Its name: on the service, or within the file or folder.
        attempt: Counted from 1; None takes the newest at each step.
    """

    given: str
    path: Path | None = None
    run: str | None = None
    attempt: int | None = None

    def load(self, reading: Reading, service: Destination) -> pa.Table:
        """Its records, conformed and validated, attempts in their order.

        Raises:
            ImportProblem: A log cannot be read.
            TransferError: There is no such run, or the service does not answer.
        """
        if self.path is None:
            return self._from_service(service)
        if self.path.is_dir() and not reading.asked and is_spool(self.path):
            return self._from_spool(self.path)
        if self.path.is_file() and not reading.asked and holds_records(self.path):
            if self.run is not None or self.attempt is not None:
                raise TransferError(f"{self.given}: a file of records is one run, @ does not apply")
            return read_records(self.path)
        attempts = one_run(self.path, reading.read(self.path), self.run).attempts
        return self._chosen([records_to_table(records) for records in attempts])

    def _from_service(self, service: Destination) -> pa.Table:
        query = {} if self.attempt is None else {"attempt": self.attempt}
        with service.client() as client:
            try:
                return _filled(self.given, fetch_table(client, str(self.run), query))
            except TransferError as error:
                raise TransferError(
                    f"{self.given} is no file or folder here, and as a run: {error}"
                ) from None

    def _from_spool(self, root: Path) -> pa.Table:
        launches = registrations(root, self.run)
        runs = sorted({path.parent.parent.name for path in launches})
        if len(runs) != 1:
            known = runs or sorted({p.parent.parent.name for p in root.glob("*/*/*/run.json")})
            shown = ", ".join(known[:12])
            raise TransferError(f"{self.given}: name one run as {root}@RUN, of {shown}")
        return self._chosen([t for path in launches if (t := launch_records(path.parent)).num_rows])

    def _chosen(self, attempts: Sequence[pa.Table]) -> pa.Table:
        if self.attempt is not None and not 1 <= self.attempt <= len(attempts):
            raise TransferError(
                f"{self.given}: there is no attempt {self.attempt}, but {len(attempts)}"
            )
        kept = attempts if self.attempt is None else [attempts[self.attempt - 1]]
        if not kept:
            raise TransferError(f"{self.given} holds no record")
        return pa.concat_tables(kept).combine_chunks()


def _filled(given: str, table: pa.Table) -> pa.Table:
    if table.num_rows == 0:
        raise TransferError(f"{given} has no records")
    return table


def registrations(root: Path, run: str | None = None) -> list[Path]:
    """The `run.json` of every launch and rank in a spool, oldest first; None takes all runs."""
    return sorted(root.glob(f"*/{run or '*'}/*/run.json"), key=_made)


def _made(registration: Path) -> tuple[float, str]:
    return registration.stat().st_mtime, str(registration)


def launch_records(folder: Path) -> pa.Table:
    """Sealed batches of one launch and rank, and what its journal holds.

    Raises:
        TransferError: A batch is damaged.
    """
    tables = []
    for path in sorted(folder.glob("*.arrow")):
        try:
            tables.append(read_stream(path.read_bytes()))
        except (RecordError, pa.ArrowException) as error:
            raise TransferError(f"{path}: {str(error).splitlines()[0]}") from None
    tables += [_journal(path) for path in sorted(folder.glob("*.journal"))]
    return validate(conform(pa.concat_tables(tables))) if tables else records_to_table([])


def _journal(path: Path) -> pa.Table:
    """Whole records of a journal; its writer may be at work or dead in the midst of one."""
    batches = []
    try:
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            while True:
                batches.append(reader.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError):
        pass
    return pa.Table.from_batches(batches) if batches else records_to_table([])


def parse_side(text: str) -> Side:
    """What the user wrote, taken apart; a file or folder of that very name goes first.

    Raises:
        TransferError: Nothing is named.
    """
    if not text.strip("@ "):
        raise TransferError("a run has no name")
    if Path(text).exists():
        return Side(text, path=Path(text))
    found = _ATTEMPT.fullmatch(text)
    rest, attempt = (found["rest"], int(found["attempt"])) if found else (text, None)
    if Path(rest).exists():
        return Side(text, path=Path(rest), attempt=attempt)
    before, at, run = rest.rpartition("@")
    if at and before and Path(before).exists():
        return Side(text, path=Path(before), run=run, attempt=attempt)
    if "/" in rest or "\\" in rest:
        raise TransferError(f"{rest} does not exist")
    return Side(text, run=rest, attempt=attempt)
