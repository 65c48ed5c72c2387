"""Faults of the write path under clients that take notes; each ends with a count."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pyarrow as pa

from foreshock.api.registry import Registry
from foreshock.api.store import View
from foreshock.api.store_open import open_store
from foreshock.api.store_url import parse_store
from foreshock.monitor.record import record_batch
from foreshock.monitor.shipping import Service as Destination
from foreshock.monitor.shipping import Shipper
from foreshock.monitor.spool import Spool
from tests.api.client_log import Clients, Tally, count
from tests.api.service import Service, new_launch

PATIENCE = 120.0
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until it holds, however slow the machine is."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def ready(service: Service) -> bool:
    """Whether the service says that it takes requests."""
    return httpx.get(f"{service.url}/readyz", timeout=60).status_code == 200


def through(service: Service, spoil: Callable[[], None], mend: Callable[[], None]) -> Tally:
    """Clients send, something breaks, nothing is taken any more, it is mended, all goes on."""
    clients = Clients(service)
    with clients.sending():
        clients.wait_for_more()
        spoil()
        wait_for(lambda: not ready(service) or clients.stand_still(), "the fault was not noticed")
        mend()
        wait_for(lambda: ready(service), "the service did not come back")
        clients.wait_for_more()
    assert service.stop() == 0, service.log
    return count(service.data, clients.logs)


def nearly_full_disk(folder: Path, margin: int = 2**30) -> Tally:
    """Another program fills the disk up to the space that the service keeps free; then it goes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    service = Service(folder, environment={"FORESHOCK_MIN_FREE_BYTES": str(free - margin)})
    service.start()
    ballast = folder / "ballast"

    def fill() -> None:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 2 * margin)

    return through(service, fill, ballast.unlink)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own in memory; needs root."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder: Path) -> Tally:
    """The disk is full to the last byte, without any space kept free, and is freed again."""
    with small_disk(folder / "small", 300) as disk:
        service = Service(disk, environment={"FORESHOCK_MIN_FREE_BYTES": "1"})
        service.start()
        ballast = disk / "ballast"

        def fill() -> None:
            with ballast.open("wb") as file:
                try:
                    while True:
                        file.write(bytes(2**16))
                        file.flush()
                except OSError:
                    pass

        return through(service, fill, ballast.unlink)


def read_only_disk(folder: Path) -> Tally:
    """No new file can be made under the store for a while (its folders are immutable)."""
    service = Service(folder)
    service.start()

    def mark(sign: str) -> None:
        command = ["chattr", "-R", f"{sign}i", str(service.data / "store")]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)

    try:
        return through(service, lambda: mark("+"), lambda: mark("-"))
    finally:
        mark("-")


def clock_jumps(folder: Path) -> Tally:
    """The system's clock goes a day ahead and two back under a running service (libfaketime)."""
    offset = folder / "offset"
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    service = Service(folder, environment=environment)
    service.start()
    clients = Clients(service)
    with clients.sending():
        for jump in ("+86400", "-86400", "+0", "-3600"):
            clients.wait_for_more()
            offset.write_text(jump)
        clients.wait_for_more()
        assert ready(service)
    assert service.stop() == 0, service.log
    return count(service.data, clients.logs)


HANGING = """
import time
from pathlib import Path
from foreshock.api import store_engine, store_watch
store_watch._GRACE_SECONDS = 0.5
insert = store_engine.Writer.insert
def hanging(self, *arguments):
    with self._watched():
        while Path({file!r}).exists():
            time.sleep(0.05)
    insert(self, *arguments)
store_engine.Writer.insert = hanging
"""


def hung_store(folder: Path) -> tuple[Tally, list[str]]:
    """An INSERT that does not come back within its limit of a second; what health said then."""
    file = folder / "hang"
    environment = {"FORESHOCK_QUERY_SECONDS": "1"}
    service = Service(folder, environment=environment, before=HANGING.format(file=str(file)))
    service.start()
    said: list[str] = []

    def health() -> bool:
        answer = httpx.get(f"{service.url}/healthz", timeout=60)
        said.extend(answer.json()["reasons"])
        return answer.status_code == 200

    def hang() -> None:
        file.touch()
        wait_for(lambda: not health(), "health did not fail")

    tally = through(service, hang, file.unlink)
    return tally, said


@dataclass(frozen=True)
class Outage:
    """What became of the records of a job through an outage of its service.

    Attributes:
        written: Steps that the job recorded.
        stored: Of them, those that the service has in the end.
        dropped: Records that the spool counted as dropped for want of room.
        doubled: Steps that the service has more than once.
        most_bytes: Largest size of the spool.
    """

    written: int
    stored: int
    dropped: int
    doubled: int
    most_bytes: int


def outage(folder: Path, *, hours: float, max_bytes: int) -> Outage:
    """A job records a step a second, for so long as its service is away, without the waiting."""
    service = Service(folder)
    service.start()
    launch = new_launch()
    body = {"project": "default", "run": "outage", "launch_id": launch, "layers": []}
    root = folder / "spool"
    spool = Spool(root, body, max_bytes=max_bytes)
    shipper = Shipper(Destination(service.url), spool.outbox)
    for step in range(10):
        spool.append(_second(step))
    spool.seal()
    wait_for(lambda: not spool.outbox.sealed(), "the first batch was not shipped")
    service.kill()
    steps, most = round(3600 * hours) + 10, 0
    for step in range(10, steps):
        spool.append(_second(step))
        if step % 30 == 0:
            spool.seal()
            shipper.notify()
            most = max(most, _size(root))
    spool.seal()
    dropped = spool.take_dropped()
    # The port may be another after the restart, as for a service that moved.
    shipper.close(0.1)
    service.start()
    again = Shipper(Destination(service.url), spool.outbox)
    assert again.close(PATIENCE), "not everything was shipped"
    spool.close()
    assert service.stop() == 0, service.log
    stored, doubled = _stored(service.data, launch)
    return Outage(steps, stored, dropped, doubled, most)


def _second(step: int) -> pa.RecordBatch:
    scalars = {f"scalar_{i}": float(step + i) for i in range(8)} | {"loss": float(step)}
    began = datetime(2026, 1, 1, tzinfo=UTC)
    return record_batch(step=step, time=began + timedelta(seconds=step), scalars=scalars)


def _size(root: Path) -> int:
    sizes = 0
    for path in root.rglob("*.arrow"):
        try:
            sizes += path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def _stored(folder: Path, launch: str) -> tuple[int, int]:
    registry = Registry(folder / "registry.sqlite")
    store = open_store(parse_store("", folder), registry.layer_names)
    owner = registry.launch_owner(launch)
    assert owner is not None
    distinct = store.step_window(View(owner.run_id)).num_rows
    raw = store.counts(owner.run_id, exact=False)["steps"]
    store.close()
    registry.close()
    return distinct, raw - distinct
