"""The spool of training jobs: what waits in it, what was refused, and the disk it is on."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from foreshock.api.cli.checkup.findings import Finding, note, ok, wrong

__all__ = ["check_disk_of", "check_spool"]

_MEBIBYTE: Final = 1024 * 1024
_SPOOL_BYTES: Final = 1024 * _MEBIBYTE
_LEAST_BYTES: Final = 128 * _MEBIBYTE
_SLOW_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class _Box:
    """The folder of one launch and rank.

    Attributes:
        folder: `<project>/<run>/<launch_id>-<rank>`.
        held: Whether a process is writing to it.
        waiting: Batches not sent yet, journals included.
        bytes: Their size.
        oldest: Seconds since the oldest of them was written.
        refused: Batches that the service did not take.
    """

    folder: Path
    held: bool
    waiting: int
    bytes: int
    oldest: float
    refused: int


def check_spool(environment: Mapping[str, str], *, sending: bool) -> Iterator[Finding]:
    """Look at the spool that jobs started from here use.

    Args:
        environment: Holds FORESHOCK_SPOOL, or not.
        sending: Whether they have a service to send to.
    """
    root = Path(environment.get("FORESHOCK_SPOOL") or "foreshock-spool").absolute()
    yield _writable(root)
    yield from check_disk_of("spool's disk", root, _LEAST_BYTES, _SPOOL_BYTES)
    boxes = [_look(path.parent) for path in sorted(root.glob("*/*/*/run.json"))]
    yield from _left(root, [box for box in boxes if not box.held and box.waiting], sending)
    yield from _stuck([box for box in boxes if box.held and box.oldest > _SLOW_SECONDS], sending)
    for box in boxes:
        if box.refused:
            yield _refusal(box)
    if not any(box.waiting or box.refused for box in boxes):
        yield ok("spool", f"{root}: nothing waits")


def _writable(root: Path) -> Finding:
    place = _existing(root)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return wrong(
            "spool",
            f"{root} cannot be written: {error.strerror} ({place})",
            "set FORESHOCK_SPOOL to a folder on a local disk that the job may write to",
        )
    return ok("spool", f"{root} can be written")


def check_disk_of(check: str, path: Path, least: int, wanted: int) -> Iterator[Finding]:
    """How much room the disk of a path has.

    Args:
        check: Name of the finding.
        path: Need not exist.
        least: Bytes below which something fails.
        wanted: Bytes below which it soon may.
    """
    free = shutil.disk_usage(_existing(path)).free
    text = f"{free / 2**30:.1f} GiB free"
    remedy = "make room, or move it to another disk"
    if free < least:
        yield wrong(check, f"{text}, {least / 2**20:.0f} MiB are needed", remedy)
    elif free < wanted:
        yield note(check, f"{text}, {wanted / 2**20:.0f} MiB may be used", remedy)
    else:
        yield ok(check, text)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.is_dir())


def _look(folder: Path) -> _Box:
    waiting = [*folder.glob("*.arrow"), *folder.glob("*.journal")]
    sizes = [found for path in waiting if (found := _stat(path)) is not None]
    now = time.time()
    return _Box(
        folder=folder,
        held=_held(folder / "lock"),
        waiting=len(sizes),
        bytes=sum(found.st_size for found in sizes),
        oldest=max((now - found.st_mtime for found in sizes), default=0.0),
        refused=len(list((folder / "refused").glob("*.arrow"))),
    )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # sent in the meantime
        return None


def _held(lock: Path) -> bool:
    """Whether a writer holds the lock; asked for in common, and let go at once."""
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(file)


def _left(root: Path, boxes: list[_Box], sending: bool) -> Iterator[Finding]:
    if not boxes:
        return
    batches, size = sum(box.waiting for box in boxes), sum(box.bytes for box in boxes)
    runs = ", ".join(sorted({box.folder.parent.name for box in boxes})[:3])
    text = f"{batches} batches ({size / 2**20:.1f} MiB) wait that no process sends: {runs}"
    if sending:
        yield wrong("spool", text, f"foreshock import {root}")
    else:
        yield note("spool", text, f"when there is a service: foreshock import {root} --url ADDRESS")


def _stuck(boxes: list[_Box], sending: bool) -> Iterator[Finding]:
    for box in boxes if sending else ():
        yield wrong(
            "spool",
            f"run {box.folder.parent.name} goes on, but a batch has waited for "
            f"{box.oldest / 60:.0f} minutes",
            "the service does not take it: look at the findings on the service below, and at the "
            "job's log",
        )


def _refusal(box: _Box) -> Finding:
    newest = max((box.folder / "refused").glob("*.reason.txt"), default=None)
    reason = "no reason was kept" if newest is None else newest.read_text(errors="replace").strip()
    return wrong(
        "spool",
        f"the service refused {box.refused} batches of run {box.folder.parent.name}: {reason}",
        f"they are kept in {box.folder / 'refused'}; different versions of job and service?",
    )
