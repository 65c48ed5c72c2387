"""The registry in a real PostgreSQL: the same answers, replicas that do not collide, a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from foreshock.api.access.admission import Access, Credentials
from foreshock.api.access.principal import Grant
from foreshock.api.alert_log import AlertLog
from foreshock.api.database import DatabaseUrlError, database_url
from foreshock.api.problems import Problem
from foreshock.api.registry import LaunchRequest, Registry
from foreshock.api.settings import Settings, SettingsError
from tests.api.live_helpers import SUBJECT, content, risk
from tests.api.postgres import Postgres, running_postgres
from tests.api.service import Service, make_records, new_launch, post_run, put_records
from tests.api.test_paging import ORDERS
from tests.api.test_paging import World as ListWorld

pytestmark = pytest.mark.debian


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def test_replicas_that_announce_the_same_things_at_once_agree(postgres: Postgres) -> None:
    url = sa.make_url(postgres.new_database())
    with ThreadPoolExecutor(4) as pool:
        registries = list(pool.map(lambda _: Registry(url), range(4)))
    launches = [new_launch() for _ in range(8)]
    jobs = [(registry, launch) for launch in launches for registry in registries]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda job: job[0].launch(
                    LaunchRequest(project="p", run="r", launch_id=job[1], layers=("a", "b"))
                ),
                jobs,
            )
        )
        run_id = answers[0][0]
        assert {answer[0] for answer in answers} == {run_id}
        assert sum(answer[2] for answer in answers) == len(launches)
        names = [f"layer.{index}" for index in range(20)]
        ids = list(
            pool.map(
                lambda job: job[0].layer_ids(run_id, names[job[1] : job[1] + 5]),
                [(registry, start) for start in range(15) for registry in registries],
            )
        )
    stored = registries[0].layer_names(run_id)
    assert sorted(stored) == sorted(["a", "b", *names[:19]])
    for found in ids:
        assert all(stored[number] == name for name, number in found.items())
    run = registries[3].run(run_id)
    assert run is not None
    assert [attempt.number for attempt in run.attempts] == list(range(1, 9))
    for registry in registries:
        registry.close()


def test_alerts_live_in_postgresql_too(postgres: Postgres) -> None:
    registry = Registry(sa.make_url(postgres.new_database()))
    log = AlertLog(registry, ["hook"])
    (fired,) = log.follow(SUBJECT, risk(300, "firing", "forecast"), lambda: content(300))
    (ended,) = log.follow(SUBJECT, risk(400), lambda: content(400))
    assert (fired.state, ended.state, ended.id) == ("firing", "resolved", fired.id)
    assert log.answer(fired.id, correct=True, note="yes").correct is True
    assert [m["transition"] for m in log.delivered([fired.id])[fired.id]] == ["firing", "resolved"]
    registry.close()


def test_tokens_sessions_and_the_audit_log_live_in_postgresql_too(postgres: Postgres) -> None:
    url = sa.make_url(postgres.new_database())
    one, two = Registry(url), Registry(url)
    settings = Settings(token="a-bootstrap-token-for-tests")
    here, there = Access(one, settings), Access(two, settings)
    issued = here.tokens.create("job", Grant(frozenset({"read"}), frozenset({"p"})), by="me")
    cookie, _ = here.sign_in(issued.secret, frozenset({"read"}), "10.0.0.1")
    there.tokens.list()
    assert there.admit(Credentials(cookie=cookie)).projects == frozenset({"p"})
    there.tokens.rotate(issued.token.id, grace=timedelta(0))
    here.tokens.list()
    with pytest.raises(Problem):
        here.admit(Credentials(issued.secret))
    there.close()
    entries = here.audit.page(limit=10)
    assert [entry.action for entry in entries] == ["auth.failed", "page.sign_in"]
    assert entries[0].at.tzinfo is not None
    one.close()
    two.close()


def test_runs_are_listed_from_postgresql_too(postgres: Postgres) -> None:
    world = ListWorld(Registry(sa.make_url(postgres.new_database())))
    ids = [
        world.add(f"run-{n}", age=n, heard=n if n % 2 else None, worst=n / 8 if n % 3 else None)
        for n in range(6)
    ]
    world.registry.end_run(ids[1], 1, 9)
    for order in ORDERS:
        seen = world.walk(order, 2)
        assert sorted(seen) == sorted(ids)
        assert seen == world.walk(order, 100)
    assert world.walk("created", 2) == ids
    assert world.walk("risk", 2)[0] == ids[5]
    assert world.walk("name", 2, status="new") == [ids[0], ids[2], ids[4]]
    assert world.walk("name", 2, status="finished") == [ids[1]]
    world.states[ids[3]] = "stale"
    assert world.walk("name", 2, status="stale", prefix="run-") == [ids[3]]
    assert world.walk("name", 2, status="live", projects=frozenset({"p"})) == [ids[5]]
    world.registry.close()


def test_names_are_held_against_everybody(postgres: Postgres) -> None:
    url = sa.make_url(postgres.new_database())
    one, two = Registry(url), Registry(url)
    held, order = threading.Event(), []

    def second() -> None:
        held.wait()
        with two.database.holding(["b", "c"]):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with one.database.holding(["a", "b"]):
        held.set()
        with two.database.holding(["c", "d"]):
            time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    one.close()
    two.close()


def test_an_address_never_shows_its_password() -> None:
    for text in ("mysql://u:hidden@h/x", "postgresql:/u:hidden", "hidden"):
        with pytest.raises(SettingsError) as caught:
            Settings(database=text)
        assert "hidden" not in str(caught.value)
    with pytest.raises(DatabaseUrlError):
        database_url("sqlite://", Path("/data"))
    settings = Settings(database="postgresql://u:hidden@h/x")
    assert settings.database_place.drivername == "postgresql+psycopg"
    assert "hidden" not in repr(settings) + repr(settings.database_place)


@pytest.mark.long
def test_the_service_outlives_a_restart_of_the_database(tmp_path: Path) -> None:
    with running_postgres() as server:
        environment = {"FORESHOCK_DATABASE": server.new_database()}
        service = Service(
            tmp_path, "--store", f"sqlite://{tmp_path}/facts.sqlite", environment=environment
        )
        service.start()
        launch = new_launch()
        with service.client() as client:
            run_id = post_run(client, "r", launch)["run_id"]
            for sequence in range(3):
                assert _put(client, run_id, launch, sequence).status_code == 201
            server.kill()
            assert _put(client, run_id, launch, 3).status_code == 503
            answer = client.get("/api/v1/runs")
            assert (answer.status_code, answer.headers["content-type"]) == (
                503,
                "application/problem+json",
            )
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").status_code == 503
            server.start()
            deadline = time.monotonic() + 60
            while _put(client, run_id, launch, 3).status_code == 503:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert [_put(client, run_id, launch, n).status_code for n in (2, 3, 4)] == [
                200,
                200,
                201,
            ]
            loss = client.get(f"/api/v1/runs/{run_id}/series", params={"name": "loss"}).json()
            assert loss["step"] == list(range(50))
            assert client.get("/readyz").status_code == 200
        assert service.stop() == 0, service.log
        secret = server.url().split(":")[2].split("@")[0]
        assert secret not in service.log


def _put(client: httpx.Client, run_id: str, launch: str, sequence: int) -> httpx.Response:
    return put_records(client, run_id, launch, sequence, make_records(10 * sequence, 10))
