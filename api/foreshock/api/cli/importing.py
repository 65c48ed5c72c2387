"""`foreshock import`: what people already have becomes runs of a service.

A spool and files of records are sent as they are, logs of others are read first. Everything that is
sent is named by its contents, so that a repeat changes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from foreshock.api.cli.importers import Imported, ImportedRun, ImportProblem, Report, read_logs
from foreshock.api.cli.transfer import (
    Sent,
    TransferError,
    holds_records,
    is_spool,
    launch_of,
    read_records,
    send_spool,
    send_table,
)
from foreshock.monitor.client import Client
from foreshock.monitor.record import records_to_table, write_stream

__all__ = ["Destination", "Reading", "Summary", "import_source", "one_run", "run_name"]

_NOT_A_NAME: Final = re.compile(r"[^A-Za-z0-9._]+")
_LONGEST_NAME: Final = 128
_MOST_RUNS: Final = 20
# Names that every run of a tool has; the folder around them says which run it is.
_ANY_RUN: Final = re.compile(
    r"(trainer_state|events\.out\.tfevents.*|nvdlfw_inspect.*|checkpoint-\d+|metrics|measurements"
    r"|history|logs?|runs|tb|tensorboard|version_\d+|wandb|)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a log of others.

    Attributes:
        format: A name in `importers.FORMATS`, or None to look at the contents.
        chosen: `loss=Train/Loss` items.
        regex: Read lines by this expression.
    """

    format: str | None = None
    chosen: tuple[str, ...] = ()
    regex: str | None = None

    @property
    def asked(self) -> bool:
        """Whether any of it was given."""
        return self.format is not None or bool(self.chosen) or self.regex is not None

    def read(self, source: Path) -> Imported:
        """Read.

        Raises:
            ImportProblem: One line for a person.
        """
        return read_logs(source, format=self.format, chosen=self.chosen, regex=self.regex)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where it goes; without an address nothing is sent.

    Attributes:
        project: Of the runs.
        run: Name of the run; of a log of several runs, the one to take.
        url: Of the service, or None.
        token: For it.
    """

    project: str
    run: str | None = None
    url: str | None = None
    token: str | None = None

    def client(self) -> Client:
        """A client of the service."""
        return Client(self.url, token=self.token, project=self.project, timeout=120)


@dataclass(slots=True)
class Summary:
    """What was read and sent.

    Attributes:
        format: "spool", "records" or the name of the log's format.
        sent: Whether it went to a service.
        runs: Name of each run, with its attempts: records, first and last step, batches in all and
            those that were there already.
        report: Of the reading of a log.
        batches: Sent from a spool.
    """

    format: str
    sent: bool
    runs: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    report: Report | None = None
    batches: int = 0

    def add(self, run: str, table: pa.Table, sent: Sent) -> None:
        """Note an attempt."""
        steps = table["step"]
        self.runs.setdefault(run, []).append(
            {
                "records": table.num_rows,
                "first_step": steps[0].as_py(),
                "last_step": steps[-1].as_py(),
                "batches": sent.batches,
                "repeated_batches": sent.repeats,
            }
        )

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        found: dict[str, Any] = {
            "format": self.format,
            "sent": self.sent,
            "runs": [{"run": run, "attempts": attempts} for run, attempts in self.runs.items()],
        }
        if self.format == "spool":
            found["batches"] = self.batches
        if self.report is not None:
            found |= self.report.as_json()
        return found

    def lines(self) -> list[str]:
        """For people."""
        if self.format == "spool":
            return [f"{self.batches} batches {'sent' if self.sent else 'wait in the spool'}"]
        found = [_run_line(run, attempts) for run, attempts in self.runs.items()]
        if len(found) > _MOST_RUNS:
            found = [*found[:_MOST_RUNS], f"and {len(found) - _MOST_RUNS} more runs"]
        if self.report is not None:
            found = [*self.report.lines(), *found]
        return found if self.sent else [*found, "nothing was sent"]


def _run_line(run: str, attempts: Sequence[Mapping[str, int]]) -> str:
    records = sum(a["records"] for a in attempts)
    repeats = sum(a["repeated_batches"] for a in attempts)
    batches = sum(a["batches"] for a in attempts)
    line = f"{records} records of run {run}"
    if len(attempts) > 1:
        line += f" in {len(attempts)} attempts"
    return line + (f", {repeats} of {batches} batches were there already" if repeats else "")


def import_source(source: Path, reading: Reading, to: Destination) -> Summary:
    """Read and send a spool folder, a file of records, or a log.

    Raises:
        ImportProblem: The log cannot be read.
        TransferError: The service does not take it, or there is nothing to take.
        OSError: A file cannot be read.
    """
    if not source.exists():
        raise TransferError(f"{source} does not exist")
    if source.is_dir() and not reading.asked and is_spool(source):
        return _spool(source, to)
    if source.is_file() and not reading.asked and holds_records(source):
        return _records(source, to)
    return _logs(source, reading, to)


def _spool(source: Path, to: Destination) -> Summary:
    if to.run is not None:
        raise TransferError(f"{source} is a spool; its runs have names, --run does not apply")
    if to.url is None:
        return Summary("spool", False, batches=len(list(source.glob("*/*/*/*.arrow"))))
    return Summary("spool", True, batches=send_spool(source, to.url, to.token))


def _records(source: Path, to: Destination) -> Summary:
    table = read_records(source)
    run = to.run or run_name(source)
    contents = hashlib.sha256(source.read_bytes()).hexdigest()
    announcement = {
        "project": to.project,
        "run": run,
        "launch_id": launch_of(to.project, run, contents),
    }
    summary = Summary("records", to.url is not None)
    with _connected(to) as client:
        summary.add(run, table, _sent(table, announcement, client))
    return summary


def _logs(source: Path, reading: Reading, to: Destination) -> Summary:
    imported = reading.read(source)
    summary = Summary(imported.report.format, to.url is not None, report=imported.report)
    with _connected(to) as client:
        for run, found in _named(source, imported, to.run).items():
            for number, records in enumerate(found.attempts):
                table = records_to_table(records)
                body = _announcement(to, run, number, table)
                body["layers"] = list(
                    dict.fromkeys(t.identity.layer for r in records for t in r.tensors)
                )
                body["config"] = {"imported_from": summary.format}
                summary.add(run, table, _sent(table, body, client))
    return summary


def _announcement(to: Destination, run: str, number: int, table: pa.Table) -> dict[str, object]:
    digest = hashlib.sha256(write_stream(table, compression=None)).hexdigest()
    launch = launch_of(to.project, run, f"{number}/{digest}")
    return {"project": to.project, "run": run, "launch_id": launch}


def _connected(to: Destination) -> AbstractContextManager[Client | None]:
    return nullcontext() if to.url is None else to.client()


def _sent(table: pa.Table, announcement: Mapping[str, object], client: Client | None) -> Sent:
    return Sent(0, 0) if client is None else send_table(table, announcement, client)


def _named(source: Path, imported: Imported, wanted: str | None) -> dict[str, ImportedRun]:
    if len(imported.runs) == 1 and imported.runs[0].name is None:
        return {wanted or run_name(source): imported.runs[0]}
    named: dict[str, ImportedRun] = {}
    for run in imported.runs:
        name = _sanitised(run.name or "run")
        if name in named:
            raise ImportProblem(f"two runs of {source} would both be named {name}")
        named[name] = run
    if wanted is None:
        return named
    chosen = {name: run for name, run in named.items() if wanted in (name, run.name)}
    if not chosen:
        shown = ", ".join(list(named)[:12])
        raise ImportProblem(f"{source} has no run {wanted}; it has {shown}")
    return chosen


def one_run(source: Path, imported: Imported, wanted: str | None = None) -> ImportedRun:
    """The only run of a log, or the wanted one.

    Raises:
        ImportProblem: It has several, or not that one.
    """
    named = _named(source, imported, wanted)
    if len(named) > 1:
        shown = ", ".join(list(named)[:12])
        raise ImportProblem(f"{source} has {len(named)} runs; add @RUN, one of {shown}")
    return next(iter(named.values()))


def run_name(source: Path) -> str:
    """A run's name from the file's, or from the folder around it where any run's file has that."""
    path = source.resolve()
    stems = [
        path.name.split(".")[0] if path.is_file() and "tfevents" not in path.name else path.name
    ]
    stems += [folder.name for folder in path.parents]
    found = next((stem for stem in stems if not _ANY_RUN.match(stem)), "imported")
    return _sanitised(found)


def _sanitised(name: str) -> str:
    cleaned = _NOT_A_NAME.sub("-", name).strip("-") or "run"
    if re.fullmatch(r"[0-9a-f]{32}", cleaned):
        cleaned = f"run-{cleaned}"  # the service takes 32 hexadecimal digits for its own run_id
    return cleaned[:_LONGEST_NAME]
