"""Exactly once through a real registry and store, against a plain dict."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.api import ingest as ingest_module
from foreshock.api.ingest import (
    BatchConflict,
    CommitListener,
    Incoming,
    Ingest,
    IngestLimits,
    NoListener,
    Overloaded,
    Receipt,
    Refused,
    Unavailable,
)
from foreshock.api.ledger import BatchKey, Ledger, LedgerEntry
from foreshock.api.registry import LaunchRequest, Registry
from foreshock.api.store import StoreError, View
from foreshock.api.store_open import open_store
from foreshock.api.store_url import ChdbPlace
from foreshock.monitor.record import StepRecord, records_to_table, table_to_records
from tests.api.service import make_record, make_records, new_launch


class Parts:
    def __init__(self, folder: Path) -> None:
        self.registry = Registry(folder / "registry.sqlite")
        self.store = open_store(ChdbPlace(folder / "store"), self.registry.layer_names)
        self._runs = 0

    def launch(self, run: str | None = None) -> tuple[str, str]:
        self._runs += 1
        launch = new_launch()
        name = run or f"run-{self._runs}"
        run_id, _, _ = self.registry.launch(LaunchRequest(project="p", run=name, launch_id=launch))
        return run_id, launch

    def ingest(
        self, listener: CommitListener | None = None, *, batches: int = 32, queue: int = 256
    ) -> Ingest:
        return Ingest(
            self.registry,
            self.store,
            listener or NoListener(),
            limits=IngestLimits(group_batches=batches, group_seconds=0.002, queue_batches=queue),
        )

    @contextmanager
    def running(self) -> Iterator[Ingest]:
        made = self.ingest()
        made.start()
        yield made
        made.stop()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    made = Parts(tmp_path_factory.mktemp("ingest"))
    yield made
    made.store.close()
    made.registry.close()


@pytest.fixture
def ingest(parts: Parts) -> Iterator[Ingest]:
    with parts.running() as made:
        yield made


def incoming(
    run_id: str, launch: str, sequence: int, records: Sequence[StepRecord], digest: str = ""
) -> Incoming:
    return Incoming(
        run_id=run_id,
        key=BatchKey(launch, 0, sequence),
        digest=digest or f"digest-{sequence}",
        table=records_to_table(records),
    )


def losses(parts: Parts, run_id: str, attempt: int | None = None) -> dict[int, float]:
    series = parts.store.scalar_series(View(run_id, attempt), "loss", 10_000)
    return dict(zip(series.step, series.mean, strict=True))


def test_a_receipt_comes_after_facts_and_ledger(parts: Parts, ingest: Ingest) -> None:
    run_id, launch = parts.launch()
    receipt = ingest.submit(incoming(run_id, launch, 1, make_records(0, 5))).result(30)
    assert receipt == Receipt(duplicate=False, attempts=(1,), records=5)
    assert parts.store.counts(run_id, exact=False)["tensor_stats"] == 30
    assert Ledger(parts.registry).count(run_id) == 1


def test_a_repeat_is_recognised_within_a_group_and_after_it(parts: Parts, ingest: Ingest) -> None:
    run_id, launch = parts.launch()
    batch = incoming(run_id, launch, 1, make_records(0, 5))
    other = incoming(run_id, launch, 1, make_records(0, 6), digest="other")
    futures = [ingest.submit(batch) for _ in range(3)]
    conflict = ingest.submit(other)
    receipts = [future.result(30) for future in futures]
    assert [r.duplicate for r in receipts] == [False, True, True]
    assert all(r.attempts == (1,) for r in receipts)
    with pytest.raises(BatchConflict):
        conflict.result(30)
    assert ingest.submit(batch).result(30).duplicate
    assert ingest.known(batch.key, batch.digest) == receipts[1]
    with pytest.raises(BatchConflict):
        ingest.known(other.key, other.digest)
    assert parts.store.counts(run_id, exact=False)["steps"] == 5


def test_launches_and_rollbacks_are_attempts(parts: Parts, ingest: Ingest) -> None:
    run_id, first = parts.launch("twice")
    _, second = parts.launch("twice")
    pieces = [
        (first, 1, range(0, 6)),
        (first, 2, range(6, 9)),
        (second, 1, range(4, 8)),
        (second, 2, range(6, 9)),
    ]
    for number, (launch, sequence, steps) in enumerate(pieces):
        records = [make_record(step, value=step + 100.0 * number) for step in steps]
        ingest.submit(incoming(run_id, launch, sequence, records)).result(30)
    assert [sorted(losses(parts, run_id, a)) for a in (1, 2, 3)] == [
        list(range(9)),
        [4, 5, 6, 7],
        [6, 7, 8],
    ]
    newest = {step: float(step) for step in range(4)}
    newest |= {step: step + 200.0 for step in (4, 5)} | {step: step + 300.0 for step in (6, 7, 8)}
    assert losses(parts, run_id) == newest


def test_a_late_batch_joins_its_neighbours(parts: Parts, ingest: Ingest) -> None:
    run_id, launch = parts.launch()
    for sequence in (1, 4, 3, 2):
        steps = make_records(10 * sequence, 10)
        receipt = ingest.submit(incoming(run_id, launch, sequence, steps)).result(30)
        assert receipt.attempts == (1,)
    assert len(losses(parts, run_id, 1)) == 40


def test_a_batch_that_can_never_be_stored_harms_no_other(parts: Parts, ingest: Ingest) -> None:
    run_id, launch = parts.launch()
    parts.registry.layer_ids(run_id, [f"l{index}" for index in range(65_534)])
    fine_run, fine = parts.launch()
    bad = ingest.submit(incoming(run_id, launch, 1, make_records(0, 2)))
    good = ingest.submit(incoming(fine_run, fine, 1, make_records(0, 2)))
    assert good.result(30).records == 2
    with pytest.raises(Refused, match="65535"):
        bad.result(30)
    assert ingest.alive


class Broken:
    """Fails like a full disk until told otherwise."""

    def __init__(self, action: Callable[..., None], error: Exception, *, after: bool) -> None:
        self._action = action
        self._error = error
        self._after = after
        self.on = True

    def __call__(self, argument: object) -> None:
        if self.on and not self._after:
            raise self._error
        self._action(argument)
        if self.on:
            raise self._error


@pytest.mark.parametrize("after", [False, True])
def test_when_facts_do_not_get_in_nothing_is_acknowledged(
    parts: Parts, ingest: Ingest, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    run_id, launch = parts.launch()
    broken = Broken(parts.store.append, StoreError("disk full"), after=after)
    monkeypatch.setattr(parts.store, "append", broken)
    batches = [incoming(run_id, launch, s, make_records(5 * s, 5)) for s in range(3)]
    for future in [ingest.submit(batch) for batch in batches]:
        with pytest.raises(Unavailable):
            future.result(30)
    assert Ledger(parts.registry).count(run_id) == 0
    broken.on = False
    for future in [ingest.submit(batch) for batch in batches]:
        assert not future.result(30).duplicate
    assert parts.store.counts(run_id, exact=False)["tensor_stats"] == 15 * 6


def test_a_disk_that_is_nearly_full_is_left_alone(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, launch = parts.launch()
    made = Ingest(
        parts.registry, parts.store, NoListener(), limits=IngestLimits(min_free_bytes=1000)
    )
    made.start()
    batch = incoming(run_id, launch, 1, make_records(0, 2))
    monkeypatch.setattr(parts.store, "free_bytes", lambda: 999)
    assert made.disk_full
    with pytest.raises(Unavailable):
        made.submit(batch).result(30)
    assert parts.store.counts(run_id)["steps"] == 0
    monkeypatch.setattr(parts.store, "free_bytes", lambda: 1000)
    assert not made.submit(batch).result(30).duplicate
    made.stop()


@pytest.mark.parametrize("after", [False, True])
def test_a_death_between_facts_and_ledger_leaves_nothing_twice(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """`after`: the ledger was committed, but the answer was never sent."""
    run_id, launch = parts.launch()
    died = threading.Event()

    class Death(BaseException):
        pass

    commit = Ledger.commit

    def die(self: Ledger, entries: Sequence[LedgerEntry]) -> None:
        if after:
            commit(self, entries)
        died.set()
        raise Death

    first = parts.ingest()
    first.start()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(Ledger, "commit", die)
    # A step back, so that the attempt that was chosen before the death matters too.
    batch = incoming(run_id, launch, 1, [*make_records(0, 4), *make_records(2, 3)])
    future = first.submit(batch)
    assert died.wait(30)
    assert not future.done()
    monkeypatch.setattr(Ledger, "commit", commit)
    assert parts.store.counts(run_id, exact=False)["steps"] == 7
    second = parts.ingest()
    second.start()
    assert parts.store.counts(run_id, exact=False)["steps"] == (7 if after else 0)
    receipt = second.submit(batch).result(30)
    assert receipt == Receipt(duplicate=after, attempts=(1, 2), records=7)
    assert parts.store.counts(run_id, exact=False)["tensor_stats"] == 7 * 6
    second.stop()


def test_the_queue_is_bounded_and_stopping_finishes_it(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, launch = parts.launch()
    gate = threading.Event()
    append = parts.store.append

    def slow(groups: Sequence[Mapping[str, pa.Table]]) -> None:
        gate.wait(30)
        append(groups)

    monkeypatch.setattr(parts.store, "append", slow)
    made = parts.ingest(batches=1, queue=2)
    made.start()
    batches = [incoming(run_id, launch, i, make_records(i, 1)) for i in range(4)]
    futures = [made.submit(batches[0])]
    while made.waiting:
        time.sleep(0.001)
    futures += [made.submit(batch) for batch in batches[1:3]]
    with pytest.raises(Overloaded):
        made.submit(batches[3])
    stopper = threading.Thread(target=made.stop)
    stopper.start()
    time.sleep(0.05)
    with pytest.raises(Unavailable):
        made.submit(incoming(run_id, launch, 99, make_records(99, 1)))
    gate.set()
    stopper.join(30)
    assert not made.alive
    assert all(not future.result(0).duplicate for future in futures)
    assert len(losses(parts, run_id)) == len(futures)


def test_what_waited_for_the_group_before_does_not_wait_for_its_own(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id, launch = parts.launch()
    hours = [0.0]
    clock = SimpleNamespace(monotonic=lambda: 3600 * hours[0])
    monkeypatch.setattr(ingest_module, "time", clock)
    gate, append = threading.Event(), parts.store.append

    def slow(groups: Sequence[Mapping[str, pa.Table]]) -> None:
        gate.wait(30)
        append(groups)

    monkeypatch.setattr(parts.store, "append", slow)
    limits = IngestLimits(group_batches=2, group_seconds=3600)
    made = Ingest(parts.registry, parts.store, NoListener(), limits=limits)
    made.start()
    first = [made.submit(incoming(run_id, launch, i, make_records(i, 1))) for i in range(2)]
    while made.waiting:
        time.sleep(0.001)
    late = made.submit(incoming(run_id, launch, 2, make_records(2, 1)))
    hours[0] = 1.0
    gate.set()
    assert [future.result(30).records for future in (*first, late)] == [1, 1, 1]
    made.stop()


def test_the_listener_hears_of_each_attempt_once_and_may_fail(parts: Parts) -> None:
    heard: list[tuple[str, int, list[int]]] = []

    class Listener:
        def committed(self, run_id: str, attempt: int, table: pa.Table) -> None:
            assert Ledger(parts.registry).count(run_id) == 1
            heard.append((run_id, attempt, table["step"].to_pylist()))
            raise ValueError("must harm nobody")

    run_id, launch = parts.launch()
    made = parts.ingest(Listener())
    made.start()
    batch = incoming(run_id, launch, 1, [make_record(3), make_record(4), make_record(1)])
    assert not made.submit(batch).result(30).duplicate
    assert made.submit(batch).result(30).duplicate
    made.stop()
    assert heard == [(run_id, 1, [3, 4]), (run_id, 2, [1])]


@settings(max_examples=12)
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_any_order_and_any_repeats_store_what_a_dict_would(
    parts: Parts, data: st.DataObject, sizes: list[int]
) -> None:
    run_id, launch = parts.launch()
    batches, first = [], 0
    for sequence, size in enumerate(sizes):
        batches.append(incoming(run_id, launch, sequence, make_records(first, size)))
        first += size
    order = data.draw(st.permutations([*batches, *data.draw(st.lists(st.sampled_from(batches)))]))
    with parts.running() as ingest:
        receipts = [future.result(30) for future in [ingest.submit(batch) for batch in order]]
    assert sum(not r.duplicate for r in receipts) == len(batches)
    assert all(r.attempts == (1,) for r in receipts)
    assert parts.store.counts(run_id, exact=False)["steps"] == first
    assert losses(parts, run_id) == {step: float(step) for step in range(first)}


@settings(max_examples=12)
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 9), min_size=1, max_size=5)),
        min_size=1,
        max_size=8,
    ),
    data=st.data(),
)
def test_rollbacks_of_two_launches_agree_with_a_dict(
    parts: Parts, pieces: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    run_id, first = parts.launch(name := f"two-{new_launch()}")
    launches = [first, parts.launch(name)[1]]
    expected: dict[tuple[int, int], float] = {}
    attempt, last, highest = [1, 2], [-1, -1], 2
    sent: list[Incoming] = []
    for number, (which, steps) in enumerate(pieces):
        records = []
        for position, step in enumerate(steps):
            if step <= last[which]:
                highest += 1
                attempt[which] = highest
            last[which] = step
            value = 100.0 * number + position
            expected[attempt[which], step] = value
            records.append(make_record(step, value=value, tensors=False))
        sent.append(incoming(run_id, launches[which], number, records))
    with parts.running() as ingest:
        for number, batch in enumerate(sent):
            assert not ingest.submit(batch).result(30).duplicate
            again = data.draw(st.sampled_from(sent[: number + 1]))
            assert ingest.submit(again).result(30).duplicate
    newest = {step: max(a for a, s in expected if s == step) for _, step in expected}
    for chosen in range(1, highest + 1):
        held = {step: value for (a, step), value in expected.items() if a == chosen}
        assert losses(parts, run_id, chosen) == held
    assert losses(parts, run_id) == {step: expected[a, step] for step, a in newest.items()}
    records_back = table_to_records(parts.store.record_window(run_id, None, 0, 99))
    assert {r.step: r.scalars["loss"] for r in records_back} == losses(parts, run_id)
