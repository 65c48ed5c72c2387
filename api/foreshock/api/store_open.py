"""Opens the store that the settings name; the one place that knows every implementation."""

from __future__ import annotations

from foreshock.api.store import LayerNames, Limits, Store
from foreshock.api.store_sqlite import SqliteStore
from foreshock.api.store_url import SqlitePlace, StorePlace

__all__ = ["open_store"]


def open_store(
    place: StorePlace,
    layer_names: LayerNames,
    *,
    limits: Limits | None = None,
    fsync: bool = True,
    retention_days: int = 0,
) -> Store:
    """Open a store, making it if it is not there.

    Args:
        place: Where it is.
        layer_names: From run_id to layer names, the position being the stored id.
        limits: What one query may cost.
        fsync: Whether facts are synced to disk before `append` returns.
        retention_days: Facts received longer ago are deleted; 0 keeps them.

    Raises:
        StoreError: It cannot be used.
    """
    if isinstance(place, SqlitePlace):
        return SqliteStore(
            place.path, layer_names, limits=limits, fsync=fsync, retention_days=retention_days
        )
    # ClickHouse is large, and missing on some systems.
    from foreshock.api.store_clickhouse import ClickHouseStore
    from foreshock.api.store_engine import open_chdb

    engine = open_chdb(place.path, limits or Limits())
    return ClickHouseStore(engine, layer_names, fsync=fsync, retention_days=retention_days)
