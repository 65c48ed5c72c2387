"""What is shown when rows have expired, whichever table lost them first, and when rolling fails."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pytest

from foreshock.api.settings import Settings, SettingsError
from foreshock.api.store import Limits, Store, StoreError, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_open import open_store
from foreshock.api.store_schema import FACT_TABLES
from foreshock.api.store_sqlite import SqliteStore
from foreshock.api.store_url import ChdbPlace, SqlitePlace, StorePlace
from tests.api.live_helpers import wait_until
from tests.api.service import LAYERS, fact_rows
from tests.api.test_rollups import KEY, records

DAYS: Final = 30
DAY: Final = 86_400


def opened(folder: Path, kind: str, days: int = DAYS) -> Store:
    places: dict[str, StorePlace] = {
        "chdb": ChdbPlace(folder / "store"),
        "sqlite": SqlitePlace(folder / "store.sqlite"),
    }
    limits = Limits(clients=1)
    return open_store(places[kind], lambda _: LAYERS, limits=limits, retention_days=days)


@pytest.fixture(params=["chdb", "sqlite"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    made = opened(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def clickhouse(tmp_path: Path) -> Iterator[ClickHouseStore]:
    made = opened(tmp_path, "chdb")
    assert isinstance(made, ClickHouseStore)
    yield made
    made.close()


def remove(store: Store, table: str, where: str) -> None:
    """Rows of a table, as retention drops them."""
    if isinstance(store, ClickHouseStore):
        store._derived.command(
            f"ALTER TABLE {table} DELETE WHERE {where} SETTINGS mutations_sync=2"
        )
    else:
        assert isinstance(store, SqliteStore)
        store._writer.execute(f"DELETE FROM {table} WHERE {where}")


def rolled(store: Store, run: str) -> None:
    for stale in store.stale_chunks(run):
        store.roll(run, stale.attempt, stale.chunk, stale.newest)


def send(store: Store, run: str, attempt: int, commit: int, first: int, count: int) -> None:
    value = 1000.0 * attempt
    store.append([fact_rows(run, attempt, commit, records(first, count, value))])


def test_what_an_expired_attempt_alone_holds_is_shown(store: Store) -> None:
    """Newer attempts lie before and after it, so that first and last step tell nothing."""
    run = uuid.uuid4().hex
    for commit, (first, count) in enumerate(((0, 1000), (0, 128), (896, 104)), 1):
        send(store, run, commit, commit, first, count)
    view = View(run)
    before = store.scalar_series(view, "loss", 8)
    rolled(store, run)
    assert store.scalar_series(view, "loss", 8) == before
    for table in FACT_TABLES:
        remove(store, table, f"run_id = '{run}' AND attempt = 1")
    shown = store.scalar_series(view, "loss", 8)
    assert (shown.step, shown.low) == (before.step[:0] + shown.step, shown.low)
    assert dict(zip(shown.step, shown.low, strict=True)) == {
        0: 2000.0, 128: 1128.0, 256: 1256.0, 384: 1384.0, 512: 1512.0, 640: 1640.0, 768: 1768.0,
        896: 3896.0,
    }  # fmt: skip
    # What nobody needs rollups for keeps its narrow buckets.
    assert store.scalar_series(View(run, None, 900, 990), "loss", 1000).step[:2] == (900, 901)


def aged(rows: dict[str, pa.Table], seconds: int) -> dict[str, pa.Table]:
    """As received so long ago."""
    received = pa.scalar(int(time.time()) - seconds, pa.uint32())
    return {
        name: table.append_column("received", pa.repeat(received, table.num_rows))
        for name, table in rows.items()
    }


def test_one_table_may_lose_its_parts_before_another(clickhouse: ClickHouseStore) -> None:
    """The engine drops parts when it suits it; what is old counts as gone in every table."""
    run = uuid.uuid4().hex
    store = clickhouse
    old = dict(fact_rows(run, 1, 1, records(0, 640)))
    store._derived.command("SYSTEM STOP TTL MERGES")
    store.append([aged(old, DAYS * DAY + 60)])
    store.append([fact_rows(run, 1, 2, records(640, 320))])
    # Rolled up while it was young.
    store._options = type(store._options)()
    rolled(store, run)
    store._options = type(store._options)(retention_days=DAYS)
    before = store.tensor_series(View(run), KEY, 15), store.heatmap(View(run), "input", "amax", 15)
    remove(store, "tensor_stats", f"run_id = '{run}' AND step < 640")
    after = store.tensor_series(View(run), KEY, 15), store.heatmap(View(run), "input", "amax", 15)
    assert after == before
    assert len(before[0].step) == 15
    store._derived.command("SYSTEM START TTL MERGES")


def test_a_shorter_retention_holds_for_what_is_there(tmp_path: Path) -> None:
    store = opened(tmp_path, "chdb", 0)
    store.append([aged(dict(fact_rows("r", 1, 1, records(0, 10))), 9 * DAY)])
    store.append([fact_rows("r", 1, 2, records(10, 10))])
    assert store.counts("r")["steps"] == 20
    store.close()
    store = opened(tmp_path, "chdb", 7)
    wait_until(lambda: store.counts("r", exact=False)["tensor_stats"] == 10, 90)
    wait_until(lambda: store.counts("r", exact=False)["steps"] == 10, 90)
    store.close()


def failing_once_whole(store: ClickHouseStore) -> Callable[[str, pa.Table], None]:
    """Writes rollups, but not the word that they are there."""
    write = store._keep_rollups

    def write_half(table: str, rows: pa.Table) -> None:
        if table == "steps_64" and any(rows["facts"].to_pylist()):
            raise StoreError("killed here")
        write(table, rows)

    return write_half


def test_rolling_anew_may_fail_half_way(
    clickhouse: ClickHouseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uuid.uuid4().hex
    store = clickhouse
    send(store, run, 1, 1, 0, 512)
    send(store, run, 1, 2, 30_000, 64)
    rolled(store, run)
    store.append([fact_rows(run, 1, 3, records(100, 1, 7e5))])
    before = store.scalar_series(View(run), "loss", 200), store.tensor_series(View(run), KEY, 200)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_keep_rollups", failing_once_whole(store))
        with pytest.raises(StoreError):
            store.roll(run, 1, 0, 3)
    for table in ("values_64", "steps_64"):
        store._derived.command(f"OPTIMIZE TABLE {table} FINAL")
    after = store.scalar_series(View(run), "loss", 200), store.tensor_series(View(run), KEY, 200)
    assert after == before
    assert [each.chunk for each in store.stale_chunks(run)] == [0]
    rolled(store, run)
    assert store.stale_chunks(run) == []
    assert store.scalar_series(View(run), "loss", 200) == before[0]


def test_rolling_anew_counts_although_the_clock_went_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uuid.uuid4().hex
    send(store, run, 1, 1, 0, 64)
    rolled(store, run)
    store.append([fact_rows(run, 1, 2, records(64, 64, 7e5))])
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    rolled(store, run)
    assert store.stale_chunks(run) == []
    for table in FACT_TABLES:
        remove(store, table, f"run_id = '{run}'")
    assert store.scalar_series(View(run), "loss", 2).high == (1063.0, 7e5 + 127)


def test_rollups_outlive_the_records_they_stand_for() -> None:
    with pytest.raises(SettingsError, match="rollup_retention_days"):
        Settings(retention_days=30, rollup_retention_days=7)
    with pytest.raises(SettingsError, match="rollup_retention_days"):
        Settings(rollup_retention_days=7)
    assert Settings(retention_days=30, rollup_retention_days=365).retention_days == 30
    assert Settings(retention_days=30).rollup_retention_days == 0
