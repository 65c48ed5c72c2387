"""A job of 1,024 ranks: what it costs to send, to relay and to store what they know.

    python -m benchmarks.collect_ranks [--ranks 1024] [--relays 8] [--ticks 2]

Three ways in one run, each with a service of its own, on loopback:

- every rank sends its full record to the service, as a run of its own, for one tick (it is slow);
- every rank reports to one relay of the cluster, rank 0 sends its records through it;
- the same through relays of nodes, in front of that of the cluster.

A tick is what a rank sends at once: ten steps, of which the first has statistics of every tensor.
Ticks follow each other as fast as everybody can take them, so requests and bytes count, not
seconds. Reports and records are made by the monitor's own code from random sums; CPU seconds and
the largest resident memory are the processes' own, from the first request until all is at rest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
from prometheus_client.parser import text_string_to_metric_families

from foreshock.monitor.entry import Entry
from foreshock.monitor.rank_reports import report_of
from foreshock.monitor.record import (
    IdentityColumns,
    TensorIdentity,
    compress,
    encode_reports,
    record_batch,
    write_stream,
)
from foreshock.monitor.table import FIELDS, NEUTRAL, SumTable

ARROW = "application/vnd.apache.arrow.stream"
STEPS = 10
LAYERS = tuple(f"blocks.{i}.{name}" for i in range(8) for name in ("qkv", "out", "up", "down"))
ENTRIES = tuple(
    Entry(TensorIdentity(layer, role, "e4m3"), None)
    for layer in LAYERS
    for role in ("input", "weight", "grad_output")
)
COLUMNS = IdentityColumns.of([entry.identity for entry in ENTRIES])
START = datetime(2026, 1, 1, tzinfo=UTC)
MOST_AT_ONCE = 16
RUN = "simulated"


def sums(rng: np.random.Generator) -> SumTable:
    """Sums of every tensor of one rank at one step."""
    values = np.tile(NEUTRAL, (len(ENTRIES), 1))
    for name in ("numel", "observations", "sequences"):
        values[:, FIELDS.index(name)] = 4096.0
    for name in ("sum2", "sum4", "amax", "min_nonzero", "sequence_kurtosis", "error2"):
        values[:, FIELDS.index(name)] = rng.lognormal(size=len(ENTRIES))
    values[:, FIELDS.index("headroom_log2")] = rng.normal(5.0, 1.0, len(ENTRIES))
    values[:, FIELDS.index("scale_log2")] = values[:, FIELDS.index("scale_log2_max")] = 3.0
    count = len(ENTRIES)
    return SumTable(ENTRIES, values, np.full(count, np.inf), np.zeros(count))


def seconds_of(rng: np.random.Generator) -> float:
    """Duration of a step."""
    return float(rng.lognormal(-1.0, 0.05))


def bundle(rank: int, tick: int) -> tuple[bytes, str]:
    """What a rank tells a relay about a tick: a body and its encoding."""
    rng = np.random.default_rng((rank, tick))
    reports = [
        report_of(
            tick * STEPS + step,
            rank,
            table=sums(rng) if step == 0 and rank else None,
            health={
                "step_seconds": seconds_of(rng),
                "overhead_ratio": float(rng.uniform(0.001, 0.01)),
                "device_bytes": float(rng.integers(2**35, 2**36)),
            },
        )
        for step in range(STEPS)
    ]
    return compress(encode_reports(reports))


def records(rank: int, tick: int) -> bytes:
    """The records of a rank over a tick, as its spool seals them."""
    rng = np.random.default_rng((rank, tick))
    rows = []
    for step in range(STEPS):
        statistics = sums(rng).sums(np.arange(len(ENTRIES))).statistics() if step == 0 else None
        number = tick * STEPS + step
        scalars = {"loss": float(rng.normal(3.0, 0.1)), "grad_norm": float(rng.lognormal())}
        scalars |= {"learning_rate": 3e-4, "param_norm": 50.0, "update_ratio": 1e-3}
        scalars |= {"step_seconds": seconds_of(rng), "overhead_ratio": 0.005}
        rows.append(
            record_batch(
                step=number,
                time=START + timedelta(seconds=number),
                scalars=scalars,
                identities=None if statistics is None else COLUMNS,
                statistics=statistics,
            )
        )
    return write_stream(pa.Table.from_batches(rows))


@dataclass
class Process:
    """`foreshock serve` or `collect` while it runs."""

    popen: subprocess.Popen[bytes]
    url: str
    before: float = 0.0

    def cpu(self) -> float:
        """CPU seconds of the process so far."""
        fields = Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def mebibytes(self) -> float:
        """Largest resident memory so far."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    def numbers(self) -> dict[str, float]:
        """A relay's counters."""
        text = httpx.get(f"{self.url}/metrics", timeout=120).text
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        return {s.name.removeprefix("foreshock_collect_"): s.value for s in samples}


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    """A command of foreshock, on a port and in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-c", "from foreshock.api.cli.main import run; run()"]
        command += [*arguments, "--port", "0", "--data", str(folder / "data")]
        command += ["--port-file", str(folder / "port")]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")}
        popen = subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL)
        try:
            while not (folder / "port").exists():
                if popen.poll() is not None:
                    raise SystemExit(f"foreshock {arguments[0]} did not start")
                time.sleep(0.05)
            made = Process(popen, f"http://127.0.0.1:{int((folder / 'port').read_text())}")
            made.before = made.cpu()
            yield made
        finally:
            popen.terminate()
            popen.wait(120)


class Ranks:
    """All ranks of the job; a few threads lend them their connections.

    Attributes:
        requests, sent: Requests and bytes of bodies so far.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(MOST_AT_ONCE)
        self._lock = threading.Lock()
        self.requests = 0
        self.sent = 0

    def all(self, ranks: Sequence[int], send: Callable[[int], None]) -> None:
        """Call `send(rank)` for each."""
        for _ in self._pool.map(send, ranks):
            pass

    def post(self, url: str, run: str, launch: str, world_size: int) -> None:
        """Announce a launch."""
        body = {"run": run, "launch_id": launch, "layers": LAYERS, "world_size": world_size}
        self._client().post(f"{url}/api/v1/runs", json=body).raise_for_status()

    def put(self, url: str, body: bytes, encoding: str = "identity", kind: str = ARROW) -> None:
        """Send until it is taken."""
        headers = {"Content-Type": kind, "Content-Encoding": encoding}
        while True:
            answer = self._client().put(url, content=body, headers=headers)
            with self._lock:
                self.requests += 1
                self.sent += len(body)
            if answer.status_code != 503:
                answer.raise_for_status()
                return
            time.sleep(0.5)

    def _client(self) -> httpx.Client:
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(timeout=600, trust_env=False)
        client: httpx.Client = self._local.client
        return client


