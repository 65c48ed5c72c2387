"""Two replicas of the service on one PostgreSQL and one ClickHouse; one is killed."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from foreshock.api.alert_log import AlertLog
from foreshock.api.leases import RunLeases
from foreshock.api.registry import Registry
from foreshock.api.store import View
from foreshock.api.store_open import open_store
from foreshock.api.store_url import parse_store
from tests.api.clickhouse_front import Front
from tests.api.live_helpers import SUBJECT, content, receiver_process, risk
from tests.api.postgres import Postgres, running_postgres
from tests.api.service import Service, make_records, new_launch, post_run, put_records
from tests.api.test_shards import (
    Log,
    address,
    assert_exactly_once,
    send,
    wait_for_more,
    wait_until_swept,
)

pytestmark = pytest.mark.debian


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def test_a_lease_is_one_replicas_until_it_ends(postgres: Postgres) -> None:
    registry = Registry(sa.make_url(postgres.new_database()))
    taken: list[str] = []
    one = RunLeases(registry, "one", lambda: taken.append("one"), seconds=1.0)
    two = RunLeases(registry, "two", lambda: taken.append("two"), seconds=60.0)
    assert one.mine({"a", "b"}) == {"a", "b"}
    assert two.mine({"a", "c"}) == {"c"}
    assert not two.holds("a")
    one.keep({"a"})
    # Given up by its holder, and known to be another's for a moment only.
    deadline = time.monotonic() + 30
    while two.mine({"b"}) != {"b"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Not renewed any more.
    while two.mine({"a"}) != {"a"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not one.holds("a")
    assert one.mine({"a"}) == set()
    two.leave()
    assert taken[0] == "one"
    assert {"one", "two"} == set(taken)
    registry.close()


def test_a_replica_that_takes_a_run_over_knows_its_alerts(postgres: Postgres) -> None:
    registry = Registry(sa.make_url(postgres.new_database()))
    one, two = AlertLog(registry, ["hook"]), AlertLog(registry, ["hook"])
    (fired,) = one.follow(SUBJECT, risk(300, "firing", "forecast"), lambda: content(300))
    (news,) = two.refresh()
    assert news.id == fired.id
    # The same records scored again there: one alert, one message.
    assert two.follow(SUBJECT, risk(300, "firing", "forecast"), lambda: content(300)) == ()
    (ended,) = two.follow(SUBJECT, risk(400), lambda: content(400))
    assert [alert.state for alert in one.refresh()] == ["resolved"]
    assert one.open_attempts() == ()
    sent = one.delivered([ended.id])[ended.id]
    assert [message["transition"] for message in sent] == ["firing", "resolved"]
    registry.close()


def newest_risk(service: Service, run_id: str) -> int:
    with service.client() as client:
        answer = client.get(f"/api/v1/runs/{run_id}/risk")
        assert answer.status_code == 200, answer.text
        step = answer.json()["step"]
        return -1 if step is None else int(step)


def risk_event(service: Service, run_id: str) -> dict[str, Any]:
    """The first risk that a reader of one run sees at a replica."""
    with (
        httpx.Client(base_url=service.url, timeout=120) as client,
        client.stream("GET", f"/api/v1/runs/{run_id}/events") as stream,
    ):
        kind = ""
        for line in stream.iter_lines():
            kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
            if line.startswith("data: ") and kind == "risk":
                found: dict[str, Any] = json.loads(line.removeprefix("data: "))
                return found
    raise AssertionError("the stream ended")


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    (tmp_path / "front").mkdir()
    made = Front(tmp_path / "front")
    made.start()
    yield made
    made.kill()


def started(folder: Path, hook: str, environment: dict[str, str]) -> Service:
    folder.mkdir()
    service = Service(folder, "--alert-url", hook, environment=environment)
    service.start()
    return service


def announced(service: Service, count: int) -> list[Log]:
    logs = []
    with service.client() as client:
        for number in range(count):
            launch = new_launch()
            logs.append(Log(launch, post_run(client, f"run-{number}", launch)["run_id"]))
    return logs


# Every seventh batch goes back and begins an attempt: flat out, one would be over before anybody
# has looked at it, and a reader would only ever see attempts without a risk.
PAUSE = 0.2


@contextmanager
def sending(services: list[Service], logs: list[Log]) -> Iterator[None]:
    """Every run's batches go to the replicas in turn."""
    stop = threading.Event()
    urls = [service.url for service in services]
    threads = [threading.Thread(target=send, args=(urls, log, stop, PAUSE)) for log in logs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def wait_until_scored(service: Service, registry: Registry, logs: list[Log]) -> None:
    deadline = time.monotonic() + 180
    for log in logs:
        run = registry.run(log.run_id)
        assert run is not None
        assert run.current is not None
        while newest_risk(service, log.run_id) != run.current.last_step:
            assert time.monotonic() < deadline, service.log
            time.sleep(0.2)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_lost_replica_loses_nothing_and_doubles_nothing(
    postgres: Postgres, front: Front, tmp_path: Path
) -> None:
    database = postgres.new_database()
    registry = Registry(sa.make_url(database))
    environment = {"FORESHOCK_STORE": address(front), "FORESHOCK_DATABASE": database}
    (tmp_path / "hook").mkdir()
    with receiver_process(tmp_path / "hook") as receiver:
        one, two = (started(tmp_path / n, receiver.url, environment) for n in ("one", "two"))
        logs = announced(one, 3)
        with sending([one, two], logs):
            wait_for_more(logs)
            # Whichever replica analyses the run, a reader may ask either.
            for service in (one, two):
                assert risk_event(service, logs[0].run_id)["run"] == "run-0"
            one.kill()
            wait_for_more(logs)
            wait_for_more(logs)
        wait_until_scored(two, registry, logs)
        wait_until_swept(registry)
        assert two.stop() == 0, two.log
        bodies = receiver.bodies()
    told = Counter((body["title"], body["message"]) for body in bodies)
    # A replica that is killed between sending a message and noting it leaves that one in doubt.
    assert sum(count - 1 for count in told.values()) <= 1, told
    store = open_store(parse_store(address(front), tmp_path), registry.layer_names)
    assert_exactly_once(store, registry, logs)
    for log in logs:
        run = registry.run(log.run_id)
        assert run is not None
        assert run.current is not None
        # Every record has its risk, those that the lost replica had not answered too.
        number = run.current.number
        steps = store.step_window(View(log.run_id, number))["step"].to_pylist()
        scored = store.risk_history(log.run_id, number, 0, 2**40)["step"].to_pylist()
        assert sorted(set(scored)) == steps
    store.close()
    registry.close()


@pytest.mark.long
def test_a_run_deleted_at_one_replica_is_gone_at_the_other(
    postgres: Postgres, front: Front, tmp_path: Path
) -> None:
    database = postgres.new_database()
    environment = {"FORESHOCK_STORE": address(front), "FORESHOCK_DATABASE": database}
    services = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        services.append(Service(tmp_path / name, environment=environment))
        services[-1].start()
    launch = new_launch()
    with services[0].client() as one, services[1].client() as two:
        # The second attempt, so that a remembered number would be a wrong one.
        post_run(one, "doomed", new_launch())
        old = post_run(one, "doomed", launch)["run_id"]
        assert put_records(two, old, launch, 0, make_records(0, 8)).json()["attempts"] == [2]
        assert one.delete(f"/api/v1/runs/{old}").status_code == 204
        assert two.get(f"/api/v1/runs/{old}").status_code == 404
        fresh = post_run(one, "doomed", launch)["run_id"]
        assert fresh != old
        sent = put_records(two, fresh, launch, 0, make_records(0, 8))
        assert (sent.status_code, sent.json()["attempts"]) == (201, [1]), sent.text
        assert two.get(f"/api/v1/runs/{fresh}").json()["last_step"] == 7
    for service in services:
        assert service.stop() == 0, service.log
        assert "Traceback" not in service.log
