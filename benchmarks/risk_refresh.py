"""Risk of many live runs: how soon after its record each run has a new risk, and what ingest feels.

Starts a real service and sends it one record of 500 tensor rows per run and second, all runs at
once; a reader of the event stream notes when each run's risk of that step is out. `refresh` is the
time from the first byte sent to the last of the runs' risks; acknowledgement times are those of the
same requests. `--history` fills the store first (rows over all runs), so that flatness shows.

    python benchmarks/risk_refresh.py [--runs 100] [--seconds 30] [--history 0] [--json]
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa

from benchmarks.ingest import LAYERS, ROLES, STEPS, make_table
from foreshock.monitor.record import write_stream

ARROW = "application/vnd.apache.arrow.stream"
WARM_STEPS = 60


@dataclass(frozen=True)
class Result:
    """What was measured."""

    runs: int
    tensors_per_record: int
    seconds: int
    history_steps: int
    refresh_p50_s: float
    refresh_max_s: float
    after_last_ack_max_s: float
    ack_p50_ms: float
    ack_p95_ms: float
    ack_max_ms: float
    service_cpu_cores: float
    rss_mb: int


@contextmanager
def served(folder: Path, workers: int) -> Iterator[tuple[str, int]]:
    """`foreshock serve` over a folder: its address and its process."""
    port = folder / "port"
    port.unlink(missing_ok=True)
    command = [sys.executable, "-c", "from foreshock.api.cli.main import run; run()", "serve"]
    command += ["--port", "0", "--data", str(folder / "data"), "--port-file", str(port)]
    environment = os.environ | {"FORESHOCK_ANALYSIS_WORKERS": str(workers)}
    process = subprocess.Popen(command, env=environment)
    try:
        while not port.exists():
            if process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{int(port.read_text())}", process.pid
    finally:
        process.terminate()
        process.wait(60)


class Listener(threading.Thread):
    """Notes when each run's risk of each step comes out of the event stream."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._changed = threading.Condition()
        self.seen: dict[tuple[str, int], float] = {}
        self.start()

    def run(self) -> None:
        """Follow the stream until the service ends it."""
        try:
            with httpx.stream("GET", f"{self._url}/api/v1/events", timeout=None) as answer:
                kind = ""
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        kind = line[7:]
                    elif kind == "risk" and line.startswith("data: "):
                        self._note(json.loads(line[6:]))
        except httpx.TransportError:
            return

    def _note(self, event: dict[str, object]) -> None:
        with self._changed:
            self.seen[str(event["run_id"]), int(str(event["step"]))] = time.perf_counter()
            self._changed.notify_all()

    def wait(self, runs: Sequence[str], step: int, seconds: float) -> float:
        """When the last of the runs had its risk of a step (or of a later one)."""
        with self._changed:
            if not self._changed.wait_for(lambda: all(self._when(r, step) for r in runs), seconds):
                missing = sum(self._when(run, step) is None for run in runs)
                raise SystemExit(f"step {step}: {missing} runs have no risk after {seconds} s")
            return max(self._when(run, step) or 0.0 for run in runs)

    def _when(self, run: str, step: int) -> float | None:
        return self.seen.get((run, step))


