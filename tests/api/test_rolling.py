"""Rollups are made by themselves, of chunks that a run has passed and of what is over."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from foreshock.api.ingest import Ingest, NoListener
from foreshock.api.leases import HOUSEKEEPING, SoleReplica
from foreshock.api.registry import LaunchRequest, Registry
from foreshock.api.registry_tables import attempts, writes
from foreshock.api.rolling import Roller, settled_number
from foreshock.api.store import CHUNK_STEPS, View
from foreshock.api.store_sqlite import STORE_FILE, SqliteStore
from foreshock.monitor.record import Event
from tests.api.live_helpers import wait_until
from tests.api.service import (
    LAYERS,
    Service,
    fact_rows,
    make_records,
    new_launch,
    post_run,
    put_records,
)
from tests.api.test_ingest import incoming


@dataclass
class Scene:
    registry: Registry
    store: SqliteStore
    ingest: Ingest
    roller: Roller

    def launch(self, name: str) -> tuple[str, str]:
        launch = new_launch()
        request = LaunchRequest(project="p", run=name, launch_id=launch, layers=LAYERS)
        return self.registry.launch(request)[0], launch

    def send(self, run: tuple[str, str], sequence: int, first: int, count: int) -> None:
        batch = incoming(*run, sequence, make_records(first, count))
        self.ingest.submit(batch).result(30)

    def rolled(self, run: tuple[str, str]) -> set[tuple[int, int]]:
        """Attempt and chunk of what has rollups."""
        sql = f"SELECT DISTINCT attempt, block / {CHUNK_STEPS // 64} FROM steps_64 WHERE run_id = ?"
        return set(self.store._writer.execute(sql, (run[0],)))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    registry = Registry(tmp_path / "registry.sqlite")
    store = SqliteStore(tmp_path / STORE_FILE, registry.layer_names, fsync=False)
    ingest = Ingest(registry, store, NoListener())
    ingest.start()
    roller = Roller(registry, store, SoleReplica(), every_seconds=0.05, first_seconds=0.05)
    yield Scene(registry, store, ingest, roller)
    roller.stop()
    ingest.stop()
    store.close()
    registry.close()


def test_a_chunk_is_rolled_up_once_the_run_has_passed_it(scene: Scene) -> None:
    run = scene.launch("r")
    scene.send(run, 1, 0, CHUNK_STEPS)
    assert scene.roller.look() == 0
    scene.send(run, 2, CHUNK_STEPS, 10)
    assert scene.roller.look() == 1
    assert scene.rolled(run) == {(1, 0)}
    assert scene.roller.look() == 0
    assert scene.store.stale_chunks(run[0])[0].chunk == 1


def test_what_comes_late_is_rolled_up_at_the_next_border(scene: Scene) -> None:
    run = scene.launch("r")
    scene.send(run, 1, 0, 1000)
    scene.send(run, 3, CHUNK_STEPS, 10)
    assert scene.roller.look() == 1
    scene.send(run, 2, 1000, 24)
    assert [each.chunk for each in scene.store.stale_chunks(run[0])] == [0, 1]
    scene.send(run, 4, 2 * CHUNK_STEPS, 1)
    assert scene.roller.look() == 2
    assert [each.chunk for each in scene.store.stale_chunks(run[0])] == [2]


def test_an_attempt_that_is_over_is_rolled_up_whole(scene: Scene) -> None:
    run = scene.launch("r")
    scene.send(run, 1, 0, 100)
    assert scene.roller.look() == 0
    scene.send(scene.launch("r"), 1, 50, 10)
    assert scene.roller.look() == 1
    assert scene.rolled(run) == {(1, 0)}


def test_a_run_that_is_over_or_quiet_is_rolled_up_whole(scene: Scene) -> None:
    ended, quiet, going = (scene.launch(name) for name in ("ended", "quiet", "going"))
    for run in (ended, quiet, going):
        scene.send(run, 1, 0, 10)
    scene.registry.end_run(ended[0], 1, 9)
    with scene.registry.write() as connection:
        long_ago = datetime.now(UTC) - timedelta(hours=2)
        mine = attempts.c.run_id == quiet[0]
        connection.execute(attempts.update().where(mine).values(last_received=long_ago))
    assert scene.roller.look() == 2
    assert scene.rolled(ended) == scene.rolled(quiet) == {(1, 0)}
    assert scene.rolled(going) == set()
    # It goes on after all.
    scene.send(quiet, 2, 10, CHUNK_STEPS)
    assert scene.roller.look() == 1
    assert scene.store.stale_chunks(quiet[0])[0].chunk == 1


def test_the_thread_does_it(scene: Scene) -> None:
    run = scene.launch("r")
    scene.send(run, 1, 0, CHUNK_STEPS + 1)
    scene.roller.start()
    wait_until(lambda: scene.rolled(run) == {(1, 0)}, 60)


def test_what_may_still_be_removed_waits(scene: Scene) -> None:
    run = scene.launch("r")
    scene.send(run, 1, 0, CHUNK_STEPS)
    scene.send(run, 2, CHUNK_STEPS, 1)
    assert settled_number(scene.registry) == 2
    with scene.registry.write() as connection:
        row = {"first": 1, "last": 2, "replica": "x", "fenced": False}
        connection.execute(writes.insert().values(**row))
    assert settled_number(scene.registry) == 0
    assert scene.roller.look() == 0
    with scene.registry.write() as connection:
        connection.execute(writes.delete())
    assert scene.roller.look() == 1


def test_only_the_replica_that_has_a_run_rolls_it_up(scene: Scene) -> None:
    class Some(SoleReplica):
        def __init__(self, *names: str) -> None:
            self.names = names

        def holds(self, name: str) -> bool:
            return name in self.names

    run, over = scene.launch("r"), scene.launch("over")
    scene.send(run, 1, 0, CHUNK_STEPS + 1)
    scene.send(over, 1, 0, 5)
    scene.registry.end_run(over[0], 1, 4)
    assert Roller(scene.registry, scene.store, Some()).look() == 0
    assert Roller(scene.registry, scene.store, Some(HOUSEKEEPING)).look() == 1
    assert (scene.rolled(run), scene.rolled(over)) == (set(), {(1, 0)})
    assert Roller(scene.registry, scene.store, Some(run[0])).look() == 1
    assert scene.rolled(run) == {(1, 0)}


def test_a_service_rolls_up_and_answers_from_it(tmp_path: Path) -> None:
    file = tmp_path / "facts.sqlite"
    service = Service(tmp_path, "--store", f"sqlite://{file}", "--retention-days", "9")
    service.start()
    with service.client() as client:
        launch = new_launch()
        run = post_run(client, "long", launch)["run_id"]
        last = replace(make_records(29_999, 1)[0], events=(Event("end"),))
        assert put_records(client, run, launch, 0, make_records(0, 100)).status_code == 201
        assert put_records(client, run, launch, 1, [last]).status_code == 201
        path = f"/api/v1/runs/{run}/series?name=loss&points=100"
        before = client.get(path).json()

        def rolled() -> int:
            with closing(sqlite3.connect(file)) as connection:
                return int(connection.execute("SELECT count(*) FROM steps_64").fetchone()[0])

        wait_until(lambda: rolled() == 3, 90)
        assert client.get(path).json() == before
        assert before["step"] == [0, 29_999]
    assert service.stop() == 0, service.log


def test_rollups_older_than_their_own_age_are_dropped(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / STORE_FILE, lambda _: LAYERS, rollup_retention_days=1)
    store.append([fact_rows("r", 1, 1, make_records(0, 100))])
    store.roll("r", 1, 0, 1)
    for table in ("values_64", "steps_64"):
        store._writer.execute(f"UPDATE {table} SET received = received - 2 * 86400")
    store._swept_at = -1e9
    store.append([fact_rows("r", 1, 2, make_records(100, 1))])
    for table in ("values_64", "steps_64"):
        assert store._read(f"SELECT count(*) FROM {table}", {}) == [(0,)]
    assert store.scalar_series(View("r"), "loss", 1).high == (100.0,)
    store.close()
