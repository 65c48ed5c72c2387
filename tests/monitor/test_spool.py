"""The queue on disk: what survives a killed writer, a full disk and a bound."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

import foreshock.monitor.spool as spool_module
from foreshock.monitor.record import read_stream, record_batch
from foreshock.monitor.spool import Outbox, Spool, SpoolError, leftovers

TIME = datetime(2026, 1, 31, tzinfo=UTC)


def record(step: int) -> pa.RecordBatch:
    return record_batch(step=step, time=TIME, scalars={"loss": float(step)})


def registration(launch_id: str | None = None) -> dict[str, object]:
    return {"project": "p", "run": "r", "launch_id": launch_id or str(uuid.uuid4())}


def steps_in(outbox: Outbox) -> list[int]:
    return [
        step
        for path in outbox.sealed()
        for step in read_stream(path.read_bytes())["step"].to_pylist()
    ]


def test_records_come_out_in_order_in_sealed_batches(tmp_path: Path) -> None:
    body = registration()
    spool = Spool(tmp_path, body, rank=3)
    for step in range(5):
        spool.append(record(step))
        if step == 2:
            assert spool.seal()
    spool.close()
    outbox = spool.outbox
    assert outbox.folder == tmp_path / "p" / "r" / f"{body['launch_id']}-3"
    assert (outbox.project, outbox.run) == ("p", "r")
    assert outbox.registration() == body
    assert [outbox.batch_id(path) for path in outbox.sealed()] == [
        f"{body['launch_id']}-3-0",
        f"{body['launch_id']}-3-1",
    ]
    assert steps_in(outbox) == [0, 1, 2, 3, 4]
    assert list(outbox.folder.glob("*.journal")) == []


def test_sealing_is_due_after_64_records_or_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("foreshock.monitor.spool.time.monotonic", lambda: now[0])
    spool = Spool(tmp_path, registration())
    assert not spool.seal_if_due()
    spool.append(record(0))
    now[0] += 0.9
    assert not spool.seal_if_due()
    now[0] += 0.2
    assert spool.seal_if_due()
    for step in range(1, 64):
        spool.append(record(step))
    assert not spool.seal_if_due()
    spool.append(record(64))
    assert spool.seal_if_due()
    spool.close()


WRITER = """
import sys
from pathlib import Path
from tests.monitor.test_spool import record, registration
from foreshock.monitor.spool import Spool
spool = Spool(Path(sys.argv[1]), registration(sys.argv[2]))
for step in range(10**6):
    spool.append(record(step))
    if step == 3:
        spool.seal()
    print(step, flush=True)
