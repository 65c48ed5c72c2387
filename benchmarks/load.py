"""The service under load: offered against achieved, acknowledgements, reads, memory; peers beside.

A hundred live runs send a batch of 2,000 tensor rows each, open loop: a batch is due at its time
whatever became of the one before, and its wait counts from then. Clients are processes of their
own on the same cores. The bare engine and, with `--peers`, Prometheus (remote write),
VictoriaMetrics and TensorBoard's event files take the same statistics in the same run; what they
lack is said beside them. On a busy machine compare the CPU seconds per million rows: they say what
the cores would carry if they were free.

    python -m benchmarks.load [--offered 50,100,150,0] [--seconds 20] [--live both] [--peers]
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import queue
import statistics
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from benchmarks.ingest import LAYERS, ROWS, STEPS, make_table, measure_engine, served
from foreshock.monitor.record import write_stream

RUNS = 100
PROCESSES = 2
CLOCK = os.sysconf("SC_CLK_TCK")
ARROW = "application/vnd.apache.arrow.stream"

Times = list[tuple[float, float]]
"""Seconds from due to acknowledged, and when it was acknowledged."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One load; milliseconds, rows a second, MB, CPU seconds per million rows."""

    live: bool
    offered: str
    achieved: int
    failed: int
    ack_p50: float
    ack_p95: float
    ack_p99: float
    service_cpu: float
    all_cpu: float
    rss: int
    reads: dict[str, str]


def cpu_seconds(pid: int) -> float:
    """CPU that a process and its children have used."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) == pid or int(text[1]) == pid:
            total += (int(text[11]) + int(text[12])) / CLOCK
    return total


def resident_mb(pid: int) -> int:
    """Memory of a process, children left out."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


@dataclass(frozen=True)
class Job:
    """One run: where its batches go."""

    run_id: str
    launch: str

    def address(self, sequence: int) -> str:
        """Of one batch."""
        return f"/api/v1/runs/{self.run_id}/batches/{self.launch}-0-{sequence}"


def announce(url: str, count: int) -> list[Job]:
    """Make runs known."""
    jobs = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for index in range(count):
            launch = str(uuid.uuid4())
            body = {"run": f"load-{launch[:8]}-{index}", "launch_id": launch, "layers": LAYERS}
            jobs.append(Job(client.post("/api/v1/runs", json=body).json()["run_id"], launch))
    return jobs


class Sender:
    """The runs of one client process, each with a connection of its own."""

    def __init__(self, url: str, bodies: Sequence[bytes], *, open_loop: bool) -> None:
        self.due: queue.SimpleQueue[tuple[float, Job, int]] = queue.SimpleQueue()
        self.done: Times = []
        self.failed: list[int] = []
        self._address = urlsplit(url)
        self._bodies = bodies
        self._open_loop = open_loop

    def work(self) -> None:
        """Send whatever falls due next, until nothing is left."""
        host, port = str(self._address.hostname), self._address.port
        connection = http.client.HTTPConnection(host, port, timeout=120)
        while True:
            try:
                at, job, sequence = self.due.get_nowait()
            except queue.Empty:
                break
            time.sleep(max(0.0, at - time.time()))
            began = at if self._open_loop else time.time()
            status = self._put(connection, job.address(sequence), self._bodies[sequence])
            if status == 201:
                self.done.append((time.time() - began, time.time()))
            else:
                self.failed.append(status)
        connection.close()

    def _put(self, connection: http.client.HTTPConnection, address: str, body: bytes) -> int:
        try:
            connection.request("PUT", address, body, {"Content-Type": ARROW})
            answer = connection.getresponse()
            answer.read()
        except OSError:
            connection.close()
            return 0
        return answer.status


