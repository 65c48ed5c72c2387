"""A deleted run is gone for good: from both stores, the registry, live analysis and alerts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from foreshock.api.deletions import AGAIN, Deletions
from foreshock.api.leases import HOUSEKEEPING, SoleReplica
from foreshock.api.registry import LaunchRequest, Registry
from foreshock.api.risks import risk_table
from foreshock.api.store import Limits, Store
from foreshock.api.store_open import open_store
from foreshock.api.store_url import ChdbPlace, SqlitePlace, StorePlace
from tests.api.live_helpers import START, risk, wait_until
from tests.api.service import (
    LAYERS,
    Service,
    fact_rows,
    make_records,
    new_launch,
    post_run,
    put_records,
)

KEPT, LOST = "a" * 32, "b" * 32


@pytest.fixture(params=["chdb", "sqlite"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    places: dict[str, StorePlace] = {
        "chdb": ChdbPlace(tmp_path / "store"),
        "sqlite": SqlitePlace(tmp_path / "s.sqlite"),
    }
    made = open_store(places[request.param], lambda _: LAYERS, limits=Limits(clients=1))
    yield made
    made.close()


def test_a_store_forgets_one_run_and_no_other(store: Store) -> None:
    for commit, run_id in enumerate((KEPT, LOST), 1):
        store.append([fact_rows(run_id, 1, commit, make_records(0, 5))])
        store.append_risks([(run_id, 1, risk_table([(START, risk(4))]))])
    before = store.counts(KEPT)
    store.delete_run(LOST)
    assert set(store.counts(LOST, exact=False).values()) == {0}
    assert store.last_risk_step(LOST, 1) is None
    assert store.scalar_names(LOST) == []
    assert store.counts(KEPT) == before
    assert store.last_risk_step(KEPT, 1) == 4
    store.delete_run(LOST)


def test_a_registry_names_the_run_until_its_facts_are_gone(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    launch = new_launch()
    request = LaunchRequest(project="default", run="r", launch_id=launch, layers=("a",))
    run_id, _, _ = registry.launch(request)
    assert registry.launch_owner(launch) is not None
    registry.delete(run_id)
    assert registry.launch_owner(launch) is None
    assert registry.run(run_id) is None
    assert registry.runs() == []
    assert list(registry.deleted()) == [run_id]
    registry.facts_removed(run_id)
    assert registry.deleted() == {}
    again, attempt, new = registry.launch(request)
    assert (again != run_id, attempt, new) == (True, 1, True)
    registry.close()


class Housekeeper(SoleReplica):
    """Has nothing but the housekeeping, or not even that."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps = keeps

    def holds(self, name: str) -> bool:
        return self.keeps and name == HOUSEKEEPING


def test_replicas_forget_a_run_at_once_and_what_one_wrote_meanwhile_goes_later(
    store: Store, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    launch = new_launch()
    request = LaunchRequest(project="default", run="r", launch_id=launch, layers=LAYERS)
    run_id, _, _ = registry.launch(request)
    replica = Registry(tmp_path / "registry.sqlite")
    assert replica.launch_owner(launch) is not None
    registry.delete(run_id)
    store.delete_run(run_id)
    # What the other replica had in hand.
    store.append_risks([(run_id, 1, risk_table([(START, risk(4))]))])
    forgotten: list[str] = []
    keeper = Housekeeper(keeps=False)
    deletions = Deletions(replica, store, keeper, forgotten.append)
    now = datetime.now(UTC)
    deletions.look(now)
    deletions.look(now)
    assert forgotten == [run_id]
    assert replica.remembered_owners(launch) == ()
    deletions.look(now + 2 * AGAIN)
    assert store.last_risk_step(run_id, 1) == 4
    keeper.keeps = True
    deletions.look(now)
    assert store.last_risk_step(run_id, 1) == 4
    deletions.look(now + 2 * AGAIN)
    assert store.last_risk_step(run_id, 1) is None
    assert registry.deleted() == {}
    replica.close()
    registry.close()


def test_a_deleted_run_does_not_come_back_by_itself(served: Service, client: httpx.Client) -> None:
    launch = new_launch()
    run_id = post_run(client, "doomed", launch)["run_id"]
    records = make_records(0, 8)
    assert put_records(client, run_id, launch, 0, records).status_code == 201
    path = f"/api/v1/runs/{run_id}"
    wait_until(lambda: client.get(f"{path}/risk").json()["step"] == 7, 60)
    program = "from foreshock.api.cli.main import run; run()"
    command = [sys.executable, "-c", program, "delete", "doomed", "--yes", "--url", served.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "doomed is deleted\n"), done.stderr
    assert client.get(path).status_code == 404
    assert client.delete(path).status_code == 404
    assert put_records(client, run_id, launch, 0, records).status_code == 404
    assert put_records(client, run_id, launch, 1, make_records(8, 8)).status_code == 404
    assert all(run["run_id"] != run_id for run in client.get("/api/v1/runs").json()["runs"])
    # Only who announces it anew brings it back, as another run, with everything as at first.
    again = post_run(client, "doomed", launch)
    assert (again["run_id"] != run_id, again["attempt"]) == (True, 1)
    assert put_records(client, again["run_id"], launch, 0, records).status_code == 201
    shown = client.get(f"/api/v1/runs/{again['run_id']}/records", params={"as": "json"})
    assert len(shown.json()["records"]) == 8


@pytest.mark.long
def test_deletion_goes_on_after_a_crash(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.start()
    with service.client() as client:
        launch = new_launch()
        run_id = post_run(client, "half", launch)["run_id"]
        assert put_records(client, run_id, launch, 0, make_records(0, 4)).status_code == 201
    service.kill()
    registry = Registry(service.data / "registry.sqlite")
    registry.delete(run_id)
    registry.close()
    service.start()
    assert service.stop() == 0
    registry = Registry(service.data / "registry.sqlite")
    assert registry.deleted() == {}
    registry.close()
    store = open_store(ChdbPlace(service.data / "store"), lambda _: LAYERS)
    assert set(store.counts(run_id, exact=False).values()) == {0}
    store.close()
