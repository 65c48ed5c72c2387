"""Clients that are slow, silent or endless cost bounded time and memory, and hold up nobody."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from foreshock.api.wire import ARROW
from foreshock.monitor.record import records_to_table, write_stream
from tests.api.service import (
    Service,
    batch_path,
    make_records,
    new_launch,
    post_run,
    put_records,
)

# The real times are 20 and 30 s; what bounds them is the same.
SHORT = {
    "FORESHOCK_HEAD_SECONDS": "1",
    "FORESHOCK_BODY_SECONDS": "1",
    "FORESHOCK_BODY_BYTES_RATE": "1000000",
    "FORESHOCK_MAX_CONNECTIONS": "64",
    "FORESHOCK_RECEIVING_BYTES": "3000000",
}
PATIENCE = 60.0


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("strict"), environment=SHORT)
    made.start()
    yield made
    assert made.stop() == 0, made.log


def connect(service: Service) -> socket.socket:
    address = urlsplit(service.url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)), PATIENCE)


def rest(connection: socket.socket) -> bytes:
    """Everything until the service closes."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def drip(connection: socket.socket, piece: bytes) -> bool:
    """Send a piece ten times a second; whether the service puts an end to it."""
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            connection.sendall(piece)
            time.sleep(0.1)
    except OSError:
        return True
    return False


def test_whoever_says_nothing_is_hung_up_on(strict: Service) -> None:
    with connect(strict) as silent:
        assert rest(silent) == b""


@pytest.mark.parametrize("beginning", [b"", b"\r\n", b"GET /healthz HTTP/1.1\r\nHost: localhost"])
def test_a_head_that_comes_drop_by_drop(strict: Service, beginning: bytes) -> None:
    with connect(strict) as slow:
        slow.sendall(beginning)
        assert drip(slow, b"\r\n" if beginning == b"\r\n" else b"x")


def test_a_head_without_end(strict: Service) -> None:
    with connect(strict) as endless:
        endless.sendall(b"GET /healthz HTTP/1.1\r\n")
        try:
            for number in range(100_000):
                endless.sendall(b"x-%d: %s\r\n" % (number, b"y" * 1000))
        except OSError:
            return
    raise AssertionError("the service took a head of 100 MB")


def test_another_request_after_an_answer_has_its_own_time(strict: Service) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(strict) as connection:
        for _ in range(3):
            connection.sendall(request)
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(65536) or b"}"
            assert received.startswith(b"HTTP/1.1 200")
            time.sleep(0.7)


def announced(service: Service) -> tuple[str, str]:
    launch = new_launch()
    with service.client() as client:
        return post_run(client, f"run-{launch[:8]}", launch)["run_id"], launch


def head(path: str, length: int) -> bytes:
    lines = (f"PUT {path} HTTP/1.1", "Host: localhost", f"Content-Type: {ARROW}")
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_a_body_that_comes_drop_by_drop(strict: Service) -> None:
    run_id, launch = announced(strict)
    with connect(strict) as slow:
        slow.sendall(head(batch_path(run_id, launch, 0), 10_000))
        drip(slow, b"x")
        slow.settimeout(PATIENCE)
        answer = rest(slow)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), answer
    with strict.client() as client:
        assert put_records(client, run_id, launch, 0, make_records(0, 2)).status_code == 201


def test_a_body_that_never_comes_is_answered(strict: Service) -> None:
    run_id, launch = announced(strict)
    with connect(strict) as silent:
        silent.sendall(head(batch_path(run_id, launch, 0), 10_000))
        answer = rest(silent)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"too slowly: 0 bytes" in answer


def test_a_body_that_ends_in_the_middle_stores_nothing(strict: Service) -> None:
    run_id, launch = announced(strict)
    body = write_stream(records_to_table(make_records(0, 2)))
    with connect(strict) as gone:
        gone.sendall(head(batch_path(run_id, launch, 0), len(body)) + body[:-1])
    with strict.client() as client:
        answer = put_records(client, run_id, launch, 0, make_records(0, 2))
        assert (answer.status_code, answer.json()["duplicate"]) == (201, False)


def test_bodies_of_all_requests_are_bounded_together(strict: Service) -> None:
    """Four half bodies of a megabyte: the fourth finds the bound of three and goes away."""
    run_id, launch = announced(strict)
    opened = [connect(strict) for _ in range(4)]
    try:
        for number, connection in enumerate(opened):
            connection.sendall(head(batch_path(run_id, launch, number), 1_100_000))
            connection.sendall(b"x" * 1_000_000)
        answers = [rest(connection)[:12] for connection in opened]
    finally:
        for connection in opened:
            connection.close()
    assert set(answers) <= {b"HTTP/1.1 503", b"HTTP/1.1 408", b""}
    assert b"HTTP/1.1 503" in answers
    with strict.client() as client:
        assert put_records(client, run_id, launch, 9, make_records(0, 2)).status_code == 201


def test_half_open_clients_hold_up_nobody_and_go_away(strict: Service) -> None:
    """Two hundred connections, three times what is allowed: all gone in a while."""
    opened = [connect(strict) for _ in range(200)]
    try:
        closed = [rest(connection) for connection in opened]
    finally:
        for connection in opened:
            connection.close()
    assert len(closed) == 200
    run_id, launch = announced(strict)
    with strict.client() as client:
        assert put_records(client, run_id, launch, 0, make_records(0, 2)).status_code == 201


@pytest.mark.long
def test_a_client_that_does_not_read_is_given_up(strict: Service) -> None:
    with strict.client() as client:
        length = len(client.get("/assets/plotly.min.js").content)
    with connect(strict) as deaf:
        request = b"GET /assets/plotly.min.js HTTP/1.1\r\nHost: localhost\r\n"
        request += b"Accept-Encoding: identity\r\n\r\n"
        deaf.sendall(request * 8)
        # After three times the head's second it is cut off, with most of the answers unsent.
        time.sleep(8)
        received = len(rest(deaf))
    assert received < 8 * length