def send(
    url: str, jobs: list[Job], bodies: list[bytes], gap: float, start: float, answers: Any
) -> None:
    """A client process: batch k of all its runs falls due one after the other, `gap` apart.

    Args:
        url: The service.
        jobs: Its runs.
        bodies: Batch k of every run.
        gap: Seconds between two batches of this process; 0 = a run sends when it has its answer.
        start: `time.time()` of the first.
        answers: Queue that gets the seconds of every acknowledgement, and how many failed.
    """
    sender = Sender(url, bodies, open_loop=gap > 0)
    for number, (sequence, job) in enumerate((s, j) for s in range(len(bodies)) for j in jobs):
        sender.due.put((start + number * gap, job, sequence))
    threads = [threading.Thread(target=sender.work) for _ in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put((sender.done, len(sender.failed), time.process_time()))


def read(url: str, run: str, live: bool, until: Any, answers: Any) -> None:
    """A reader process: risk, a series and a heatmap in turn, a tenth of a second apart."""
    calls: dict[str, tuple[str, dict[str, str]]] = {
        "series": (f"/api/v1/runs/{run}/series", {"name": "loss"}),
        "heatmap": (f"/api/v1/runs/{run}/heatmap", {"role": "input", "statistic": "kurtosis"}),
    }
    if live:
        calls["risk"] = (f"/api/v1/runs/{run}/risk", {})
    found: dict[str, list[float]] = {name: [] for name in calls}
    refused = 0
    with httpx.Client(base_url=url, timeout=60) as client:
        while not until.is_set():
            for name, (path, query) in calls.items():
                began = time.perf_counter()
                answer = client.get(path, params=query)
                found[name].append(time.perf_counter() - began)
                refused += answer.status_code >= 500
                time.sleep(0.1)
    answers.put((found, refused))


def quantile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return round(1000 * float(np.quantile(values, share)), 1) if values else float("nan")


def measure(
    url: str, pid: int, bodies: list[bytes], offered: int, seconds: float, live: bool
) -> Load:
    """One load of `offered` batches a second over all runs; 0 is flat out."""
    context = multiprocessing.get_context("spawn")
    jobs = announce(url, RUNS)
    batches = max(1, round((offered or 150) * seconds / RUNS))
    answers, readings, over = context.Queue(), context.Queue(), context.Event()
    start = time.time() + 3.0
    gap = PROCESSES / offered if offered else 0.0
    senders = [
        context.Process(
            target=send, args=(url, jobs[i::PROCESSES], bodies[:batches], gap, start, answers)
        )
        for i in range(PROCESSES)
    ]
    reader = context.Process(target=read, args=(url, jobs[0].run_id, live, over, readings))
    for process in (*senders, reader):
        process.start()
    time.sleep(max(0.0, start - time.time()))
    before = cpu_seconds(pid)
    found = [answers.get() for _ in senders]
    service = cpu_seconds(pid) - before
    over.set()
    latencies, refused = readings.get()
    for process in (*senders, reader):
        process.join()
    done = [item for times, _, _ in found for item in times]
    waits = [wait for wait, _ in done]
    rows = len(done) * ROWS
    clients = sum(cpu for _, _, cpu in found)
    reads = {name: f"{quantile(v, 0.5)} / {quantile(v, 0.95)}" for name, v in latencies.items()}
    if refused:
        reads["5xx"] = str(refused)
    return Load(
        live=live,
        offered=f"{offered * ROWS:,}" if offered else "flat out",
        achieved=round(rows / (max(at for _, at in done) - start)),
        failed=sum(count for _, count, _ in found),
        ack_p50=quantile(waits, 0.5),
        ack_p95=quantile(waits, 0.95),
        ack_p99=quantile(waits, 0.99),
        service_cpu=round(service / rows * 1e6, 2),
        all_cpu=round((service + clients) / rows * 1e6, 2),
        rss=resident_mb(pid),
        reads=reads,
    )


@contextmanager
def service(live: bool) -> Iterator[tuple[str, int]]:
    """A service of its own process: its address and its id."""
    with served(live) as url:
        mine = os.getpid()
        children = Path(f"/proc/{mine}/task/{mine}/children").read_text().split()
        yield url, max(int(child) for child in children if _serves(int(child)))


def _serves(pid: int) -> bool:
    return b"server.listen" in Path(f"/proc/{pid}/cmdline").read_bytes()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--offered", default="50,100,150,0", help="batches a second; 0 flat out")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--live", choices=("on", "off", "both"), default="both")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    offered = [int(part) for part in given.offered.split(",")]
    rng = np.random.default_rng(0)
    most = max([*offered, 150])
    count = max(1, round(most * given.seconds / RUNS))
    tables = [make_table(STEPS * index, rng) for index in range(max(count, 60))]
    bodies = [write_stream(table) for table in tables]
    load = statistics.mean(os.getloadavg())
    print(f"load of the machine before: {load:.1f}; {os.cpu_count()} cores\n")
    single, grouped = measure_engine(tables[:60])
    print(f"the bare engine: {single:,.0f} rows/s single, {grouped:,.0f} grouped\n")
    loads = []
    for live in (False, True):
        if given.live != "both" and live != (given.live == "on"):
            continue
        for rate in offered:
            with service(live) as (url, pid):
                loads.append(measure(url, pid, bodies, rate, given.seconds, live))
            show(loads[-1], header=len(loads) == 1)
    if given.json:
        print(json.dumps([asdict(load) for load in loads]))
    if given.peers:
        from benchmarks.peers import measure_peers

        print()
        for line in measure_peers(tables[:60]):
            print(line, flush=True)


def show(load: Load, *, header: bool) -> None:
    """A line of the table."""
    if header:
        print(
            "| live | offered rows/s | achieved | failed | ack p50 / p95 / p99 ms"
            " | CPU s per M rows: service / with clients | RSS MB | reads p50 / p95 ms |"
        )
        print("|---|---|---|---|---|---|---|---|")
    reads = ", ".join(f"{name} {value}" for name, value in load.reads.items())
    print(
        f"| {'on' if load.live else 'off'} | {load.offered} | {load.achieved:,} | {load.failed}"
        f" | {load.ack_p50} / {load.ack_p95} / {load.ack_p99}"
        f" | {load.service_cpu} / {load.all_cpu} | {load.rss} | {reads} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
