"""The engine under readers and a writer for a minute, with a watchdog."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foreshock.api.store import Limits, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_engine import open_chdb
from tests.api.service import LAYERS, fact_rows, make_records

SECONDS = 60
SILENCE = 30

WIDE = (
    "SELECT layer, role, format, intDiv(step, 2) AS bucket, avg(amax), max(kurtosis)"
    " FROM tensor_stats WHERE run_id = {run:String} GROUP BY layer, role, format, bucket"
)


class Soak:
    """One writer and several readers; each beats after every piece of work."""

    def __init__(self, store: ClickHouseStore) -> None:
        self.store = store
        self.until = time.monotonic() + SECONDS
        self.written = 0
        self.beats: dict[str, float] = {}
        self.finished: set[str] = set()
        self.errors: list[Exception] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        self.beats[name] = time.monotonic()
        threading.Thread(target=self._loop, args=(name, work), daemon=True).start()

    def _loop(self, name: str, work: Callable[[], None]) -> None:
        try:
            while time.monotonic() < self.until:
                work()
                self.beats[name] = time.monotonic()
            self.finished.add(name)
        except Exception as error:  # noqa: BLE001 - told to the test, which fails
            self.errors.append(error)

    def write(self) -> None:
        rows = fact_rows("soak", 1, self.written + 1, make_records(self.written, 64))
        self.store.append([rows])
        self.written += 64

    def read(self) -> None:
        self.store._engine.read(WIDE, {"run": "soak"})
        self.store.heatmap(View("soak"), "input", "amax", 240)
        self.store.scalar_series(View("soak"), "loss", 1000)
        self.store.record_window("soak", 1, max(0, self.written - 200), self.written)


@pytest.mark.long
def test_the_engine_lives_through_a_minute_of_everything_at_once(tmp_path: Path) -> None:
    """chdb-core 26.5 deadlocked within seconds on the GROUP BY over four keys."""
    engine = open_chdb(tmp_path / "store", Limits(seconds=20))
    store = ClickHouseStore(engine, lambda _: LAYERS)
    soak = Soak(store)
    soak.start("writer", soak.write)
    for index in range(3):
        soak.start(f"reader {index}", soak.read)
    while len(soak.finished) < len(soak.beats) and not soak.errors:
        time.sleep(0.2)
        silent = [n for n, beat in soak.beats.items() if time.monotonic() - beat > SILENCE]
        assert not set(silent) - soak.finished, f"the engine hangs: {silent}"
        assert store.hung_seconds() == 0
    assert soak.errors == []
    assert soak.written > 1000
    assert store.counts("soak", exact=False)["tensor_stats"] == soak.written * 6
    store.close()
