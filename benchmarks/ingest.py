"""Durable ingest: rows a second and acknowledgement times over HTTP, beside the bare engine.

Both are measured in one run on the same batches (2,000 tensor rows each: 4 steps of 500 series),
so that the ratio holds on any machine. `--live` includes the live analysis, which a store-only
figure must not. Run it on an otherwise idle machine.

    python benchmarks/ingest.py [--batches 600] [--clients 8] [--json] [--live]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa

from foreshock.api.store_open import open_store
from foreshock.api.store_rows import Placed, place, split
from foreshock.api.store_url import ChdbPlace
from foreshock.monitor.record import (
    STATISTICS,
    IdentityColumns,
    TensorIdentity,
    record_batch,
    write_stream,
)

LAYERS = tuple(f"blocks.{block}.{part}" for block in range(25) for part in ("a", "b", "c", "d"))
ROLES = ("input", "weight", "grad_output", "output", "grad_weight")
STEPS = 4
ROWS = STEPS * len(LAYERS) * len(ROLES)
GROUP = 20


@dataclass(frozen=True)
class Result:
    """What was measured."""

    rows_per_batch: int
    batches: int
    engine_single_rows_per_s: float
    engine_grouped_rows_per_s: float
    http_rows_per_s: float
    http_over_engine_single: float
    ack_p50_ms: float
    ack_p95_ms: float
    ack_max_ms: float
    clients: int
    live: bool


def make_table(first_step: int, rng: np.random.Generator) -> pa.Table:
    """Four records of 500 series with noisy statistics."""
    identities = IdentityColumns.of(
        [TensorIdentity(layer, role, "e4m3") for layer in LAYERS for role in ROLES]
    )
    count = len(identities.identities)
    batches = []
    for step in range(first_step, first_step + STEPS):
        columns = {name: np.ma.array(rng.standard_normal(count) ** 2) for name in STATISTICS}
        columns["numel"] = columns["observations"] = np.ma.ones(count)
        batches.append(
            record_batch(
                step=step,
                time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=step),
                scalars={"loss": 2.0 + rng.standard_normal(), "grad_norm": 1.0},
                identities=identities,
                statistics=columns,
            )
        )
    return pa.Table.from_batches(batches)


def measure_engine(tables: Sequence[pa.Table]) -> tuple[float, float]:
    """Rows a second into the bare store: an INSERT per batch, and 20 batches per INSERT."""
    ids = {name: index for index, name in enumerate(LAYERS)}

    def rows(run: str, index: int) -> dict[str, pa.Table]:
        placed = Placed(
            run_id=run, attempts=np.ones(STEPS, np.int64), commit=index + 1, layer_ids=ids
        )
        return place(split(tables[index]), placed)

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(ChdbPlace(Path(folder) / "store"), lambda _: LAYERS)
        store.append([rows("warm", 0)])
        singles = [rows("single", index) for index in range(len(tables))]
        start = time.perf_counter()
        for single in singles:
            store.append([single])
        single_rate = len(tables) * ROWS / (time.perf_counter() - start)
        grouped = [rows("grouped", index) for index in range(len(tables))]
        start = time.perf_counter()
        for first in range(0, len(tables), GROUP):
            store.append(grouped[first : first + GROUP])
        grouped_rate = len(tables) * ROWS / (time.perf_counter() - start)
        store.close()
    return single_rate, grouped_rate


SERVER = """
import sys, pathlib
from foreshock.api.cli import server
from foreshock.api.settings import Settings
import foreshock.api.app as app
live = sys.argv[2] == "live"
if not live:
    make = server.create_app
    server.create_app = lambda settings, live=None: make(settings)
folder = pathlib.Path(sys.argv[1])
settings = Settings(data_dir=folder / "data", port=0)
server.run(settings, server.listen(settings), folder / "port")
"""


@contextmanager
def served(live: bool) -> Iterator[str]:
    """A service of its own process; its address."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = [sys.executable, "-c", SERVER, name, "live" if live else "store"]
        process = subprocess.Popen(arguments, env=os.environ)
        try:
            while not (folder / "port").exists():
                if process.poll() is not None:
                    raise SystemExit("the service did not start")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{int((folder / 'port').read_text())}"
        finally:
            process.terminate()
            process.wait(60)


class Client(threading.Thread):
    """One training job: sends its batches one after the other."""

    def __init__(self, url: str, bodies: Sequence[bytes], name: str) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._client = httpx.Client(base_url=url, timeout=60)
        self._bodies = bodies
        self._launch = str(uuid.uuid4())
        body = {"run": name, "launch_id": self._launch, "layers": LAYERS}
        self._run = self._client.post("/api/v1/runs", json=body).json()["run_id"]

    def run(self) -> None:
        """Send; note how long each acknowledgement takes."""
        headers = {"Content-Type": "application/vnd.apache.arrow.stream"}
        for sequence, body in enumerate(self._bodies):
            address = f"/api/v1/runs/{self._run}/batches/{self._launch}-0-{sequence}"
            start = time.perf_counter()
            answer = self._client.put(address, content=body, headers=headers)
            self.seconds.append(time.perf_counter() - start)
            if answer.status_code != 201:
                raise SystemExit(f"{answer.status_code}: {answer.text}")
        self._client.close()


def measure_http(bodies: Sequence[bytes], clients: int, live: bool) -> tuple[float, list[float]]:
    """Rows a second over HTTP, and the seconds of every acknowledgement."""
    share = len(bodies) // clients
    with served(live) as url:
        warm = Client(url, bodies[:4], "warm")
        warm.start()
        warm.join()
        jobs = [Client(url, bodies[:share], f"run-{index}") for index in range(clients)]
        start = time.perf_counter()
        for job in jobs:
            job.start()
        for job in jobs:
            job.join()
        elapsed = time.perf_counter() - start
    return clients * share * ROWS / elapsed, [s for job in jobs for s in job.seconds]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    tables = [make_table(STEPS * index, rng) for index in range(given.batches)]
    bodies = [write_stream(table) for table in tables]
    single, grouped = measure_engine(tables)
    rate, seconds = measure_http(bodies, given.clients, given.live)
    cuts = statistics.quantiles(seconds, n=100)
    result = Result(
        rows_per_batch=ROWS,
        batches=given.batches,
        engine_single_rows_per_s=round(single),
        engine_grouped_rows_per_s=round(grouped),
        http_rows_per_s=round(rate),
        http_over_engine_single=round(rate / single, 3),
        ack_p50_ms=round(1000 * cuts[49], 1),
        ack_p95_ms=round(1000 * cuts[94], 1),
        ack_max_ms=round(1000 * max(seconds), 1),
        clients=given.clients,
        live=given.live,
    )
    if given.json:
        print(json.dumps(asdict(result)))
        return
    for name, value in asdict(result).items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
