"""Shipping against services that answer, forget, refuse, are slow, or are not there."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from foreshock.monitor import Watch
from foreshock.monitor.record import read_stream, record_batch
from foreshock.monitor.shipping import Service, Shipper, ship_leftovers
from foreshock.monitor.spool import Outbox, Spool
from tests.monitor.models import folder_of, tiny, train

URL = "http://service.test"


class FakeService:
    """Keeps batches as the real one does: by id, a launch must be known first."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.batches: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.answers: list[httpx.Response | Exception] = []
        self.tokens: set[str | None] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(f"{request.method} {request.url.path}")
        self.tokens.add(request.headers.get("Authorization"))
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if request.url.path == "/api/v1/runs":
            self.launches.append(json.loads(request.content))
            return httpx.Response(201, json={"run_id": "0" * 32, "attempt": 1})
        batch_id = request.url.path.rsplit("/", 1)[1]
        if not any(batch_id.startswith(launch["launch_id"]) for launch in self.launches):
            return httpx.Response(404, text="unknown launch")
        new = self.batches.setdefault(batch_id, request.content) is request.content
        return httpx.Response(201 if new else 200, json={"duplicate": not new})

    def service(self, token: str | None = None) -> Service:
        return Service(URL, token=token, transport=httpx.MockTransport(self))

    def steps(self) -> list[int]:
        return [
            step
            for body in list(self.batches.values())
            for step in read_stream(body)["step"].to_pylist()
        ]


@pytest.fixture
def fake() -> FakeService:
    return FakeService()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.monitor.shipping._FIRST_WAIT", 0.01)


def filled(root: Path, batches: int = 2) -> Spool:
    body = {"project": "p", "run": "r", "launch_id": str(uuid.uuid4()), "layers": ["a"]}
    spool = Spool(root, body)
    for step in range(batches):
        spool.append(
            record_batch(step=step, time=datetime(2026, 1, 31, tzinfo=UTC), scalars={"loss": 1.0})
        )
        spool.seal()
    return spool


def test_a_batch_leaves_the_disk_once_it_is_acknowledged(tmp_path: Path, fake: FakeService) -> None:
    spool = filled(tmp_path, 3)
    shipper = Shipper(fake.service("secret"), spool.outbox)
    assert shipper.close(5)
    assert fake.steps() == [0, 1, 2]
    assert fake.requests[0] == "POST /api/v1/runs"
    assert fake.requests[1] == f"PUT /api/v1/runs/r/batches/{spool.outbox.folder.name}-0"
    assert fake.requests.count("POST /api/v1/runs") == 1
    assert fake.launches[0]["layers"] == ["a"]
    assert fake.tokens == {"Bearer secret"}
    spool.close()
    assert not spool.outbox.folder.exists()


def test_an_unknown_run_is_posted_and_the_batch_sent_again(
    tmp_path: Path, fake: FakeService
) -> None:
    spool = filled(tmp_path, 1)
    shipper = Shipper(fake.service(), spool.outbox)
    wait_for(lambda: fake.steps() == [0])
    # The service comes back with an empty registry.
    fake.launches.clear()
    spool.append(record_batch(step=1, time=datetime.now(UTC), scalars={}))
    spool.seal()
    assert shipper.close(5)
    assert fake.steps() == [0, 1]
    assert fake.requests.count("POST /api/v1/runs") == 2
    spool.close()


def test_a_duplicate_is_an_acknowledgement(tmp_path: Path, fake: FakeService) -> None:
    spool = filled(tmp_path, 1)
    fake.batches[f"{spool.outbox.folder.name}-0"] = spool.outbox.sealed()[0].read_bytes()
    assert Shipper(fake.service(), spool.outbox).close(5)
    assert fake.steps() == [0]
    spool.close()


@pytest.mark.parametrize("status", [409, 422])
def test_a_refused_batch_stands_aside_and_the_next_ones_go_on(
    tmp_path: Path, fake: FakeService, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    spool = filled(tmp_path, 3)
    fake.answers = [httpx.Response(201), *[httpx.Response(status, text="record 0: bad")] * 2]
    fake.launches = [spool.outbox.registration()]
    with caplog.at_level(logging.WARNING):
        assert Shipper(fake.service(), spool.outbox).close(5)
    assert fake.steps() == [2]
    reason = (spool.outbox.folder / "refused" / "0000000000.arrow.reason.txt").read_text()
    assert reason == f"{status}: record 0: bad\n"
    assert len([r for r in caplog.records if "refused a batch" in r.message]) == 1
    spool.close()


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(401, text="no token"),
        httpx.Response(403),
        httpx.Response(429, headers={"Retry-After": "0.01"}),
        httpx.Response(500, text="boom"),
        httpx.Response(503, headers={"Retry-After": "soon"}),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
    ],
    ids=lambda answer: str(getattr(answer, "status_code", type(answer).__name__)),
)
def test_what_may_pass_is_tried_again(
    tmp_path: Path, fake: FakeService, answer: httpx.Response | Exception
) -> None:
    spool = filled(tmp_path, 2)
    fake.answers = [answer, answer]
    shipper = Shipper(fake.service(), spool.outbox)
    wait_for(lambda: fake.steps() == [0, 1])
    assert shipper.close(5)
    assert not (spool.outbox.folder / "refused").exists()
    spool.close()


