"""Announcing runs and sending batches to a real service over HTTP."""

from __future__ import annotations

import gzip
import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import zstandard

from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import records_to_json, records_to_table, write_stream
from tests.api.service import (
    Service,
    batch_path,
    make_record,
    make_records,
    new_launch,
    post_run,
    put_records,
)
from tests.api.test_wire import encoded

PROBLEM = "application/problem+json"
# The same in every process that collects the tests.
LAUNCH = "5f0c6c0e-2f5d-4d0b-9a53-0f6f2b1b7d11"


def launched(client: httpx.Client, name: str | None = None) -> tuple[str, str]:
    launch = new_launch()
    return post_run(client, name or f"run-{launch[:8]}", launch)["run_id"], launch


def is_problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body = response.json()
    assert body["status"] == status
    assert "Traceback" not in response.text
    return str(body["detail"])


def steps_of(client: httpx.Client, run_id: str) -> list[int]:
    found: list[int] = client.get(f"/api/v1/runs/{run_id}/series?name=loss").json()["step"]
    return found


def test_the_same_launch_the_same_answer(client: httpx.Client) -> None:
    launch = new_launch()
    name = f"run-{launch[:8]}"
    first = client.post("/api/v1/runs", json={"run": name, "launch_id": launch})
    again = client.post("/api/v1/runs", json={"run": name, "launch_id": launch.upper()})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert first.json()["attempt"] == 1
    assert post_run(client, name, new_launch())["attempt"] == 2
    other = client.post("/api/v1/runs", json={"run": "elsewhere", "launch_id": launch})
    is_problem(other, 409)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"launch_id": new_launch()}, "run"),
        ({"run": "a b", "launch_id": new_launch()}, "run"),
        ({"run": "a" * 129, "launch_id": new_launch()}, "run"),
        ({"run": "a" * 32, "launch_id": new_launch()}, "run_id"),
        ({"run": "a", "launch_id": "7"}, "launch_id"),
        ({"run": "a", "launch_id": new_launch(), "first_step": -1}, "first_step"),
        ({"run": "a", "launch_id": new_launch(), "layers": [""]}, "layers"),
    ],
)
def test_a_wrong_announcement_is_told_what_is_wrong(
    client: httpx.Client, body: dict[str, object], named: str
) -> None:
    assert named in is_problem(client.post("/api/v1/runs", json=body), 422)


def test_no_json_at_all(client: httpx.Client) -> None:
    headers = {"Content-Type": JSON}
    is_problem(client.post("/api/v1/runs", content=b"{", headers=headers), 422)


@pytest.mark.parametrize("encoding", [None, "gzip", "zstd"])
@pytest.mark.parametrize("media_type", [ARROW, JSON])
def test_every_format_and_encoding_is_stored_once(
    client: httpx.Client, media_type: str, encoding: str | None
) -> None:
    run_id, launch = launched(client)
    records = [make_record(0), make_record(1, value=math.nan), make_record(2, value=-math.inf)]
    plain = (
        records_to_json(records) if media_type == JSON else write_stream(records_to_table(records))
    )
    headers = {"Content-Type": media_type}
    if encoding:
        headers["Content-Encoding"] = encoding
    path = batch_path(run_id, launch, 1)
    answer = client.put(path, content=encoded(plain, encoding or "identity"), headers=headers)
    assert (answer.status_code, answer.json()) == (
        201,
        {"duplicate": False, "attempts": [1], "records": 3},
    )
    # The digest is of the decoded body: another encoding of it is the same batch.
    again = client.put(path, content=plain, headers={"Content-Type": media_type})
    assert (again.status_code, again.json()["duplicate"]) == (200, True)
    series = client.get(f"/api/v1/runs/{run_id}/series?name=loss").json()
    assert series["mean"] == [0.0, "NaN", "-Infinity"]


def test_the_same_id_for_other_contents_is_a_conflict(client: httpx.Client) -> None:
    run_id, launch = launched(client)
    assert put_records(client, run_id, launch, 1, make_records(0, 3)).status_code == 201
    is_problem(put_records(client, run_id, launch, 1, make_records(0, 4)), 409)
    assert steps_of(client, run_id) == [0, 1, 2]


def test_an_unknown_run_or_launch_is_404_until_it_is_announced(client: httpx.Client) -> None:
    run_id, _ = launched(client)
    launch, name = new_launch(), f"late-{new_launch()[:8]}"
    assert "POST" in is_problem(put_records(client, run_id, launch, 1, make_records(0, 1)), 404)
    post_run(client, name, launch)
    is_problem(put_records(client, run_id, launch, 1, make_records(0, 1)), 404)
    # The name of the run stands for its id.
    assert put_records(client, name, launch, 1, make_records(0, 1)).status_code == 201


