"""The client alone: patience, errors, streams that break; the service is a function here."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from foreshock.monitor import Client
from foreshock.monitor.client import (
    ClientError,
    Conflict,
    Forbidden,
    InvalidRequest,
    MissingPackage,
    NoAnswer,
    NotFound,
    Problem,
    RateLimited,
    Retry,
    ServiceFailure,
    TooLarge,
    Unauthorized,
)

Handler = Callable[[httpx.Request], httpx.Response]
RUN = {
    "run_id": "a" * 32,
    "project": "default",
    "run": "llama",
    "status": "live",
    "attempts": 1,
    "attempt": 1,
    "first_step": 0,
    "last_step": 5,
    "created_at": "2026-01-30T08:00:00Z",
    "last_received": None,
    "loss": "NaN",
    "state": None,
    "kind": None,
    "risk": {"10": 0.5, "100": None},
    "a_member_of_the_future": 1,
}


class Scene:
    """A client, what it asked, and how long it waited."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.requests: list[httpx.Request] = []
        self.waits: list[float] = []
        self._answers = iter(answers)
        transport = httpx.MockTransport(self._answer)
        retry = Retry(tries=4, sleep=self.waits.append)
        self.client = Client(
            "http://service", token="secret-token", retry=retry, transport=transport
        )

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def problem(status: int, **members: Any) -> httpx.Response:
    body = {
        "type": "about:blank",
        "title": "x",
        "status": status,
        "detail": "the reason",
        **members,
    }
    return httpx.Response(status, json=body)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (406, InvalidRequest),
        (409, Conflict),
        (413, TooLarge),
        (415, InvalidRequest),
        (418, Problem),
        (422, InvalidRequest),
        (500, ServiceFailure),
    ],
)
def test_each_problem_is_an_error_of_its_own(status: int, kind: type[Problem]) -> None:
    scene = Scene(problem(status, record=3))
    with pytest.raises(kind, match="the reason") as raised:
        scene.client.risk("llama")
    assert isinstance(raised.value, ClientError)
    assert (raised.value.status, raised.value.members) == (status, {"record": 3})
    assert len(scene.requests) == 1


def test_what_is_no_problem_body_is_told_too() -> None:
    scene = Scene(httpx.Response(404, text="<h1>a proxy</h1>"))
    with pytest.raises(NotFound, match="a proxy"):
        scene.client.risk("llama")


def test_a_busy_or_absent_service_is_asked_again() -> None:
    busy = httpx.Response(503, headers={"Retry-After": "7"}, json={"detail": "busy"})
    scene = Scene(
        busy, httpx.ConnectError("refused"), httpx.Response(200, json={"runs": [RUN], "next": None})
    )
    (run,) = scene.client.runs()
    assert (run.run, run.risk) == ("llama", {10: 0.5, 100: None})
    assert run.loss != run.loss
    assert len(scene.requests) == 3
    assert scene.waits[0] >= 7
    assert scene.requests[0].headers["authorization"] == "Bearer secret-token"


def test_patience_ends() -> None:
    scene = Scene(*[problem(429)] * 4)
    with pytest.raises(RateLimited):
        scene.client.risk("llama")
    assert (len(scene.requests), len(scene.waits)) == (4, 3)
    scene = Scene(*[httpx.ReadTimeout("")] * 4)
    with pytest.raises(NoAnswer, match="http://service"):
        scene.client.risk("llama")


def test_a_token_is_not_made_twice() -> None:
    scene = Scene(httpx.ReadTimeout("late"))
    with pytest.raises(NoAnswer):
        scene.client.create_token("a", ["read"])
    assert len(scene.requests) == 1


def test_pages_are_followed_to_the_end_or_the_limit() -> None:
    def page(count: int, cursor: str | None) -> httpx.Response:
        return httpx.Response(200, json={"runs": [RUN] * count, "next": cursor})

    scene = Scene(page(2, "b"), page(1, None))
    assert len(scene.client.runs(state="firing")) == 3
    assert [r.url.params.get("cursor") for r in scene.requests] == [None, "b"]
    assert "name" not in scene.requests[0].url.params
    scene = Scene(page(2, "b"))
    assert len(scene.client.runs(limit=2)) == 2
    assert scene.requests[0].url.params["limit"] == "2"


def test_names_become_one_part_of_the_address() -> None:
    scene = Scene(problem(404))
    with pytest.raises(NotFound):
        scene.client.run("../alerts?x=1")
    assert scene.requests[0].url.raw_path.startswith(b"/api/v1/runs/..%2Falerts%3Fx%3D1?")


class Broken(httpx.SyncByteStream):
    """A body that ends in the middle."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        raise httpx.ReadError("cut")


def test_events_go_on_after_a_break() -> None:
    first = Broken(
        b"id: e-0\nretry: 2000\n\n: a comment\n\nid: e-1\nevent: step\nda",
        b'ta: {"step":\ndata: 1}\n\nid: e-2\nevent: risk\n',
    )
    second = b'id: e-2\nevent: reset\ndata: {"reason": "overrun", "missed": 3}\n\n'
    scene = Scene(
        httpx.Response(200, stream=first),
        httpx.ConnectError("restarting"),
        httpx.Response(200, content=second),
    )
    found = []
    for event in scene.client.run_events("llama"):
        found.append((event.id, event.kind, dict(event.data)))
        if event.kind == "reset":
            break
    assert found == [
        ("e-1", "step", {"step": 1}),
        ("e-2", "reset", {"reason": "overrun", "missed": 3}),
    ]
    given = [request.headers.get("last-event-id") for request in scene.requests]
    assert given == [None, "e-2", "e-2"]


def test_events_say_when_the_service_stays_away() -> None:
    scene = Scene(*[httpx.ConnectError("refused")] * 4)
    with pytest.raises(NoAnswer):
        next(scene.client.events())


def test_an_answer_cut_short_is_no_answer() -> None:
    scene = Scene(httpx.Response(200, stream=Broken(b"abc")))
    with pytest.raises(NoAnswer):
        list(scene.client.record_batches("llama"))


def test_where_and_who_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # As files of secrets have it.
    monkeypatch.setenv("FORESHOCK_URL", "https://watch.example/\n")
    monkeypatch.setenv("FORESHOCK_TOKEN", " from-the-environment\n")
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"status": "ok"})

    with Client(transport=httpx.MockTransport(answer)) as client:
        assert client.healthy()
        assert "environment" not in repr(client)
    assert str(seen[0].url) == "https://watch.example/healthz"
    assert seen[0].headers["authorization"] == "Bearer from-the-environment"
    with pytest.raises(ValueError, match="allowed: http"):
        Client("ftp://watch")
    with pytest.raises(ValueError, match="FORESHOCK_TOKEN"):
        Client(token="two words")


def test_without_pandas_a_frame_is_refused_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    scene = Scene(httpx.Response(200, content=json.dumps({}).encode()))
    with pytest.raises(MissingPackage, match="pip install pandas"):
        scene.client.series("llama", "loss")
    assert scene.requests == []