"""


def test_kill_9_loses_at_most_the_record_in_flight(tmp_path: Path) -> None:
    launch_id = str(uuid.uuid4())
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), launch_id],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 40:
        pass
    # Alive, its folder belongs to it.
    assert list(leftovers(tmp_path)) == []
    os.kill(writer.pid, signal.SIGKILL)
    last = 40
    for line in writer.stdout:
        last = int(line)
    writer.stdout.close()
    writer.wait()
    (outbox,) = [outbox for outbox in leftovers(tmp_path)]
    steps = steps_in(outbox)
    assert steps == list(range(len(steps)))
    assert len(steps) in (last + 1, last + 2)
    before = {path.name: path.read_bytes() for path in outbox.sealed()}
    list(leftovers(tmp_path))
    assert {path.name: path.read_bytes() for path in outbox.sealed()} == before


@pytest.mark.parametrize("cut", range(1, 400, 23))
def test_a_journal_cut_anywhere_gives_its_whole_records(tmp_path: Path, cut: int) -> None:
    spool = Spool(tmp_path, registration())
    spool.append(record(0))
    spool.append(record(1))
    (journal,) = spool.outbox.folder.glob("*.journal")
    body = journal.read_bytes()
    spool.close()
    (sealed,) = spool.outbox.sealed()
    sealed.unlink()
    Path(spool.outbox.folder / "run.json").write_text(json.dumps(registration()))
    journal.write_bytes(body[: len(body) - cut])
    list(leftovers(tmp_path))
    assert steps_in(spool.outbox) == [0]


def test_rubbish_in_a_journal_costs_only_the_journal(tmp_path: Path) -> None:
    spool = Spool(tmp_path, registration())
    spool.append(record(0))
    spool.seal()
    spool.close()
    (spool.outbox.folder / "0000000001.journal").write_bytes(os.urandom(1000))
    (spool.outbox.folder / "0000000002.journal").write_bytes(b"")
    (spool.outbox.folder / "0000000003.part").write_bytes(b"half a batch")
    (outbox,) = [outbox for outbox in leftovers(tmp_path)]
    assert steps_in(outbox) == [0]
    assert {p.name for p in outbox.folder.iterdir()} == {"run.json", "lock", "0000000000.arrow"}


def test_a_journal_beside_its_own_sealed_batch_is_not_sealed_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path, registration())
    spool.append(record(0))
    (journal,) = spool.outbox.folder.glob("*.journal")
    body = journal.read_bytes()
    spool.close()
    journal.write_bytes(body)
    list(leftovers(tmp_path))
    assert steps_in(spool.outbox) == [0]


def test_recovered_bytes_are_those_that_sealing_would_have_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path, registration())
    for step in range(3):
        spool.append(record(step))
    (journal,) = spool.outbox.folder.glob("*.journal")
    body = journal.read_bytes()
    spool.close()
    (sealed,) = spool.outbox.sealed()
    expected = sealed.read_bytes()
    sealed.unlink()
    journal.write_bytes(body)
    list(leftovers(tmp_path))
    assert sealed.read_bytes() == expected


def test_the_bound_drops_the_oldest_batches_and_counts(tmp_path: Path) -> None:
    spool = Spool(tmp_path, registration(), max_bytes=20_000)
    for step in range(60):
        spool.append(record(step))
        spool.seal()
    sizes = [path.stat().st_size for path in spool.outbox.sealed()]
    assert sum(sizes) <= 20_000
    dropped = spool.take_dropped()
    assert dropped == 60 - len(sizes) > 0
    assert steps_in(spool.outbox) == list(range(dropped, 60))
    assert spool.take_dropped() == 0
    spool.close()


def test_what_older_launches_left_counts_against_the_bound(tmp_path: Path) -> None:
    old = Spool(tmp_path, registration())
    for step in range(20):
        old.append(record(step))
        old.seal()
    old.close()
    taken = sum(path.stat().st_size for path in old.outbox.sealed())
    spool = Spool(tmp_path, registration(), max_bytes=taken + 1)
    for step in range(20):
        spool.append(record(step))
        spool.seal()
    assert sum(path.stat().st_size for path in spool.outbox.sealed()) <= (taken + 1) / 8
    spool.close()


def test_a_full_disk_costs_the_oldest_batch_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = spool_module._write_whole

    def full(path: Path, body: bytes) -> None:
        if len(list(path.parent.glob("*.arrow"))) >= 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        write(path, body)

    monkeypatch.setattr(spool_module, "_write_whole", full)
    spool = Spool(tmp_path, registration())
    for step in range(5):
        spool.append(record(step))
        assert spool.seal()
    assert steps_in(spool.outbox) == [3, 4]
    assert spool.take_dropped() == 3
    spool.close()


def test_a_disk_that_takes_nothing_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, registration())
    real_write, real_pwrite = spool_module._write_whole, os.pwrite

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(spool_module, "_write_whole", full)
    monkeypatch.setattr(os, "pwrite", full)
    for step in range(1100):
        spool.append(record(step))
        spool.seal_if_due()
    assert spool.take_dropped() == 1100 - 1024
    assert steps_in(spool.outbox) == []
    monkeypatch.setattr(spool_module, "_write_whole", real_write)
    monkeypatch.setattr(os, "pwrite", real_pwrite)
    assert spool.seal()
    assert steps_in(spool.outbox) == list(range(1024))
    spool.close()


def test_a_torn_append_leaves_the_journal_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, registration())
    spool.append(record(0))
    real = os.pwrite
    calls = iter(range(100))

    def torn(file: int, body: bytes, offset: int) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, "no space left on device")
        return real(file, body[:50], offset)

    monkeypatch.setattr(os, "pwrite", torn)
    spool.append(record(1))
    monkeypatch.setattr(os, "pwrite", real)
    spool.append(record(2))
    (journal,) = spool.outbox.folder.glob("*.journal")
    assert [r["step"][0].as_py() for r in spool_module._read_journal(journal)] == [0, 2]
    spool.close()
    assert steps_in(spool.outbox) == [0, 1, 2]


def test_one_writer_per_folder(tmp_path: Path) -> None:
    body = registration()
    spool = Spool(tmp_path, body)
    with pytest.raises(SpoolError, match="in use"):
        Spool(tmp_path, body)
    spool.append(record(0))
    spool.close()
    assert len(list(leftovers(tmp_path))) == 1


def test_an_empty_outbox_goes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, registration())
    spool.append(record(0))
    spool.seal()
    spool.outbox.sealed()[0].unlink()
    spool.close()
    assert not spool.outbox.folder.exists()
    assert list(leftovers(tmp_path)) == []


def test_refused_batches_stand_aside_with_the_reason(tmp_path: Path) -> None:
    spool = Spool(tmp_path, registration())
    spool.append(record(0))
    spool.seal()
    spool.outbox.refuse(spool.outbox.sealed()[0], "422: record 0: no step")
    spool.close()
    assert spool.outbox.sealed() == []
    reason = spool.outbox.folder / "refused" / "0000000000.arrow.reason.txt"
    assert "422" in reason.read_text()
    assert reason.with_name("0000000000.arrow").exists()


@pytest.mark.parametrize("run", ["", "a/b", "..", "x" * 129, "ü", None])
def test_names_that_are_no_folders_are_refused(tmp_path: Path, run: object) -> None:
    with pytest.raises(ValueError, match="run is"):
        Spool(tmp_path, registration() | {"run": run})


def test_a_folder_that_is_no_spool_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match=r"run\.json"):
        Outbox(tmp_path).registration()
    assert list(leftovers(tmp_path / "nowhere")) == []