@dataclass
class Result:
    """One way's figures.

    Attributes:
        rank_bytes: Bytes of bodies that a rank sends per step.
        service_bytes: Bytes that reach the service per step.
        requests: Requests per step, by level.
        cpu: CPU milliseconds per step, by level.
        memory: Largest resident MiB of one process, by level.
    """

    rank_bytes: float
    service_bytes: float
    requests: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def at_rest(processes: Sequence[Process]) -> None:
    """Wait until nobody works any more."""
    while True:
        before = [each.cpu() for each in processes]
        time.sleep(4.0)
        if sum(each.cpu() for each in processes) - sum(before) < 0.1:
            return


def load(result: Result, levels: dict[str, Sequence[Process]], steps: int) -> None:
    """Fill in what the processes took."""
    for name, processes in levels.items():
        spent = sum(each.cpu() - each.before for each in processes)
        result.cpu[name] = spent * 1e3 / steps
        result.memory[name] = max(each.mebibytes() for each in processes)


def direct(size: int, ticks: int) -> Result:
    """Every rank sends its records to the service."""
    steps = ticks * STEPS
    with process("serve") as service:
        ranks = Ranks()
        launches = [str(uuid.uuid4()) for _ in range(size)]
        ranks.all(
            range(size), lambda rank: ranks.post(service.url, f"{RUN}-{rank}", launches[rank], size)
        )

        for tick in range(ticks):

            def send(rank: int, tick: int = tick) -> None:
                address = (
                    f"{service.url}/api/v1/runs/{RUN}-{rank}/batches/{launches[rank]}-0-{tick}"
                )
                ranks.put(address, records(rank, tick))

            ranks.all(range(size), send)
        at_rest([service])
        result = Result(ranks.sent / size / steps, ranks.sent / steps)
        result.requests["service"] = ranks.requests / steps
        load(result, {"service": [service]}, steps)
    return result


