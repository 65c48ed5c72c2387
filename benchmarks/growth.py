"""What reads cost as history grows: 1e6, 1e7, 1e8 tensor rows of many runs in one store.

The rows are made inside the engine (INSERT ... SELECT from numbers), in the order in which live
runs would send them: all runs side by side, 500 series a step. One run is then looked at as its
page and the live analysis do. It has the same number of steps at every size; what grows is the
rest. A second run, of fewer series, grows in length with the store, to show what a longer run
costs: first from rows, then from rollups. Medians of `--repeats` warm calls.

    python benchmarks/growth.py [--rows 1e6 1e7 1e8] [--repeats 7] [--folder DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from foreshock.api.store import CHUNK_STEPS, Limits, SeriesKey, View
from foreshock.api.store_clickhouse import ClickHouseStore
from foreshock.api.store_engine import Engine, open_chdb
from foreshock.api.store_schema import ROLLUP_TABLES, TableOptions
from foreshock.api.windows import RunRecords

SERIES = 500
LAYERS = tuple(f"blocks.{block}.{part}" for block in range(25) for part in "abcd")
FIXED_STEPS = 1500
"""Steps of the run that is looked at: 750,000 rows, at every size."""
LONG_SERIES = 50
LONG_POINTS, LONG_COLUMNS = 500, 250
"""Buckets of series and heatmap of the long run; wide enough for rollups from 32,000 steps."""
PIECE = 4_000_000
FIXED, LONG = "f" * 32, "e" * 32


@dataclass(frozen=True)
class Size:
    """What was measured at one size; times are milliseconds."""

    rows: int
    runs: int
    bytes_per_row: float
    fill_rows_per_s: int
    series_ms: float
    heatmap_ms: float
    latest_records_ms: float
    risk_history_ms: float
    scalar_series_ms: float
    long_run_steps: int
    long_series_ms: float
    long_heatmap_ms: float
    long_scalar_ms: float
    long_latest_ms: float
    rolled_series_ms: float
    rolled_heatmap_ms: float
    rolled_scalar_ms: float
    roll_chunk_ms: float
    rolled_bytes_per_row: float
    rss_mb: int


def main() -> None:
    """Measure and print a line per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e7, 1e8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Where the stores are made; then removed.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    for rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            result = measure(Path(folder), int(rows), given.repeats)
        if given.json:
            print(json.dumps(asdict(result)), flush=True)
        else:
            print(*(f"{k}={v}" for k, v in asdict(result).items()), flush=True)


def measure(folder: Path, rows: int, repeats: int) -> Size:
    """Fill a store of its own and look at it."""
    with opened(folder) as (engine, store):
        began = time.perf_counter()
        others = fill(engine, rows)
        seconds = time.perf_counter() - began
        settle(engine)
        records = RunRecords(store)
        key = SeriesKey(layer=7, role="input", statistic="kurtosis")
        last = FIXED_STEPS - 1
        end = _last_step(store, LONG)
        calls: dict[str, Callable[[], object]] = {
            "series_ms": lambda: store.tensor_series(View(FIXED, 1), key, 1000),
            "heatmap_ms": lambda: store.heatmap(View(FIXED, 1), "input", "kurtosis", 250),
            "latest_records_ms": lambda: records.newest_records(FIXED, 1, last, 16),
            "risk_history_ms": lambda: store.risk_history(FIXED, 1, 0, last),
            "scalar_series_ms": lambda: store.scalar_series(View(FIXED, 1), "loss", 1000),
            "long_latest_ms": lambda: records.newest_records(LONG, 1, end, 16),
        }
        long = {
            "series_ms": lambda: store.tensor_series(View(LONG, 1), key, LONG_POINTS),
            "heatmap_ms": lambda: store.heatmap(View(LONG, 1), "input", "kurtosis", LONG_COLUMNS),
            "scalar_ms": lambda: store.scalar_series(View(LONG, 1), "loss", LONG_POINTS),
        }
        times = {name: _median_ms(call, repeats) for name, call in calls.items()}
        times |= {f"long_{name}": _median_ms(call, repeats) for name, call in long.items()}
        stored, size = _stored(engine, "tensor_stats")
        times["roll_chunk_ms"] = _median_ms(lambda: store.roll(FIXED, 1, 0, 2**40), repeats)
        rolled_bytes = _roll(engine, store, LONG, end)
        times |= {f"rolled_{name}": _median_ms(call, repeats) for name, call in long.items()}
        return Size(
            rows=stored,
            runs=others + 2,
            bytes_per_row=round(size / stored, 1),
            fill_rows_per_s=round(stored / seconds),
            long_run_steps=end + 1,
            rolled_bytes_per_row=round(rolled_bytes / ((end + 1) * LONG_SERIES), 1),
            rss_mb=_rss_mb(),
            **times,
        )


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Engine, ClickHouseStore]]:
    """An empty store, without the time limit that a fill would pass."""
    engine = open_chdb(folder / "store", Limits(seconds=3600, memory_bytes=8 * 1024**3))
    store = ClickHouseStore(engine, lambda _: LAYERS, TableOptions(fsync=False))
    try:
        yield engine, store
    finally:
        store.close()


