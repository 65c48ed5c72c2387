"""How replicas keep each other from being taken for dead."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa

from foreshock.api.commits import SharedCommits
from foreshock.api.ledger import Ledger
from foreshock.api.registry import Registry
from foreshock.api.registry_tables import replicas, writes
from foreshock.api.store import Store
from tests.api.live_helpers import wait_until


class HangingStore:
    """Takes for ever to remove anything."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.goes_on = threading.Event()

    def discard_between(self, first: int, last: int) -> int:
        self.asked.set()
        self.goes_on.wait(60)
        return 0


def test_a_replica_whose_store_hangs_is_alive(tmp_path: Path) -> None:
    """Else the others would take back its claims, and refuse what other shards could take."""
    registry = Registry(tmp_path / "registry.sqlite")
    store = HangingStore()
    commits = SharedCommits(
        registry,
        Ledger(registry),
        cast(Store, store),
        beat_seconds=0.05,
        alive_seconds=0.5,
    )
    with registry.write() as connection:
        row: dict[str, Any] = {"first": 1, "last": 2, "replica": "lost", "fenced": True}
        connection.execute(writes.insert().values(**row))

    def until() -> float:
        with registry.engine.begin() as connection:
            return float(connection.execute(sa.select(replicas.c.until)).scalar_one())

    commits.start()
    assert store.asked.wait(60)
    before = until()
    wait_until(lambda: until() > before + 1.0, 60)
    store.goes_on.set()
    commits.stop()
    registry.close()
