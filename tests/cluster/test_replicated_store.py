"""The store on a real, replicated ClickHouse: what chdb cannot show. See docs/deploy.md.

    docker-compose --profile cluster up -d clickhouse
    FORESHOCK_CLUSTER_STORE='clickhouse://foreshock:TOKEN@127.0.0.1:8431/test?cluster=foreshock' \
        pytest -m cluster tests/cluster
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pyarrow as pa
import pytest

from foreshock.api.store import Store, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_open import open_store
from foreshock.api.store_schema import FACT_TABLES, RISK_SCHEMA, ROLLUP_TABLES
from foreshock.api.store_url import ServersPlace, parse_store
from foreshock.monitor.record import table_to_records
from tests.api.live_helpers import START
from tests.api.service import LAYERS, fact_rows, make_records

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    place = parse_store(os.environ["FORESHOCK_CLUSTER_STORE"], Path())
    assert isinstance(place, ServersPlace)
    assert place.cluster
    made = open_store(place, lambda _: LAYERS)
    yield made
    made.close()


@pytest.fixture
def run() -> str:
    return uuid.uuid4().hex


def newest_commit() -> int:
    return time.time_ns()


def test_every_table_is_replicated_behind_a_distributed_one(store: Store) -> None:
    engine = cast(ClickHouseStore, store)._engine
    rows = engine.read(
        "SELECT name, engine FROM system.tables WHERE database = currentDatabase()", {}
    ).to_pylist()
    engines = {row["name"]: row["engine"] for row in rows}
    for table in (*FACT_TABLES, "risk", *ROLLUP_TABLES):
        assert engines[table] == "Distributed"
        assert engines[f"{table}_local"] == "ReplicatedReplacingMergeTree"


def test_what_goes_in_comes_out_and_a_repeated_insert_does_nothing(store: Store, run: str) -> None:
    rows = fact_rows(run, 1, newest_commit(), make_records(0, 20))
    for _ in range(2):
        store.append([rows])
    raw = {"steps": 20, "scalars": 40, "events": 0, "tensor_stats": 120}
    assert store.counts(run, exact=False) == raw
    records = table_to_records(store.record_window(run, None, 0, 99))
    assert [record.step for record in records] == list(range(20))
    assert store.scalar_series(View(run), "loss", 99).mean == tuple(map(float, range(20)))
    assert store.heatmap(View(run), "input", "amax", 2).steps == (0, 10)


def test_the_default_view_stays_on_the_shard_of_its_run(store: Store, run: str) -> None:
    store.append([fact_rows(run, 1, newest_commit(), make_records(0, 6))])
    store.append([fact_rows(run, 2, newest_commit(), make_records(4, 6))])
    window = store.step_window(View(run))
    assert window["attempt"].to_pylist() == [1] * 4 + [2] * 6


def test_what_was_never_acknowledged_is_removed_from_every_replica(store: Store, run: str) -> None:
    kept = newest_commit()
    store.append([fact_rows(run, 1, kept, make_records(0, 3))])
    lost = newest_commit()
    store.append([fact_rows(run, 1, lost, make_records(3, 3))])
    assert store.discard_between(lost, lost) == 3 * 9
    assert store.counts(run, exact=False)["steps"] == 3


def test_risk_rows(store: Store, run: str) -> None:
    store.append([fact_rows(run, 1, newest_commit(), make_records(0, 1))])
    row = {"step": 0, "time": START, "horizon": 10, "probability": 0.5, "state": "ok"}
    row["model_version"] = "m"
    store.append_risk(run, 1, pa.Table.from_pylist([row], schema=RISK_SCHEMA))
    assert store.last_risk_step(run, 1) == 0
    assert store.risk_history(run, None, 0, 9)["probability"].to_pylist() == [0.5]
