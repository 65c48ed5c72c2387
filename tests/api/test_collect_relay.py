"""Real relays in front of a real service: exactly once, bounded, through kills and outages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from foreshock.api.wire import ARROW
from foreshock.monitor.record import (
    Event,
    Held,
    Place,
    StepRecord,
    StepReport,
    encode_reports,
    records_from_json,
)
from foreshock.monitor.record.reports import event_key
from tests.api.service import (
    LAYERS,
    RelayProcess,
    Service,
    batch_path,
    make_record,
    make_records,
    new_launch,
    put_records,
)

TOKEN = "a-token-that-is-long-enough"
OTHER = "another-token-that-is-long"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def relay_to(folder: Path, service: str, *arguments: str, **environment: str) -> RelayProcess:
    folder.mkdir(exist_ok=True)
    relay = RelayProcess(folder, "--url", service, *arguments, environment=environment)
    relay.start()
    return relay


@pytest.fixture(scope="module")
def relay(served: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    made = relay_to(tmp_path_factory.mktemp("relay"), served.url, "--wait", "1")
    yield made
    assert made.stop() == 0, made.log


def announce(client: httpx.Client, run: str, launch: str, world_size: int | None = 2) -> None:
    body = {"run": run, "launch_id": launch, "world_size": world_size, "layers": list(LAYERS)}
    assert client.post("/api/v1/runs", json=body).status_code == 202


def report(
    client: httpx.Client, run: str, launch: str, *reports: StepReport, status: int = 202
) -> None:
    answer = client.put(f"/api/v1/runs/{run}/reports/{launch}", content=encode_reports(reports))
    assert answer.status_code == status, answer.text


def told(step: int, rank: int, *events: Event, amax: float | None = None) -> StepReport:
    largest = {} if amax is None else {Place(LAYERS[0], "input"): Held(amax, rank)}
    return StepReport(
        step=step,
        ranks=1 << rank,
        broken=(1 << rank) if events else 0,
        largest=largest,
        events={event_key(e): e for e in events},
        health={"step_seconds_max": Held(1.0 + rank, rank)},
    )


def stored(service: Service, run: str, count: int) -> list[StepRecord]:
    """The records of a run once they have come; their order is that of the steps."""

    def found() -> list[StepRecord]:
        with service.client() as client:
            answer = client.get(f"/api/v1/runs/{run}/records")
        return records_from_json(answer.content) if answer.status_code == 200 else []

    wait_for(lambda: len(found()) >= count)
    return found()


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def numbers(client: httpx.Client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    prefix = "foreshock_collect_"
    return {
        sample.name.removeprefix(prefix).removesuffix("_total"): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_a_record_goes_on_once_with_what_the_ranks_told(
    relay: RelayProcess, served: Service
) -> None:
    launch = new_launch()
    broken = Event("nonfinite", 0, LAYERS[2], "input", 1, "1 element is not finite")
    with relay.client() as client:
        announce(client, "merged", launch)
        report(client, "merged", launch, told(0, 1, amax=50.0), told(1, 1, broken))
        for _ in range(2):
            report(client, "merged", launch, told(0, 0), told(1, 0))
        first = put_records(client, "merged", launch, 0, make_records(0, 2))
        again = put_records(client, "merged", launch, 0, make_records(0, 2))
        assert (first.status_code, again.status_code) == (201, 200)
        assert again.json() == {"duplicate": True, "attempts": [], "records": 2}
        other = put_records(client, "merged", launch, 0, make_records(5, 2))
        assert other.status_code == 409
        records = stored(served, "merged", 2)
        late = put_records(client, "merged", launch, 0, make_records(0, 2))
        assert late.json()["duplicate"], "known after it has gone on"
    assert [r.step for r in records] == [0, 1]
    rows = {(t.identity.layer, t.identity.role): t for t in records[0].tensors}
    assert (rows[LAYERS[0], "input"].amax, rows[LAYERS[0], "input"].amax_rank) == (50.0, 1)
    assert rows[LAYERS[0], "weight"].amax == 0.0
    assert records[0].scalars["ranks_heard"] == 2
    assert records[0].scalars["ranks_step_seconds_max_at"] == 1
    assert records[1].scalars["ranks_nonfinite"] == 1
    assert [e for e in records[1].events if e.kind == "nonfinite"] == [broken]


def test_a_silent_rank_holds_a_step_for_the_wait_only(relay: RelayProcess, served: Service) -> None:
    launch = new_launch()
    with relay.client() as client:
        announce(client, "silent", launch, world_size=1000)
        report(client, "silent", launch, told(0, 0))
        put_records(client, "silent", launch, 0, [make_record(0)])
        (record,) = stored(served, "silent", 1)
        assert record.scalars["ranks_silent"] == 999
        before = numbers(client)["late_rank_steps"]
        report(client, "silent", launch, told(0, 5))
        assert numbers(client)["late_rank_steps"] == before + 1


def test_a_job_without_reports_passes_unchanged(relay: RelayProcess, served: Service) -> None:
    launch = new_launch()
    with relay.client() as client:
        announce(client, "plain", launch, world_size=None)
        put_records(client, "plain", launch, 0, make_records(0, 3))
    for record in stored(served, "plain", 3):
        assert set(record.scalars) == {"loss", "grad_norm"}


class Sender:
    """A rank 0 that sends each batch until it is taken, and reports beside them."""

    def __init__(self, relay: Service, run: str) -> None:
        self._relay, self._run = relay, run
        self.launch = new_launch()
        self.taken = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def wait_for(self, more: int) -> None:
        wanted = self.taken + more
        wait_for(lambda: self.taken >= wanted)

    def _send(self) -> None:
        while not self._stop.is_set():
            try:
                with self._relay.client() as client:
                    announce(client, self._run, self.launch)
                    while not self._stop.is_set():
                        self._one(client)
            except httpx.TransportError:
                time.sleep(0.1)

    def _one(self, client: httpx.Client) -> None:
        step = 2 * self.taken
        event = Event("nonfinite", 0, LAYERS[0], "input", 1, f"of {step}")
        report(client, self._run, self.launch, told(step, 1, event), told(step, 0))
        answer = put_records(client, self._run, self.launch, self.taken, make_records(step, 2))
        assert answer.status_code in (200, 201), answer.text
        self.taken += 1


@pytest.mark.long
def test_killed_relays_lose_nothing_that_they_acknowledged(served: Service, tmp_path: Path) -> None:
    relay = relay_to(tmp_path / "relay", served.url, "--wait", "0.2")
    with Sender(relay, "killed") as sender:
        for _ in range(3):
            sender.wait_for(4)
            relay.kill()
            relay.start()
        sender.wait_for(2)
    records = stored(served, "killed", 2 * sender.taken)
    assert relay.stop() == 0, relay.log
    assert [r.step for r in records] == list(range(2 * sender.taken))
    with served.client() as client:
        detail = client.get("/api/v1/runs/killed").json()
    assert detail["attempts"] == 1, "each step came once and in its order"
    seen = [e.detail or "" for r in records for e in r.events if e.kind == "nonfinite"]
    # What came too late for its own record stands in a later one, with its step.
    told_of = {text.rpartition("of ")[2] for text in seen}
    assert told_of == {str(2 * n) for n in range(sender.taken)}


@pytest.mark.long
def test_a_dead_service_costs_bounded_room_and_gets_everything_later(tmp_path: Path) -> None:
    port = free_port()
    relay = relay_to(
        tmp_path / "relay", f"http://127.0.0.1:{port}", "--wait", "0.1", "--max-mib", "1"
    )
    launch = new_launch()
    many = [make_record(step, value=1.0) for step in range(300)]
    sequence = 0
    with relay.client() as client:
        announce(client, "dead", launch, world_size=None)
        while True:
            shifted = [make_record(r.step + 300 * sequence, value=1.0) for r in many]
            answer = client.put(
                batch_path("dead", launch, sequence),
                content=uncompressed(shifted),
                headers={"Content-Type": ARROW},
            )
            if answer.status_code == 503:
                break
            assert answer.status_code == 201, answer.text
            sequence += 1
            assert sequence < 100, "the relay has to say that it is full"
        assert "full" in answer.json()["detail"]
        assert answer.headers["Retry-After"]
        assert numbers(client)["spool_bytes"] <= 2**20
        assert client.get("/healthz").status_code == 200
        assert sequence > 1
        folder = tmp_path / "service"
        folder.mkdir()
        service = Service(folder, "--port", str(port))
        service.start()
        assert len(stored(service, "dead", 300 * sequence)) == 300 * sequence
        wait_for(lambda: numbers(client)["spool_bytes"] == 0)
    assert relay.stop() == 0, relay.log
    assert service.stop() == 0, service.log


def uncompressed(records: list[StepRecord]) -> bytes:
    from foreshock.monitor.record import records_to_table, write_stream

    return write_stream(records_to_table(records), compression=None)


def test_stacked_relays_join_what_their_ranks_told(served: Service, tmp_path: Path) -> None:
    top = relay_to(tmp_path / "top", served.url, "--wait", "20")
    nodes = []
    for number in range(2):
        folder = tmp_path / f"node{number}"
        folder.mkdir()
        node = RelayProcess(folder, "--relay", top.url, "--interval", "0.1")
        node.start()
        nodes.append(node)
    launch = new_launch()
    broken = Event("nonfinite", 0, LAYERS[0], "input", 3, "inf")
    with nodes[0].client() as first, nodes[1].client() as second, top.client() as above:
        announce(first, "stacked", launch, world_size=4)
        for rank, client in enumerate((first, first, second, second)):
            seen = [broken] if rank == 3 else []
            report(client, "stacked", launch, *(told(s, rank, amax=9.0 + rank) for s in range(2)))
            report(client, "stacked", launch, told(1, rank, *seen))
        put_records(first, "stacked", launch, 0, make_records(0, 2))
        records = stored(served, "stacked", 2)
        assert numbers(above)["rank_steps"] >= 8
        bundles = numbers(above)["bundles"]
        assert numbers(first)["bundles"] == numbers(second)["bundles"] == 4
        assert bundles <= 8
    for record in records:
        rows = {(t.identity.layer, t.identity.role): t for t in record.tensors}
        assert (rows[LAYERS[0], "input"].amax, rows[LAYERS[0], "input"].amax_rank) == (12.0, 3)
        assert record.scalars["ranks_heard"] == 4
    assert [e for e in records[1].events if e.kind == "nonfinite"] == [broken]
    for each in (*nodes, top):
        assert each.stop() == 0, each.log


@pytest.mark.long
def test_a_node_relay_keeps_events_while_the_next_one_is_away(
    served: Service, tmp_path: Path
) -> None:
    port = free_port()
    folder = tmp_path / "node"
    folder.mkdir()
    node = RelayProcess(folder, "--relay", f"http://127.0.0.1:{port}", "--interval", "0.1")
    node.start()
    launch = new_launch()
    broken = Event("nonfinite", 0, LAYERS[0], "input", 1, "inf")
    with node.client() as client:
        announce(client, "away", launch, world_size=2)
        report(client, "away", launch, told(0, 1, broken))
        put_records(client, "away", launch, 0, [make_record(0)])
    node.kill()
    node.start()
    top = relay_to(tmp_path / "top", served.url, "--wait", "8", "--port", str(port))
    (record,) = stored(served, "away", 1)
    assert [e for e in record.events if e.kind == "nonfinite"] == [broken]
    for each in (node, top):
        assert each.stop() == 0, each.log


def test_tokens_on_both_sides(tmp_path: Path) -> None:
    port = free_port()
    folder = tmp_path / "service"
    folder.mkdir()
    service = Service(folder, "--port", str(port), environment={"FORESHOCK_TOKEN": TOKEN})
    service.start()
    right = relay_to(
        tmp_path / "right",
        service.url,
        "--wait",
        "0",
        FORESHOCK_TOKEN=OTHER,
        FORESHOCK_UPSTREAM_TOKEN=TOKEN,
    )
    wrong = relay_to(tmp_path / "wrong", service.url, "--wait", "0", FORESHOCK_TOKEN=OTHER)
    launches = {}
    for relay in (right, wrong):
        with relay.client() as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/metrics").status_code == 401
            for path in ("runs/r/batches/x", f"runs/r/reports/{new_launch()}"):
                assert client.put(f"/api/v1/{path}", content=b"").status_code == 401
        launch = launches[relay] = new_launch()
        with relay.client(OTHER) as client:
            announce(client, "tokens", launch)
            assert put_records(client, "tokens", launch, 0, make_records(0, 1)).is_success
    with right.client(OTHER) as client, wrong.client(OTHER) as other:
        wait_for(lambda: numbers(client)["forwarded_batches"] == 1)
        wait_for(lambda: numbers(other)["upstream_failures"] > 1)
        kept = numbers(other)
        assert (kept["waiting_batches"], kept["refused_batches"]) == (1, 0), "a token may change"
    for each in (right, wrong, service):
        assert each.stop() == 0, each.log
        assert TOKEN not in each.log


HOSTILE: list[tuple[str, bytes, dict[str, str], int]] = [
    ("batches/{launch}-0-1", b"nonsense", {"Content-Type": ARROW}, 422),
    ("batches/{launch}-0-1", b"{}", {"Content-Type": "application/json"}, 422),
    ("batches/{launch}-0-1", b"x", {"Content-Type": "text/plain"}, 415),
    ("batches/{launch}-0-1", b"x", {"Content-Type": ARROW, "Content-Encoding": "br"}, 415),
    ("batches/{launch}-0-1", b"x", {"Content-Type": ARROW, "Content-Encoding": "zstd"}, 422),
    ("batches/1-2", b"", {"Content-Type": ARROW}, 422),
    ("batches/00000000-0000-0000-0000-000000000000-0-0", b"", {"Content-Type": ARROW}, 404),
    ("reports/{launch}", b"", {}, 422),
    ("reports/{launch}", b'{"version": 1, "reports": [{}]}', {}, 422),
    ("reports/{launch}", b"[" * 10**6, {}, 422),
    ("reports/{launch}", b"x", {"Content-Encoding": "zstd"}, 422),
    ("reports/none", b"{}", {}, 422),
]


def test_hostile_bodies_are_answered_and_change_nothing(
    relay: RelayProcess, served: Service
) -> None:
    launch = new_launch()
    with relay.client() as client:
        announce(client, "hostile", launch)
        before = numbers(client)
        for path, body, headers, status in HOSTILE:
            where = f"/api/v1/runs/hostile/{path.format(launch=launch)}"
            answer = client.put(where, content=body, headers=headers)
            assert answer.status_code == status, (path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
        for bad in ({}, {"run": "a/b", "launch_id": launch}, {"run": "x", "launch_id": launch}):
            assert client.post("/api/v1/runs", json=bad).status_code in (409, 422)
        after = numbers(client)
        for name in ("batches", "bundles", "rank_steps", "waiting_batches", "pending_steps"):
            assert after[name] == before[name], name
        assert client.get("/healthz").json() == {"status": "ok", "reasons": []}


def test_a_batch_that_the_service_refuses_does_not_hold_up_the_others(
    served: Service, tmp_path: Path
) -> None:
    relay = relay_to(tmp_path / "relay", served.url, "--wait", "0")
    launch = new_launch()
    with served.client() as client:
        # Through the other door, with other contents.
        body = {"run": "refused", "launch_id": launch}
        assert client.post("/api/v1/runs", json=body).is_success
        assert put_records(client, "refused", launch, 0, make_records(7, 1)).is_success
    with relay.client() as client:
        announce(client, "refused", launch)
        for sequence in range(2):
            records = make_records(8 + sequence, 1)
            assert put_records(client, "refused", launch, sequence, records).is_success
        wait_for(lambda: numbers(client)["forwarded_batches"] == 1)
        assert numbers(client)["refused_batches"] == 1
    assert [r.step for r in stored(served, "refused", 2)] == [7, 9]
    assert relay.stop() == 0, relay.log
    assert "409" in relay.log


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0", "--url", "http://x"], "FORESHOCK_TOKEN"),
        ([], "--url"),
        (["--url", "ftp://x"], "http"),
        (["--url", "http://"], "http://host:port"),
        (["--url", "https://:8420"], "http://host:port"),
        (["--relay", "http://x:84x0"], "http://host:port"),
        (["--url", "http://x y"], "http://host:port"),
        (["--url", "http://x", "--data", __file__], "is a file"),
        (["--url", "http://x", "--data", f"{__file__}/below"], "is a file"),
        (["--url", "http://x", "--wait", "nan"], "wait"),
        (["--url", "http://x", "--token", "short"], "16"),
    ],
)
def test_wrong_use_is_refused_at_the_start(
    arguments: list[str], reason: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "from foreshock.api.cli.main import run; run()", "collect"]
    environment: dict[str, Any] = {
        k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")
    }
    done = subprocess.run(
        [*command, "--data", str(tmp_path / "data"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()
