"""kill -9 of the service in mid-ingest, counted against a log that the service never sees."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import pytest

from foreshock.api.ledger import Ledger
from foreshock.api.registry import Registry
from foreshock.api.store import Store
from foreshock.api.store_open import open_store
from foreshock.api.store_url import parse_store
from foreshock.monitor.record import StepRecord, table_to_records
from tests.api.service import Service, make_record, new_launch, post_run, put_records

CLIENTS = 3
STEPS = 8
TENSORS = 6


def batch_of(sequence: int) -> list[StepRecord]:
    """Steps rise from batch to batch, but every seventh goes back a little: a rollback."""
    back = 3 if sequence % 7 == 6 else 0
    return [make_record(STEPS * sequence + i - back) for i in range(STEPS)]


@dataclass
class Log:
    """What one client knows: its own notes, written when an answer has come."""

    launch: str
    run_id: str
    acknowledged: list[int] = field(default_factory=list)
    again: int = 0


class Clients:
    """Each sends its batches in order and sends one again until it is acknowledged."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._stop = threading.Event()
        with service.client() as client:
            self.logs = [
                Log(launch, post_run(client, f"killed-{i}", launch)["run_id"])
                for i, launch in enumerate(new_launch() for _ in range(CLIENTS))
            ]

    def wait_for_more(self) -> None:
        """Until every client has got answers since the last kill, however slow the machine is."""
        before = [len(log.acknowledged) for log in self.logs]
        deadline = time.monotonic() + 60
        while any(len(log.acknowledged) <= n for log, n in zip(self.logs, before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @contextmanager
    def sending(self) -> Iterator[None]:
        make = partial(threading.Thread, target=self._send, daemon=True)
        threads = [make(args=(log,)) for log in self.logs]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()

    def _send(self, log: Log) -> None:
        sequence, waiting = 0, False
        while not self._stop.is_set() or waiting:
            try:
                with httpx.Client(base_url=self._service.url, timeout=30) as client:
                    while not self._stop.is_set() or waiting:
                        waiting = True
                        answer = put_records(
                            client, log.run_id, log.launch, sequence, batch_of(sequence)
                        )
                        if answer.status_code == 503:
                            continue
                        assert answer.status_code in (200, 201), answer.text
                        # A duplicate was stored, but the kill ate the answer.
                        log.again += answer.status_code == 200
                        log.acknowledged.append(sequence)
                        sequence, waiting = sequence + 1, False
            except httpx.TransportError:
                time.sleep(0.25)


def same(a: StepRecord, b: StepRecord) -> bool:
    """Equal but for the order of tensors."""
    plain = (a.step, a.time, a.scalars, a.events) == (b.step, b.time, b.scalars, b.events)
    return plain and set(a.tensors) == set(b.tensors)


def kill_and_count(folder: Path, kills: int, seed: int, store_url: str = "") -> None:
    service = Service(folder, *(["--store", store_url] if store_url else []))
    service.start()
    clients = Clients(service)
    rng = random.Random(seed)
    with clients.sending():
        for _ in range(kills):
            clients.wait_for_more()
            time.sleep(rng.uniform(0, 0.5))
            service.kill()
            service.start()
        clients.wait_for_more()
    assert service.stop() == 0, service.log
    registry = Registry(service.data / "registry.sqlite")
    store = open_store(parse_store(store_url, service.data), registry.layer_names)
    ledger = Ledger(registry)
    for log in clients.logs:
        sent = len(log.acknowledged)
        assert log.acknowledged == list(range(sent))
        assert sent > kills
        assert ledger.count(log.run_id) == sent
        _count(store, registry, log.run_id, sent)
    store.close()
    registry.close()


def _count(store: Store, registry: Registry, run_id: str, sent: int) -> None:
    """Exact rows as they lie on disk: nothing lost, nothing twice, each where it belongs."""
    rows = sent * STEPS
    expected = {"steps": rows, "scalars": 2 * rows, "events": 0, "tensor_stats": TENSORS * rows}
    assert store.counts(run_id) == expected
    # A merge may have removed a double row before it was counted, so count raw rows too.
    assert store.counts(run_id, exact=False) == expected
    run = registry.run(run_id)
    assert run is not None
    held: list[tuple[int, int]] = []
    for attempt in run.attempts:
        table = store.record_window(run_id, attempt.number, 0, 2**40)
        for record in table_to_records(table):
            assert same(record, make_record(record.step))
            held.append((attempt.number, record.step))
    number, last, wanted = 1, -1, []
    for sequence in range(sent):
        for record in batch_of(sequence):
            number += record.step <= last
            last = record.step
            wanted.append((number, last))
    assert sorted(held) == sorted(wanted)


def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice(tmp_path: Path) -> None:
    kill_and_count(tmp_path, kills=3, seed=7)


def test_a_sqlite_store_loses_nothing_either(tmp_path: Path) -> None:
    kill_and_count(tmp_path, kills=1, seed=8, store_url=f"sqlite://{tmp_path}/facts.sqlite")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_kills(tmp_path: Path) -> None:
    kill_and_count(tmp_path, kills=20, seed=int(time.time()))
