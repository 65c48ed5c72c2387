"""What a run costs in each store: append rate, bytes on disk, and reads over the whole run.

    python -m benchmarks.store_sizes --rows 1000000

One run of 500 series, batches of 2,000 rows (four steps), 20 batches per INSERT as under load.
Statistics are noise, which compresses worse than training does. One process per store, in turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ingest import GROUP, LAYERS, ROWS, STEPS, make_table
from foreshock.api.store import SeriesKey, Store, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_engine import DATABASE
from foreshock.api.store_open import open_store
from foreshock.api.store_rows import Placed, place, split
from foreshock.api.store_schema import FACT_TABLES
from foreshock.api.store_url import parse_store

RUN = "a" * 32
READS = 7


@dataclass(frozen=True, slots=True)
class Outcome:
    """One store."""

    rows_per_second: float
    bytes_per_row: float
    series_ms: float
    heatmap_ms: float
    window_ms: float


def measure(scheme: str, rows: int, folder: Path) -> Outcome:
    """Fill a store and read it."""
    store = open_store(parse_store(f"{scheme}://{folder}/store", folder), lambda _: LAYERS)
    rng = np.random.default_rng(7)
    ids = {name: index for index, name in enumerate(LAYERS)}
    seconds = 0.0
    batches = rows // ROWS
    for first in range(0, batches, GROUP):
        group = [
            place(
                split(make_table(number * STEPS, rng)),
                Placed(
                    run_id=RUN,
                    attempts=np.ones(STEPS, np.int64),
                    commit=number + 1,
                    layer_ids=ids,
                ),
            )
            for number in range(first, min(first + GROUP, batches))
        ]
        start = time.perf_counter()
        store.append(group)
        seconds += time.perf_counter() - start
    outcome = read(store, batches * STEPS)
    size = merged_bytes(store)
    store.close()
    if not size:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Outcome(batches * ROWS / seconds, size / (batches * ROWS), *outcome)


def merged_bytes(store: Store) -> int:
    """Bytes of ClickHouse's parts once merged: what merges leave behind goes after minutes."""
    if not isinstance(store, ClickHouseStore):
        return 0
    engine = store._engine
    for table in FACT_TABLES:
        engine.writer().command(f"OPTIMIZE TABLE {table} FINAL")
    sql = "SELECT sum(bytes_on_disk) AS n FROM system.parts WHERE active AND database = {db:String}"
    return int(engine.read(sql, {"db": DATABASE})["n"][0].as_py())


def read(store: Store, steps: int) -> tuple[float, float, float]:
    """Milliseconds of a series and a heatmap over all steps, and of the newest 200 records."""
    view = View(RUN, 1)
    key = SeriesKey(layer=3, role="input", statistic="amax")
    return (
        milliseconds(lambda: store.tensor_series(view, key, 1000)),
        milliseconds(lambda: store.heatmap(view, "input", "kurtosis", 240)),
        milliseconds(lambda: store.record_window(RUN, 1, steps - 200, steps)),
    )


def milliseconds(work: Callable[[], object]) -> float:
    """Median of several."""
    work()
    taken = []
    for _ in range(READS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1000


def _worker(scheme: str, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(scheme, rows, Path(folder))
    print(
        f"| {scheme} | {found.rows_per_second:,.0f} | {found.bytes_per_row:.0f} |"
        f" {found.series_ms:.0f} | {found.heatmap_ms:.0f} | {found.window_ms:.0f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    print(f"{os.cpu_count()} cores; {rows:,} rows of 500 series in one run")
    print("| store | rows/s appended | bytes/row | series, ms | heatmap, ms | 200 records, ms |")
    print("|---|---|---|---|---|---|")
    for scheme in ("chdb", "sqlite"):
        # The engine does not survive a fork, and takes one folder per process.
        process = multiprocessing.get_context("spawn").Process(target=_worker, args=(scheme, rows))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{scheme} failed")


if __name__ == "__main__":
    main()