@pytest.mark.parametrize("batch", ["x-0-1", f"{LAUNCH}-0", f"{LAUNCH}-0--1", "1-2-3"])
def test_a_batch_id_says_what_it_should_be(client: httpx.Client, batch: str) -> None:
    run_id, _ = launched(client)
    response = client.put(f"/api/v1/runs/{run_id}/batches/{batch}", content=b"")
    assert "launch_id" in is_problem(response, 422)


def test_one_bad_record_refuses_the_batch_and_is_named(client: httpx.Client) -> None:
    run_id, launch = launched(client)
    time = "2026-01-01T00:00:00Z"
    rows = [{"step": 0, "time": time, "scalars": {"loss": 1.0}}, {"step": -1, "time": time}]
    path = batch_path(run_id, launch, 1)
    answer = client.put(path, json={"records": rows})
    assert "negative" in is_problem(answer, 422)
    assert answer.json()["record"] == 1
    assert steps_of(client, run_id) == []
    # Nothing was kept of it: the id is free for the corrected batch.
    assert client.put(path, json={"records": rows[:1]}).status_code == 201


def test_bodies_that_are_not_what_they_say(client: httpx.Client) -> None:
    run_id, launch = launched(client)
    path = batch_path(run_id, launch, 1)
    body = write_stream(records_to_table(make_records(0, 3)))
    arrow = {"Content-Type": ARROW}
    for bad in (b"", b"nonsense", body[: len(body) // 2], body[:-1], body + b"x"):
        is_problem(client.put(path, content=bad, headers=arrow), 422)
    is_problem(client.put(path, content=body, headers={"Content-Type": "text/plain"}), 415)
    is_problem(client.put(path, content=body, headers=arrow | {"Content-Encoding": "br"}), 415)
    broken = {**arrow, "Content-Encoding": "gzip"}
    is_problem(client.put(path, content=gzip.compress(body)[:-4], headers=broken), 422)
    bomb = zstandard.compress(bytes(300 * 1024 * 1024))
    packed = {**arrow, "Content-Encoding": "zstd"}
    is_problem(client.put(path, content=bomb, headers=packed), 413)
    is_problem(client.put(path, content=bytes(65 * 1024 * 1024), headers=arrow), 413)
    assert client.put(path, content=body, headers=arrow).status_code == 201


def test_two_launches_and_a_rollback_are_three_attempts(client: httpx.Client) -> None:
    name = f"restarted-{new_launch()[:8]}"
    run_id, first = launched(client, name)
    _, second = launched(client, name)
    put_records(client, run_id, first, 1, make_records(0, 10))
    resumed = [make_record(step, value=100.0 + step) for step in (5, 6, 7)]
    assert put_records(client, run_id, second, 1, resumed).json()["attempts"] == [2]
    rolled = [make_record(step, value=200.0 + step) for step in (6, 7)]
    assert put_records(client, run_id, second, 2, rolled).json()["attempts"] == [3]
    detail = client.get(f"/api/v1/runs/{run_id}").json()
    spans = [(a["number"], a["first_step"], a["last_step"]) for a in detail["history"]]
    assert spans == [(1, 0, 9), (2, 5, 7), (3, 6, 7)]
    assert (detail["attempts"], detail["attempt"], detail["last_step"]) == (3, 3, 7)
    assert detail["loss"] == 207.0

    def loss(query: str = "") -> list[float]:
        answer = client.get(f"/api/v1/runs/{run_id}/series?name=loss{query}").json()
        return list(answer["mean"])

    assert loss() == [0, 1, 2, 3, 4, 105, 206, 207, 8, 9]
    assert loss("&attempt=1") == [float(step) for step in range(10)]
    assert loss("&attempt=2") == [105, 106, 107]
    is_problem(client.get(f"/api/v1/runs/{run_id}/series?name=loss&attempt=9"), 404)


def test_many_clients_and_the_same_batches_at_once(served: Service) -> None:
    with served.client() as client:
        run_id, launch = launched(client)

        def send(sequence: int) -> int:
            records = make_records(10 * sequence, 10)
            return put_records(client, run_id, launch, sequence, records).status_code

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(send, [*range(20), *range(20)]))
        assert sorted(statuses) == [200] * 20 + [201] * 20
        raw = client.get(f"/api/v1/runs/{run_id}/records", headers={"Accept": JSON})
        assert [row["step"] for row in raw.json()["records"]] == list(range(200))


def test_json_numbers_that_are_words(client: httpx.Client) -> None:
    run_id, launch = launched(client)
    rows = [{"step": 0, "time": "2026-01-01T00:00:00Z", "scalars": {"loss": "NaNo"}}]
    answer = client.put(batch_path(run_id, launch, 1), json={"records": rows})
    assert "Infinity" in is_problem(answer, 422)
    bare = json.dumps({"records": rows}).replace('"NaNo"', "NaN")
    headers = {"Content-Type": JSON}
    answer = client.put(batch_path(run_id, launch, 1), content=bare, headers=headers)
    assert answer.status_code == 201
