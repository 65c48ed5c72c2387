"""A queue on disk that outlives the process: records in, sealed batches out.

Layout: `<root>/<project>/<run>/<launch_id>-<rank>/` with `run.json` (the body that makes the run
known to the service), `lock` (held by the writer), one open journal, and sealed batches named by
their sequence. Sends nothing itself. Survives the end of the process at any instruction; a power
cut may cost what the system had not written yet.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import pyarrow as pa

from foreshock.monitor.record import SCHEMA, write_stream

__all__ = ["DEFAULT_MAX_BYTES", "NAME_PATTERN", "Outbox", "Spool", "SpoolError", "leftovers"]

_LOGGER = logging.getLogger("foreshock.monitor")

DEFAULT_MAX_BYTES: Final = 2**30
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SEALED: Final = re.compile(r"(\d{10})\.arrow")
_JOURNAL: Final = re.compile(r"(\d{10})\.journal")
_SEAL_RECORDS: Final = 64
_SEAL_SECONDS: Final = 1.0
# Records kept in memory when nothing can be sealed because the disk is full.
_UNSEALED_RECORDS: Final = 1024
_SECONDS_AFTER_FAILURE: Final = 5.0
_SECONDS_BETWEEN_WARNINGS: Final = 60.0
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SpoolError(ValueError):
    """A folder is no spool, or is in use."""


@dataclass(frozen=True, slots=True)
class Outbox:
    """The folder of one launch and rank, as its shipper sees it."""

    folder: Path

    @property
    def project(self) -> str:
        """Name of the project."""
        return self.folder.parent.parent.name

    @property
    def run(self) -> str:
        """Name of the run."""
        return self.folder.parent.name

    def registration(self) -> dict[str, object]:
        """The body of POST /runs.

        Raises:
            SpoolError: `run.json` is missing or damaged.
        """
        path = self.folder / "run.json"
        try:
            body = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise SpoolError(f"{path} cannot be read ({error}); is this a spool?") from None
        if not isinstance(body, dict):
            raise SpoolError(f"{path} is not a JSON object")
        return body

    def sealed(self) -> list[Path]:
        """Sealed batches, oldest first."""
        return _matching(self.folder, _SEALED)

    def batch_id(self, path: Path) -> str:
        """The id of a sealed batch: `{launch_id}-{rank}-{sequence}`."""
        return f"{self.folder.name}-{int(path.stem)}"

    def refuse(self, path: Path, reason: str) -> None:
        """Put a batch that the service will never take aside, with the reason beside it."""
        aside = self.folder / "refused"
        aside.mkdir(exist_ok=True)
        (aside / f"{path.name}.reason.txt").write_text(reason + "\n")
        path.replace(aside / path.name)

    def remove_if_empty(self) -> None:
        """Remove the folder when nothing in it waits for anybody, unless somebody else has."""
        try:
            kept = {path.name for path in self.folder.iterdir()} - {"run.json", "lock"}
            if not kept:
                (self.folder / "run.json").unlink(missing_ok=True)
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()
        except FileNotFoundError:
            return


class Spool:
    """The writer of one outbox; used by one thread.

    Args:
        root: Folder of all spools.
        registration: Body of POST /runs; project, run and launch_id name the folder.
        rank: Global rank.
        max_bytes: Bound on the sealed batches of this launch; the oldest goes first. What older
            launches left under the same root is subtracted, down to an eighth of the bound.

    Attributes:
        outbox: Where the sealed batches are.

    Raises:
        ValueError: A name does not fit `NAME_PATTERN`, or max_bytes is not positive.
        OSError: The folder cannot be made.
    """

    def __init__(
        self,
        root: Path,
        registration: Mapping[str, object],
        *,
        rank: int = 0,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        names = [_checked_name(registration, key) for key in ("project", "run", "launch_id")]
        if max_bytes <= 0:
            raise ValueError(f"max_bytes is {max_bytes}; allowed: 1 or more")
        folder = Path(root) / names[0] / names[1] / f"{names[2]}-{rank}"
        taken = _bytes_under(Path(root))
        folder.mkdir(parents=True, exist_ok=True)
        self.outbox = Outbox(folder)
        self._lock = _Lock.take(folder)
        _write_whole(folder / "run.json", json.dumps(dict(registration)).encode())
        self._max_bytes = max(max_bytes - taken, max_bytes // 8, 1)
        self._batches: deque[_Sealed] = deque()
        self._sequence = 0
        self._journal: _Journal | None = None
        self._unsealed: list[pa.RecordBatch] = []
        self._due = 0.0
        self._dropped = 0
        self._failed = False
        self._warned = -float("inf")

    def append(self, record: pa.RecordBatch) -> None:
        """Add a record. A full disk costs records, which are counted, and raises nothing."""
        if len(self._unsealed) >= _UNSEALED_RECORDS:
            self._dropped += record.num_rows
            return
        if not self._unsealed:
            self._due = time.monotonic() + _SEAL_SECONDS
        self._unsealed.append(record)
        try:
            if self._journal is None:
                path = self.outbox.folder / f"{self._sequence:010d}.journal"
                self._journal = _Journal(path)
            self._journal.append(record)
        except OSError as error:
            # Still in memory: lost only if the process dies before the batch is sealed.
            if error.errno in _FULL:
                self._drop_oldest()

    def seal_if_due(self) -> bool:
        """Seal the open batch when it holds 64 records or is a second old."""
        if not self._failed and len(self._unsealed) >= _SEAL_RECORDS:
            return self.seal()
        return bool(self._unsealed) and time.monotonic() >= self._due and self.seal()

    def seal(self) -> bool:
        """Turn the open batch into a file whose bytes never change; True if there is one more."""
        if not self._unsealed:
            return False
        body = _stream_of(self._unsealed)
        path = self.outbox.folder / f"{self._sequence:010d}.arrow"
        self._failed = not self._written(path, body)
        if self._failed:
            self._warn()
            self._due = time.monotonic() + _SECONDS_AFTER_FAILURE
            return False
        self._batches.append(_Sealed(path, len(body), len(self._unsealed)))
        if self._journal is not None:
            self._journal.remove()
        self._journal, self._unsealed = None, []
        self._sequence += 1
        while self._total() > self._max_bytes and self._drop_oldest():
            pass
        return True

    @property
    def unsealed(self) -> int:
        """Records that are not in a sealed batch."""
        return len(self._unsealed)

    def take_dropped(self) -> int:
        """Records lost since the last call, for an event in the next record."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def close(self) -> bool:
        """Seal what is open and let go of the folder, which goes if it is empty.

        Returns:
            False if the disk did not take the last records; a journal may hold some of them.
        """
        self.seal()
        lost = len(self._unsealed)
        if lost:
            _LOGGER.error("%s did not take the last %d records", self.outbox.folder, lost)
        if self._journal is not None:
            self._journal.close()
        if not self.outbox.sealed():
            self.outbox.remove_if_empty()
        self._lock.release()
        return not lost

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned >= _SECONDS_BETWEEN_WARNINGS:
            self._warned = now
            _LOGGER.warning(
                "%s takes no records (is the disk full?); %d are kept in memory",
                self.outbox.folder,
                _UNSEALED_RECORDS,
            )

    def _written(self, path: Path, body: bytes) -> bool:
        """Write a batch, giving up the oldest ones while the disk is full."""
        while True:
            try:
                _write_whole(path, body)
            except OSError as error:
                if error.errno in _FULL and self._drop_oldest():
                    continue
                return False
            return True

    def _total(self) -> int:
        while self._batches and not self._batches[0].path.exists():
            self._batches.popleft()
        return sum(batch.size for batch in self._batches)

    def _drop_oldest(self) -> bool:
        while self._batches:
            batch = self._batches.popleft()
            # If the shipper has sent it in the meantime, nothing is lost.
            if _unlink(batch.path):
                self._dropped += batch.records
                return True
        return False


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A batch that this process sealed."""

    path: Path
    size: int
    records: int


class _Journal:
    """Records appended one by one, each whole in the file or not at all once it is read back.

    An Arrow IPC stream without its end mark, written message by message, so that a full disk can
    be met by cutting the torn message off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size = 0
        self._has_schema = False

    def append(self, record: pa.RecordBatch) -> None:
        """Write one record.

        Raises:
            OSError: Nothing of it is in the file.
        """
        schema = b"" if self._has_schema else SCHEMA.serialize().to_pybytes()
        message = schema + record.serialize().to_pybytes()
        written = 0
        try:
            while written < len(message):
                written += os.pwrite(self._file, message[written:], self._size + written)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += written
        self._has_schema = True

    def close(self) -> None:
        """Close the file and leave it."""
        os.close(self._file)

    def remove(self) -> None:
        """Close and delete the file."""
        os.close(self._file)
        _unlink(self._path)


