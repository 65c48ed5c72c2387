"""The same statistics written to other stores: Prometheus, VictoriaMetrics, TensorBoard's files.

What each takes is what it was made for: samples by time and series, without record, attempt or
exactly-once. Encoding a remote write is the client's cost and is shown apart. The Snappy body is
made of literals alone, which is valid, cheaper to make than a compressed one, and larger.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.ingest import ROWS, STEPS
from foreshock.monitor.record import STATISTICS, flatten_tensors

__all__ = ["measure_peers"]

RUNS = 4


def measure_peers(tables: Sequence[pa.Table]) -> Iterator[str]:
    """Lines of a table: rows and samples a second, where the time goes, bytes on disk."""
    yield f"Peers: {len(tables)} batches over {RUNS} runs, one client, one after the other."
    yield ""
    yield "| written to | rows/s, with encoding | rows/s, server's wait only | samples/s | CPU s per M rows | bytes/row |"  # noqa: E501
    yield "|---|---|---|---|---|---|"
    for name, program, arguments in SERVERS:
        if shutil.which(program) is None:
            yield f"| {name} | `{program}` is not installed | | | | |"
        else:
            yield remote_write(name, [program, *arguments], tables)
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError:
        yield "| TensorBoard event files | tensorboard is not installed | | | | |"
    else:
        yield tensorboard(tables)


SERVERS = (
    (
        "Prometheus, remote write",
        "prometheus",
        (
            "--web.enable-remote-write-receiver",
            "--config.file={folder}/prometheus.yml",
            "--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ),
    ),
    (
        "VictoriaMetrics, remote write",
        "victoria-metrics",
        (
            "-storageDataPath={folder}/data",
            "-httpListenAddr=127.0.0.1:{port}",
            "-loggerLevel=ERROR",
            "-retentionPeriod=12",
        ),
    ),
)


@dataclass(frozen=True)
class Peer:
    """A running server."""

    port: int
    pid: int
    folder: Path


@contextmanager
def running(command: Sequence[str]) -> Iterator[Peer]:
    """A server of its own process over an empty folder."""
    with tempfile.TemporaryDirectory() as name:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (Path(name) / "prometheus.yml").write_text("global: {}\n")
        filled = [part.format(folder=name, port=port) for part in command]
        process = subprocess.Popen(filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_until_it_listens(port, process)
            yield Peer(port, process.pid, Path(name) / "data")
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit("a peer did not start")


def remote_write(name: str, command: Sequence[str], tables: Sequence[pa.Table]) -> str:
    """Send every batch as one remote-write request; a line of the table."""
    with running(command) as peer:
        connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=120)
        encoders = [Encoder(f"run-{index}", tables[0]) for index in range(RUNS)]
        waits, samples, began = 0.0, 0, time.perf_counter()
        for number, table in enumerate(tables):
            turn, run = divmod(number, RUNS)
            body, count = encoders[run].encode(table, turn)
            samples += count
            sent = time.perf_counter()
            connection.request("POST", "/api/v1/write", body, HEADERS)
            answer = connection.getresponse()
            text = answer.read()
            waits += time.perf_counter() - sent
            if answer.status not in (200, 204):
                raise SystemExit(f"{name}: {answer.status} {text[:200]!r}")
        whole = time.perf_counter() - began
        cpu = _cpu_seconds(peer.pid)
    rows = len(tables) * ROWS
    return (
        f"| {name} | {rows / whole:,.0f} | {rows / waits:,.0f} | {samples / whole:,.0f}"
        f" | {cpu / rows * 1e6:.2f} (server) | not flushed yet |"
    )


HEADERS = {
    "Content-Type": "application/x-protobuf",
    "Content-Encoding": "snappy",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}


class Encoder:
    """Remote-write requests of one run; what does not change about a series is encoded once."""

    def __init__(self, run: str, table: pa.Table) -> None:
        flat = flatten_tensors(table.slice(0, 1))
        identity = zip(flat["layer"].to_pylist(), flat["role"].to_pylist(), strict=True)
        self._labels = [
            _labels(run, layer, role, name) for layer, role in identity for name in STATISTICS
        ]
        self._start = int(time.time() * 1000) - 3_600_000

    def encode(self, table: pa.Table, turn: int) -> tuple[bytes, int]:
        """A batch as a Snappy body, a step a second; how many samples it holds."""
        flat = flatten_tensors(table)
        columns = [flat[name].cast(pa.float64()).to_numpy() for name in STATISTICS]
        per_step = flat.num_rows // STEPS
        # (series, steps), series in the order of the labels.
        values = np.stack(columns, axis=1).reshape(STEPS, per_step * len(STATISTICS)).T
        times = [_varint(self._start + 1000 * (STEPS * turn + step)) for step in range(STEPS)]
        out = bytearray()
        for labels, line in zip(self._labels, values, strict=True):
            series = bytearray(labels)
            for value, moment in zip(line.tolist(), times, strict=True):
                sample = b"\x09" + struct.pack("<d", value) + b"\x10" + moment
                series += b"\x12" + _varint(len(sample)) + sample
            out += b"\x0a" + _varint(len(series)) + series
        return _snappy(bytes(out)), values.size


def _labels(run: str, layer: str, role: str, statistic: str) -> bytes:
    """The labels of a TimeSeries, sorted by name."""
    pairs = {"__name__": f"fp8_{statistic}", "layer": layer, "role": role, "run": run}
    out = b""
    for name, value in pairs.items():
        label = b"".join(
            tag + _varint(len(text)) + text.encode()
            for tag, text in ((b"\x0a", name), (b"\x12", value))
        )
        out += b"\x0a" + _varint(len(label)) + label
    return out


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _snappy(data: bytes) -> bytes:
    """A Snappy block of literals of at most 64 KiB."""
    out = bytearray(_varint(len(data)))
    for start in range(0, len(data), 65536):
        piece = data[start : start + 65536]
        out += b"\xf4" + struct.pack("<H", len(piece) - 1) + piece
    return bytes(out)


def tensorboard(tables: Sequence[pa.Table]) -> str:
    """Each statistic of each tensor with `add_scalar`; a line of the table."""
    from torch.utils.tensorboard import SummaryWriter

    few = tables[: max(2, len(tables) // 10)]
    with tempfile.TemporaryDirectory() as folder:
        used, began = time.process_time(), time.perf_counter()
        writer = SummaryWriter(folder)
        for table in few:
            flat = flatten_tensors(table).to_pydict()
            for row in range(len(flat["step"])):
                tag = f"{flat['layer'][row]}/{flat['role'][row]}"
                for name in STATISTICS:
                    writer.add_scalar(f"{name}/{tag}", flat[name][row], flat["step"][row])
        writer.close()
        whole, cpu = time.perf_counter() - began, time.process_time() - used
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    rows = len(few) * ROWS
    return (
        f"| TensorBoard event files ({len(few)} batches) | {rows / whole:,.0f} | | "
        f"{rows * len(STATISTICS) / whole:,.0f} | {cpu / rows * 1e6:.2f} (client)"
        f" | {size / rows:.0f} |"
    )


def _cpu_seconds(pid: int) -> float:
    text = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK")