class Fleet:
    """Training jobs that report together."""

    def __init__(self, url: str, runs: int, first_step: int) -> None:
        self._client = httpx.Client(
            base_url=url, timeout=60, limits=httpx.Limits(max_connections=16)
        )
        self._pool = ThreadPoolExecutor(16)
        self._launches = [str(uuid.uuid4()) for _ in range(runs)]
        self.runs = list(self._pool.map(self._announce, range(runs)))
        self._sequence = 0
        rng = np.random.default_rng(0)
        tables = [make_table(STEPS * index, rng) for index in range(32)]
        self._rows = pa.concat_tables(tables).combine_chunks()
        self.step = first_step

    def _announce(self, index: int) -> str:
        body = {"run": f"run-{index}", "launch_id": self._launches[index], "layers": LAYERS}
        return str(self._client.post("/api/v1/runs", json=body).raise_for_status().json()["run_id"])

    def prepare(self, steps: int = 1) -> list[bytes]:
        """The bodies of the next steps, one per run; not part of what is measured."""
        bodies = []
        for index in range(len(self.runs)):
            first = (self.step + index) % (self._rows.num_rows - steps + 1)
            rows = self._rows.slice(first, steps)
            position = rows.schema.get_field_index("step")
            column = pa.array(range(self.step, self.step + steps), pa.int64())
            bodies.append(
                write_stream(rows.set_column(position, rows.schema.field("step"), column))
            )
        return bodies

    def send(self, bodies: Sequence[bytes], steps: int = 1) -> list[float]:
        """Send steps of every run; seconds of each acknowledgement."""
        seconds = list(self._pool.map(self._put, range(len(self.runs)), bodies))
        self._sequence += 1
        self.step += steps
        return seconds

    def _put(self, index: int, body: bytes) -> float:
        address = f"/api/v1/runs/{self.runs[index]}/batches/{self._launches[index]}-0"
        start = time.perf_counter()
        answer = self._client.put(
            f"{address}-{self._sequence}", content=body, headers={"Content-Type": ARROW}
        )
        if answer.status_code != 201:
            raise SystemExit(f"{answer.status_code}: {answer.text}")
        return time.perf_counter() - start


def measure(url: str, process: int, runs: int, seconds: int, history: int) -> Result:
    """Warm up, then a step of every run each second."""
    listener = Listener(url)
    fleet = Fleet(url, runs, 0)
    for _ in range(0, WARM_STEPS + history, WARM_STEPS):
        fleet.send(fleet.prepare(WARM_STEPS), WARM_STEPS)
        listener.wait(fleet.runs, fleet.step - 1, 600)
    refreshes, lags, acks = [], [], []
    family = _family(process)
    busy, began = _cpu(family), time.perf_counter()
    for _ in range(seconds):
        bodies = fleet.prepare()
        start = time.perf_counter()
        acks += fleet.send(bodies)
        acknowledged = time.perf_counter()
        done = listener.wait(fleet.runs, fleet.step - 1, 120)
        refreshes.append(done - start)
        lags.append(done - acknowledged)
        time.sleep(max(0.0, start + 1.0 - time.perf_counter()))
    busy = (_cpu(family) - busy) / (time.perf_counter() - began)
    cuts = statistics.quantiles(acks, n=100)
    return Result(
        runs=runs,
        tensors_per_record=len(LAYERS) * len(ROLES),
        seconds=seconds,
        history_steps=history,
        refresh_p50_s=round(statistics.median(refreshes), 3),
        refresh_max_s=round(max(refreshes), 3),
        after_last_ack_max_s=round(max(lags), 3),
        ack_p50_ms=round(1000 * cuts[49], 1),
        ack_p95_ms=round(1000 * cuts[94], 1),
        ack_max_ms=round(1000 * max(acks), 1),
        service_cpu_cores=round(busy, 2),
        rss_mb=sum(map(_rss_kb, family)) // 1024,
    )


def _family(process: int) -> list[int]:
    """A process and those that it started."""
    children = [p.read_text().split() for p in Path(f"/proc/{process}/task").glob("*/children")]
    return [process, *(int(child) for found in children for child in found)]


def _cpu(family: Sequence[int]) -> float:
    """Seconds of processor time so far."""
    ticks = 0
    for process in family:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _rss_kb(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--history", type=int, default=0, help="steps of every run before")
    parser.add_argument("--workers", type=int, default=-1, help="FORESHOCK_ANALYSIS_WORKERS")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), given.workers) as service:
        result = measure(*service, given.runs, given.seconds, given.history)
    if given.json:
        print(json.dumps(asdict(result)))
        return
    for name, value in asdict(result).items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