def fill(engine: Engine, rows: int) -> int:
    """Make so many tensor rows; how many runs share what the two that are looked at leave."""
    steps = rows // SERIES
    fixed = min(FIXED_STEPS, steps // 2)
    long = max((steps - fixed) // 4, 1)
    rest = max(steps - fixed - long, 0)
    others = max(rest // FIXED_STEPS, 1)
    _fill_runs(engine, [FIXED], fixed)
    _fill_runs(engine, [LONG], long * SERIES // LONG_SERIES, LONG_SERIES)
    if rest:
        _fill_runs(engine, [f"{index:032x}" for index in range(others)], -(-rest // others))
    return others


def _roll(engine: Engine, store: ClickHouseStore, run_id: str, last: int) -> int:
    """Roll up all of a run; bytes that its rollups take once they are merged."""
    before = _merged_rollups(engine)
    for chunk in range(last // CHUNK_STEPS + 1):
        store.roll(run_id, 1, chunk, 2**40)
    return _merged_rollups(engine) - before


def _merged_rollups(engine: Engine) -> int:
    """Merge the rollups; their bytes on disk."""
    writer = engine.writer()
    for table in ROLLUP_TABLES:
        writer.command(f"OPTIMIZE TABLE {table} FINAL")
    return sum(_stored(engine, table)[1] for table in ROLLUP_TABLES)


def _fill_runs(engine: Engine, runs: list[str], steps: int, series: int = SERIES) -> None:
    """Runs side by side: a piece of all of them, then the next piece."""
    writer = engine.writer()
    width = max(PIECE // (series * len(runs)), 1)
    names = "[" + ", ".join(f"'{run}'" for run in runs) + "]"
    for first in range(0, steps, width):
        count = min(width, steps - first)
        for statement in _statements(names, len(runs), first, count, series):
            writer.command(statement)


def _statements(names: str, runs: int, first: int, count: int, of_each: int) -> Iterator[str]:
    """Statistics with the noise of real ones: full mantissas, some of them zero."""
    step = f"{first} + intDiv(number, {runs})"
    run = f"{names}[number % {runs} + 1]"
    time_of = f"toDateTime64('2026-01-01 00:00:00', 6, 'UTC') + toIntervalSecond({step})"
    yield (
        f"INSERT INTO steps (run_id, attempt, step, time, ver) SELECT {run}, 1, {step}, {time_of},"
        f" {step} + 1 FROM numbers({runs * count})"
    )
    yield (
        f"INSERT INTO scalars (run_id, attempt, step, name, value, ver) SELECT {run}, 1, {step},"
        f" 'loss', 2 + rand(1) / 4294967295, {step} + 1 FROM numbers({runs * count})"
    )
    yield (
        "INSERT INTO risk (run_id, attempt, step, time, horizon, probability, state,"
        f" model_version, ver) SELECT {run}, 1, {step}, {time_of}, 100, rand(2) / 4294967295, 'ok',"
        f" 'm', 1 FROM numbers({runs * count})"
    )
    series = f"number % {of_each}"
    place = f"intDiv(number, {of_each})"
    noise = ", ".join(f"exp(rand({10 + index}) / 4294967295)" for index in range(8))
    yield (
        "INSERT INTO tensor_stats (run_id, attempt, step, layer, call_index, role, expert, format,"
        " granularity, what_if, numel, amax, rms, kurtosis, channel_kurtosis, headroom_log2,"
        " sqnr_db, zero_ratio, min_nonzero, underflow_ratio, overflow_ratio, ver)"
        f" SELECT {names}[{place} % {runs} + 1], 1, {first} + intDiv({place}, {runs}),"
        f" intDiv({series}, 5), 0, ['input', 'weight', 'grad_output', 'output',"
        f" 'grad_weight'][{series} % 5 + 1], -1, 'e4m3', 'tensor', false, 67108864, {noise},"
        " if(rand(20) % 5 < 3, 0, rand(21) / 4294967295), if(rand(22) % 50, 0, 0.01),"
        f" {first} + intDiv({place}, {runs}) + 1 FROM numbers({of_each * runs * count})"
    )


def settle(engine: Engine) -> None:
    """Wait until the background merges are done, as they are a while after any load."""
    quiet = 0
    while quiet < 3:
        merges = engine.read("SELECT count() AS n FROM system.merges", {})["n"][0].as_py()
        quiet = 0 if merges else quiet + 1
        time.sleep(1)


def _stored(engine: Engine, table: str) -> tuple[int, int]:
    row = engine.read(
        "SELECT sum(rows) AS n, sum(bytes_on_disk) AS size FROM system.parts"
        " WHERE active AND table = {table:String}",
        {"table": table},
    ).to_pylist()[0]
    return int(row["n"]), int(row["size"])


def _last_step(store: ClickHouseStore, run_id: str) -> int:
    bounds = store.bounds(View(run_id, 1))
    if bounds is None:
        raise SystemExit(f"run {run_id} is empty")
    return bounds[1]


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds), 1)


def _rss_mb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024


if __name__ == "__main__":
    main()