class _Lock:
    """An exclusive lock on an outbox, gone with the process that holds it."""

    def __init__(self, file: int) -> None:
        self._file = file

    @classmethod
    def take(cls, folder: Path) -> Self:
        """Lock a folder.

        Raises:
            SpoolError: Somebody else holds it.
        """
        path = folder / "lock"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the folder while we opened the file.
            if not path.exists() or os.fstat(file).st_ino != path.stat().st_ino:
                raise FileNotFoundError(path)
        except OSError as error:
            os.close(file)
            raise SpoolError(f"{folder} is in use by another process ({error})") from None
        return cls(file)

    def release(self) -> None:
        """Let go."""
        os.close(self._file)


def leftovers(root: Path) -> Iterator[Outbox]:
    """What processes that ended left under a root, oldest launch first, journals recovered.

    Each outbox is locked until the next one is asked for; those in use are passed over.
    """
    folders = [path.parent for path in Path(root).glob("*/*/*/run.json")]
    for folder in sorted(folders, key=_age):
        try:
            lock = _Lock.take(folder)
        except (SpoolError, OSError):
            continue
        try:
            outbox = Outbox(folder)
            _recover(outbox)
            yield outbox
        finally:
            lock.release()


def _age(folder: Path) -> tuple[float, str]:
    try:
        return (folder / "run.json").stat().st_mtime, str(folder)
    except OSError:
        return 0.0, str(folder)


