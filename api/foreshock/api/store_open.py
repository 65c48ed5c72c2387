"""Opens the store that the settings name; the one place that knows every implementation."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from functools import partial
from pathlib import Path

from foreshock.api.store import LayerNames, Limits, Store, StoreError
from foreshock.api.store_shards import ShardedStore
from foreshock.api.store_sqlite import STORE_FILE, SqliteStore, copy_sqlite
from foreshock.api.store_url import ChdbPlace, ClickHouseServer, SqlitePlace, StorePlace

__all__ = ["open_store", "restore_store"]


def open_store(
    place: StorePlace,
    layer_names: LayerNames,
    *,
    limits: Limits | None = None,
    fsync: bool = True,
    retention_days: int = 0,
    rollup_retention_days: int = 0,
) -> Store:
    """Open a store, making it if it is not there.

    Args:
        place: Where it is.
        layer_names: From run_id to layer names, the position being the stored id.
        limits: What one query may cost.
        fsync: Whether facts are synced to disk before `append` returns.
        retention_days: Facts received longer ago are deleted; 0 keeps them.
        rollup_retention_days: Rollups made longer ago are deleted; 0 keeps them.

    Raises:
        StoreError: It cannot be used.
    """
    limits = limits or Limits()
    if isinstance(place, SqlitePlace):
        return SqliteStore(
            place.path,
            layer_names,
            limits=limits,
            fsync=fsync,
            retention_days=retention_days,
            rollup_retention_days=rollup_retention_days,
        )
    # ClickHouse is large, and has no wheel for Windows.
    from foreshock.api.store_clickhouse import ClickHouseStore
    from foreshock.api.store_engine import open_chdb, open_server
    from foreshock.api.store_schema import TableOptions

    options = TableOptions(
        fsync=fsync, retention_days=retention_days, rollup_retention_days=rollup_retention_days
    )
    if isinstance(place, ChdbPlace):
        return ClickHouseStore(open_chdb(place.path, limits), layer_names, options)
    options = replace(options, server=True, cluster=place.cluster)

    def open_one(server: ClickHouseServer) -> Store:
        return ClickHouseStore(open_server(server, place, limits), layer_names, options)

    if len(place.servers) == 1:
        return open_one(place.servers[0])
    names = [f"{server.host}:{server.port}" for server in place.servers]
    return ShardedStore(
        {name: partial(open_one, server) for name, server in zip(names, place.servers, strict=True)}
    )


def restore_store(place: ChdbPlace | SqlitePlace, folder: Path) -> None:
    """Bring back what `Store.backup` wrote, where no store is yet.

    Raises:
        StoreError: It cannot be read, or there is a store already.
    """
    if place.path.exists():
        raise StoreError(f"{place.path} exists; restore into an empty data folder")
    if isinstance(place, SqlitePlace):
        place.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            copy_sqlite(folder / STORE_FILE, place.path)
        except sqlite3.Error as error:
            raise StoreError(f"{folder} holds no backup of a store: {error}") from error
        return
    from foreshock.api.store_engine import open_chdb

    engine = open_chdb(place.path, Limits(clients=1), folder.parent)
    try:
        engine.restore(folder)
    finally:
        engine.close()