def relayed(size: int, ticks: int, nodes: int) -> Result:
    """Every rank reports to a relay; `nodes` relays in front of that of the cluster, or none."""
    steps = ticks * STEPS
    with ExitStack() as stack:
        service = stack.enter_context(process("serve"))
        # Simulated ranks take long to say what real ones say within a second.
        cluster = stack.enter_context(process("collect", "--url", service.url, "--wait", "300"))
        first = [
            stack.enter_context(process("collect", "--relay", cluster.url)) for _ in range(nodes)
        ] or [cluster]
        ranks = Ranks()
        record_bytes = train(ranks, [relay.url for relay in first], size, ticks)
        at_rest([service, cluster, *first])
        check(service.url, steps, size)
        above = cluster.numbers()
        result = Result(
            (ranks.sent - record_bytes) / size / steps, above["sent_bytes_total"] / steps
        )
        if nodes:
            result.requests["each node relay"] = ranks.requests / steps / nodes
        taken = above["bundles_total"] + above["batches_total"]
        result.requests["cluster relay"] = taken / steps
        result.requests["service"] = above["forwarded_batches_total"] / steps
        levels: dict[str, Sequence[Process]] = {"service": [service], "cluster relay": [cluster]}
        if nodes:
            levels["node relays"] = first
        load(result, levels, steps)
    return result


def train(ranks: Ranks, relays: Sequence[str], size: int, ticks: int) -> int:
    """All ranks report, and rank 0 sends its records; the bytes of the latter."""
    launch = str(uuid.uuid4())
    ranks.post(relays[0], RUN, launch, size)
    record_bytes = 0
    for tick in range(ticks):

        def send(rank: int, tick: int = tick) -> None:
            body, encoding = bundle(rank, tick)
            relay = relays[rank * len(relays) // size]
            address = f"{relay}/api/v1/runs/{RUN}/reports/{launch}"
            ranks.put(address, body, encoding, "application/json")

        ranks.all(range(size), send)
        body = records(0, tick)
        record_bytes += len(body)
        ranks.put(f"{relays[0]}/api/v1/runs/{RUN}/batches/{launch}-0-{tick}", body)
    return record_bytes


def check(url: str, steps: int, size: int) -> None:
    """The service has each step once, with a word of every rank."""
    answer = httpx.get(f"{url}/api/v1/runs/{RUN}/records", timeout=120).json()["records"]
    heard = [record["scalars"].get("ranks_heard") for record in answer]
    if heard != [float(size)] * steps:
        raise SystemExit(f"of {steps} records the service has {len(answer)}, heard: {set(heard)}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--relays", type=int, default=8)
    parser.add_argument("--ticks", type=int, default=2)
    given = parser.parse_args()
    ways: dict[str, Callable[[], Result]] = {
        "every rank's full record to the service": lambda: direct(given.ranks, 1),
        "one relay": lambda: relayed(given.ranks, given.ticks, 0),
        f"{given.relays} node relays, cluster relay": lambda: relayed(
            given.ranks, given.ticks, given.relays
        ),
    }
    print(
        f"{given.ranks} ranks, {len(ENTRIES)} tensors; "
        f"{STEPS} steps direct, {given.ticks * STEPS} relayed\n"
    )
    print("| way | bytes per rank and step | bytes per step into the service | requests per step |")
    print("|---|---|---|---|")
    results = {}
    for name, way in ways.items():
        found = results[name] = way()
        fan_in = ", ".join(f"{level} {count:.1f}" for level, count in found.requests.items())
        line = f"| {name} | {found.rank_bytes:.0f} | {found.service_bytes:,.0f} | {fan_in} |"
        print(line, flush=True)
    print("\n| way | CPU ms per step | largest resident MiB of a process |\n|---|---|---|")
    for name, found in results.items():
        cpu = ", ".join(f"{level} {value:,.1f}" for level, value in found.cpu.items())
        memory = ", ".join(f"{level} {value:,.0f}" for level, value in found.memory.items())
        print(f"| {name} | {cpu} | {memory} |")


if __name__ == "__main__":
    main()