def _recover(outbox: Outbox) -> None:
    """Seal what a dead writer's journal holds, up to the record it died in."""
    for journal in _matching(outbox.folder, _JOURNAL):
        path = journal.with_suffix(".arrow")
        records = [] if path.exists() else _read_journal(journal)
        if records:
            _write_whole(path, _stream_of(records))
        _unlink(journal)
    for torn in outbox.folder.glob("*.part"):
        _unlink(torn)


def _read_journal(path: Path) -> list[pa.RecordBatch]:
    records = []
    try:
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            while True:
                records.append(reader.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError, EOFError):
        return records


def _stream_of(records: list[pa.RecordBatch]) -> bytes:
    return write_stream(pa.Table.from_batches(records, SCHEMA))


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except FileNotFoundError:
        return []


def _write_whole(path: Path, body: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(".part")
    try:
        part.write_bytes(body)
        part.replace(path)
    except OSError:
        _unlink(part)
        raise


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _bytes_under(root: Path) -> int:
    files = (*root.glob("*/*/*/*.arrow"), *root.glob("*/*/*/*.journal"))
    return sum(path.stat().st_size for path in files if path.exists())


def _checked_name(registration: Mapping[str, object], key: str) -> str:
    value = registration.get(key)
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value) or set(value) == {"."}:
        raise ValueError(
            f"{key} is {value!r}; allowed: 1 to 128 of A-Z a-z 0-9 . _ - and not only dots"
        )
    return value
