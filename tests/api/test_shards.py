"""Runs spread over ClickHouse servers: where each lies, and one server killed in mid-ingest."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import httpx
import pytest
import sqlalchemy as sa

from foreshock.api.ledger import Ledger
from foreshock.api.registry import Registry
from foreshock.api.registry_tables import writes
from foreshock.api.store import Store, StoreError, StoreUnreachable, View
from foreshock.api.store_open import open_store
from foreshock.api.store_shards import ShardedStore, shard_of
from foreshock.api.store_url import parse_store
from foreshock.monitor.record import table_to_records
from tests.api.clickhouse_front import PASSWORD, Front
from tests.api.service import (
    LAYERS,
    Service,
    fact_rows,
    make_record,
    make_records,
    new_launch,
    post_run,
    put_records,
)

STEPS = 8
TENSORS = 6


def address(*fronts: Front) -> str:
    hosts = ",".join(front.place for front in fronts)
    return f"clickhouse://default:{quote(PASSWORD, safe='')}@{hosts}/facts"


@pytest.fixture
def fronts(tmp_path: Path) -> Iterator[list[Front]]:
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        front = Front(tmp_path / name)
        front.start()
        made.append(front)
    yield made
    for front in made:
        front.kill()


def test_a_further_shard_takes_only_its_own_share() -> None:
    runs = [f"{number:032x}" for number in range(3000)]
    before = {run: shard_of(run, ("a", "b")) for run in runs}
    after = {run: shard_of(run, ("c", "b", "a")) for run in runs}
    assert all(count > 1300 for count in Counter(before.values()).values())
    moved = [run for run in runs if before[run] != after[run]]
    assert {after[run] for run in moved} == {"c"}
    assert 800 < len(moved) < 1200


class Kept:
    """A store that only takes; None refuses."""

    def __init__(self, groups: list[Any] | None) -> None:
        self.groups = groups

    def append(self, groups: list[Any]) -> None:
        if self.groups is None:
            raise StoreUnreachable("away")
        self.groups += groups

    def close(self) -> None:
        """Nothing to do."""


def test_what_cannot_be_written_whole_is_written_nowhere_once_that_is_known() -> None:
    held: list[Any] = []
    good, bad = cast(Store, Kept(held)), cast(Store, Kept(None))
    store = ShardedStore({"good": lambda: good, "bad": lambda: bad})
    runs = [f"{number:032x}" for number in range(20)]
    groups = [fact_rows(run, 1, 1, make_records(0, 1)) for run in runs]
    with pytest.raises(StoreError) as first:
        store.append(groups)
    assert not isinstance(first.value, StoreUnreachable)
    assert held
    held.clear()
    with pytest.raises(StoreUnreachable):
        store.append(groups)
    assert held == []
    mine = [
        g for run, g in zip(runs, groups, strict=True) if shard_of(run, ("good", "bad")) == "good"
    ]
    store.append(mine)
    assert held == mine
    store.close()


def test_a_server_answers_like_the_engine_in_this_process(fronts: list[Front]) -> None:
    store = open_store(parse_store(address(fronts[0]), Path()), lambda _: LAYERS)
    rows = fact_rows("r", 1, 1, make_records(0, 10))
    store.append([rows])
    # The same INSERT again, as a transport may send it: its token is known.
    store.append([rows])
    raw = {"steps": 10, "scalars": 20, "events": 0, "tensor_stats": 60}
    assert store.counts("r", exact=False) == raw
    assert store.scalar_series(View("r"), "loss", 3).mean == (1.5, 5.5, 8.5)
    found = table_to_records(store.record_window("r", None, 2, 4))
    assert [record.scalars for record in found] == [make_record(n).scalars for n in (2, 3, 4)]
    store.append([fact_rows("r", 1, 7, make_records(10, 5))])
    assert store.discard_between(5, 9) == 5 * 9
    assert store.counts("r", exact=False) == raw
    store.close()


def test_a_wrong_password_is_told_and_never_shown(fronts: list[Front]) -> None:
    url = f"clickhouse://default:not-this-one@{fronts[0].place}/facts"
    with pytest.raises(StoreError, match=fronts[0].place) as caught:
        open_store(parse_store(url, Path()), lambda _: LAYERS)
    assert "not-this-one" not in str(caught.value)


@dataclass
class Log:
    """What one client knows: its own notes, written when an answer has come."""

    launch: str
    run_id: str
    acknowledged: list[int] = field(default_factory=list)
    again: int = 0
    refused: int = 0


def batch_of(sequence: int) -> list[Any]:
    back = 3 if sequence % 7 == 6 else 0
    return [make_record(STEPS * sequence + i - back) for i in range(STEPS)]


def send(urls: list[str], log: Log, stop: threading.Event, pause: float = 0.0) -> None:
    """Batches in order, each again until it is acknowledged, at whichever address answers.

    Args:
        urls: Addresses, in turn.
        log: Notes.
        stop: Ends it.
        pause: Seconds after each answer.
    """
    turn = 0
    while not stop.is_set():
        sequence = len(log.acknowledged)
        turn += 1
        try:
            with httpx.Client(base_url=urls[turn % len(urls)], timeout=60) as client:
                answer = put_records(client, log.run_id, log.launch, sequence, batch_of(sequence))
        except httpx.TransportError:
            time.sleep(0.05)
            continue
        if answer.status_code == 503:
            log.refused += 1
            time.sleep(0.05)
            continue
        assert answer.status_code in (200, 201), answer.text
        log.again += answer.status_code == 200
        log.acknowledged.append(sequence)
        stop.wait(pause)


def wait_for_more(logs: list[Log]) -> None:
    before = [len(log.acknowledged) for log in logs]
    deadline = time.monotonic() + 120
    while any(len(log.acknowledged) < n + 2 for log, n in zip(logs, before, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_swept(registry: Registry) -> None:
    """Until nothing is claimed that nobody will keep."""
    query = sa.select(sa.func.count()).where(writes.c.swept.is_(None)).select_from(writes)
    deadline = time.monotonic() + 120
    while True:
        with registry.engine.begin() as connection:
            if connection.execute(query).scalar_one() == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


def assert_exactly_once(store: Store, registry: Registry, logs: list[Log]) -> None:
    """Every acknowledged batch is there, nothing else, and no row twice on disk."""
    ledger = Ledger(registry)
    for log in logs:
        sent = len(log.acknowledged)
        assert ledger.count(log.run_id) == sent
        rows = sent * STEPS
        expected = {"steps": rows, "scalars": 2 * rows, "events": 0, "tensor_stats": TENSORS * rows}
        assert store.counts(log.run_id) == expected
        assert store.counts(log.run_id, exact=False) == expected
        run = registry.run(log.run_id)
        assert run is not None
        held = [
            (attempt.number, step)
            for attempt in run.attempts
            for step in store.step_window(View(log.run_id, attempt.number))["step"].to_pylist()
        ]
        number, last, wanted = 1, -1, []
        for sequence in range(sent):
            for record in batch_of(sequence):
                number += record.step <= last
                last = record.step
                wanted.append((number, last))
        assert sorted(held) == sorted(wanted)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_one_of_two_shards_killed_in_mid_ingest(fronts: list[Front], tmp_path: Path) -> None:
    url = address(*fronts)
    service = Service(tmp_path, environment={"FORESHOCK_STORE": url})
    service.start()
    names = [front.place for front in fronts]
    with service.client() as client:
        logs: list[Log] = []
        while len(Counter(shard_of(log.run_id, names) for log in logs)) < 2 or len(logs) < 4:
            launch = new_launch()
            logs.append(Log(launch, post_run(client, f"run-{len(logs)}", launch)["run_id"]))
    stop = threading.Event()
    threads = [threading.Thread(target=send, args=([service.url], log, stop)) for log in logs]
    for thread in threads:
        thread.start()
    wait_for_more(logs)
    fronts[0].kill()
    # The other shard's runs go on.
    wait_for_more([log for log in logs if shard_of(log.run_id, names) == names[1]])
    assert any(log.refused for log in logs if shard_of(log.run_id, names) == names[0])
    fronts[0].start()
    wait_for_more(logs)
    stop.set()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert PASSWORD not in service.log
    assert quote(PASSWORD, safe="") not in service.log
    registry = Registry(service.data / "registry.sqlite")
    wait_until_swept(registry)
    assert service.stop() == 0, service.log
    store = open_store(parse_store(url, Path()), registry.layer_names)
    assert_exactly_once(store, registry, logs)
    store.close()
    registry.close()
