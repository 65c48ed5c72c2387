"""Clients that note what was acknowledged, and a count of the store against their notes."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

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
        deadline = time.monotonic() + 120
        while any(len(log.acknowledged) <= n for log, n in zip(self.logs, before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stand_still(self) -> bool:
        """Whether no client gets an acknowledgement within a second."""
        before = sum(len(log.acknowledged) for log in self.logs)
        time.sleep(1.0)
        return sum(len(log.acknowledged) for log in self.logs) == before

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
                            time.sleep(0.05)
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


@dataclass(frozen=True)
class Tally:
    """What one count over all clients found.

    Attributes:
        acknowledged: Batches that a client has an answer for.
        again: Of them, those that were stored before the answer was lost.
        lost: Acknowledged batches of which a record is not there, or not as it was sent.
        doubled: Batches of which a record or a row is there more than once.
        strange: Rows that no client sent.
    """

    acknowledged: int
    again: int
    lost: int
    doubled: int
    strange: int

    @property
    def exactly_once(self) -> bool:
        """Whether every acknowledged batch is there, once, and nothing else is."""
        return self.lost == self.doubled == self.strange == 0


def count(folder: Path, logs: Sequence[Log], store_url: str = "") -> Tally:
    """Open the stores of a stopped service and hold them against the clients' own notes."""
    registry = Registry(folder / "registry.sqlite")
    store = open_store(parse_store(store_url, folder), registry.layer_names)
    ledger = Ledger(registry)
    found = [_count(store, registry, ledger, log) for log in logs]
    store.close()
    registry.close()
    return Tally(*(sum(column) for column in zip(*found, strict=True)))


def _count(
    store: Store, registry: Registry, ledger: Ledger, log: Log
) -> tuple[int, int, int, int, int]:
    """Acknowledged, again, lost, doubled, strange; exact rows as they lie on disk."""
    sent = log.acknowledged
    run = registry.run(log.run_id)
    assert run is not None
    held: Counter[tuple[int, int]] = Counter()
    broken: set[tuple[int, int]] = set()
    for attempt in run.attempts:
        table = store.record_window(log.run_id, attempt.number, 0, 2**40)
        for record in table_to_records(table):
            place = (attempt.number, record.step)
            held[place] += 1
            if not same(record, make_record(record.step)):
                broken.add(place)
    places = _places(sent)
    wanted = Counter(place for batch in places.values() for place in batch)
    lost = sum(any(not held[p] or p in broken for p in batch) for batch in places.values())
    rows = STEPS * len(sent)
    expected = {"steps": rows, "scalars": 2 * rows, "events": 0, "tensor_stats": TENSORS * rows}
    # Reads never show a row twice, so rows are counted as they lie on disk.
    raw = store.counts(log.run_id, exact=False)
    doubled = len(sent) - len(set(sent)) + -(-max(0, raw["steps"] - rows) // STEPS)
    strange = sum((held - wanted).values()) + abs(ledger.count(log.run_id) - len(sent))
    strange += sum(abs(raw[name] - expected[name]) for name in expected)
    return len(sent), log.again, lost, doubled, strange


def _places(sent: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Attempt and step of each record of each batch, by the rules alone."""
    number, last = 1, -1
    places: dict[int, list[tuple[int, int]]] = {}
    for sequence in sent:
        for record in batch_of(sequence):
            number += record.step <= last
            last = record.step
            places.setdefault(sequence, []).append((number, last))
    return places


def kill_and_count(folder: Path, kills: int, seed: int, store_url: str = "") -> Tally:
    """Kill a service under load again and again, then count."""
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
    return count(service.data, clients.logs, store_url)
