"""What a service that is dead, slow or refusing costs a training step.

    python -m benchmarks.service_faults [--steps 400]

The same small model is trained with records to disk only, and with a service that is not there,
one that answers after five seconds, one that refuses every batch, and one that takes them at once.
Steps of all variants take turns in one process. Printed is what each adds to the bare step: the
median and the 99th percentile.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import nn

from benchmarks.monitor_overhead import Transformer
from foreshock.monitor import Watch, watch

Step = Callable[[], None]


def handler(status: int, seconds: float) -> type[BaseHTTPRequestHandler]:
    """A service that always answers the same, after a while."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            """Read the body, wait, answer."""
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(seconds)
            body = b'{"attempt": 1, "duplicate": false}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = answer

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler


@contextmanager
def service(status: int, seconds: float) -> Iterator[str]:
    """Its address, while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(status, seconds))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def trained(name: str, url: str | None, spool: Path, *, watched: bool) -> tuple[Step, Watch | None]:
    """A step of a model, and its watch."""
    torch.manual_seed(0)
    model = Transformer(width=64, layers=2, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(256, (4, 65))
    seen = None
    if watched:
        seen = watch(model, optimizer, run=name, spool=spool / name, url=url, tensor_every=10)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, seen


def measure(steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step by variant."""
    with ExitStack() as stack:
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls: dict[str, str | None] = {
            "no monitor": None,
            "disk only": None,
            "service takes them": stack.enter_context(service(200, 0.0)),
            "service dead": nobody(),
            "service answers after 5 s": stack.enter_context(service(200, 5.0)),
            "service refuses (422)": stack.enter_context(service(422, 0.0)),
            "service has no time (503)": stack.enter_context(service(503, 0.0)),
        }
        variants = {
            name: trained(f"v{number}", url, spool, watched=number > 0)
            for number, (name, url) in enumerate(urls.items())
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(steps):
            for name, (step, _watch) in variants.items():
                began = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - began) * 1e3)
        for _, seen in variants.values():
            if seen is not None:
                seen.close(0.5)
    return times


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    times = {name: values[20:] for name, values in measure(steps).items()}
    bare = times.pop("no monitor")
    median = statistics.median(bare)
    tail = statistics.quantiles(bare, n=100)[98]
    print(f"a step without a monitor: median {median:.2f} ms, p99 {tail:.2f} ms; {steps} steps\n")
    print("| records go to | median ms | added | p99 ms | added |\n|---|---|---|---|---|")
    for name, values in times.items():
        middle, high = statistics.median(values), statistics.quantiles(values, n=100)[98]
        print(f"| {name} | {middle:.2f} | {middle - median:.2f} | {high:.2f} | {high - tail:.2f} |")


if __name__ == "__main__":
    main()