def test_closing_is_bounded_and_keeps_the_files(tmp_path: Path, fake: FakeService) -> None:
    spool = filled(tmp_path, 2)
    fake.answers = [httpx.ConnectError("refused")] * 10_000
    began = time.monotonic()
    assert not Shipper(fake.service(), spool.outbox).close(0.5)
    assert time.monotonic() - began < 2
    assert len(spool.outbox.sealed()) == 2
    spool.close()


def test_the_next_start_ships_what_the_last_one_left(tmp_path: Path, fake: FakeService) -> None:
    filled(tmp_path, 2).close()
    spool = filled(tmp_path, 0)
    shipper = Shipper(fake.service(), spool.outbox, root=tmp_path)
    wait_for(lambda: fake.steps() == [0, 1])
    shipper.close(5)
    spool.close()
    assert list(tmp_path.glob("*/*/*")) == []


def test_import_ships_leftovers_and_passes_over_the_living(
    tmp_path: Path, fake: FakeService
) -> None:
    filled(tmp_path, 2).close()
    living = filled(tmp_path, 1)
    seen: list[Path] = []
    shipped = ship_leftovers(fake.service(), tmp_path, progress=seen.append)
    assert (shipped.batches, shipped.refused, shipped.waiting) == (2, 0, 0)
    assert len(seen) == 2
    assert [path.parent for path in tmp_path.glob("*/*/*/run.json")] == [living.outbox.folder]
    living.close()
    fake.answers = [httpx.Response(422, text="too old")] * 2
    assert ship_leftovers(fake.service(), tmp_path).refused == 1


def test_import_stops_when_nobody_answers(tmp_path: Path, fake: FakeService) -> None:
    filled(tmp_path, 2).close()
    fake.answers = [httpx.ConnectError("refused")]
    shipped = ship_leftovers(fake.service(), tmp_path)
    assert (shipped.batches, shipped.waiting) == (0, 2)
    assert "refused" in shipped.reason


def test_a_wrong_address_is_refused() -> None:
    with pytest.raises(ValueError, match="http://"):
        Service("service:8787")


class _Handler(BaseHTTPRequestHandler):
    delay = 0.0
    status = 201

    def _answer(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(self.delay)
        self.send_response(self.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def server(*, delay: float = 0.0, status: int = 201) -> Iterator[str]:
    """A real service on a real socket."""
    handler = type("Handler", (_Handler,), {"delay": delay, "status": status})
    service = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    service.daemon_threads = True
    service.block_on_close = False
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{service.server_address[1]}"
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


@contextmanager
def nobody() -> Iterator[str]:
    """A port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        (lambda: server(delay=5.0), "sealed"),
        (lambda: server(status=503), "sealed"),
        (lambda: server(status=401), "sealed"),
        (lambda: server(status=422), "refused"),
        (nobody, "sealed"),
        (server, "nothing"),
    ],
    ids=["slow", "down", "unauthorised", "refusing", "dead", "well"],
)
def test_no_service_slows_or_stops_training(
    start: Callable[..., Watch],
    place: Callable[[], Any],
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    plain, plain_optimizer = tiny()
    expected = train(plain, plain_optimizer, steps=30)
    model, optimizer = tiny()
    with place() as url:
        watched = start(model, optimizer, url=url, tensor_every=10)
        began = time.monotonic()
        losses = train(model, optimizer, steps=30)
        seconds = time.monotonic() - began
        folder = folder_of(watched.folder)
        began = time.monotonic()
        assert watched.close(1.0) == (kept != "sealed")
        assert time.monotonic() - began < 4
    assert losses == expected
    assert watched.errors == 0
    # 30 steps of milliseconds; one answer waited for would show.
    assert seconds < 4.5
    outbox = Outbox(folder)
    assert bool(outbox.sealed()) == (kept == "sealed")
    assert (folder / "refused").exists() == (kept == "refused")


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)
