"""How fast the page loads and the API behind it answers: p50 and p95 of one service with one run.

Starts a service of its own on a free port, sends a synthetic run (3,000 steps, 24 layers, tensors
at every step), then asks each address in turn. Times include HTTP on loopback; the page's own time
is taken in headless Chromium when Debian's is here. Run alone: `python -m benchmarks.page_latency`.

With `--long` the run has 100,000 steps and 4,000 series of tensors (at every 100th step), and the
page's views of it are timed too, whole and zoomed into its last 2,000 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.browser import Browser, installed, open_browser
from tests.dashboards.long_run import LongRun, send_long_run
from tests.dashboards.service import Service, running_service
from tests.dashboards.synthetic import SyntheticRun

RUN = "bench"
LAYERS = tuple(
    f"blocks.{b}.{part}" for b in range(8) for part in ("attention", "mlp.up", "mlp.down")
)
DRAWN = "return ['loss', 'heat'].every(id => document.querySelector(`#${id} .main-svg`))"
LONG = LongRun(name=RUN, steps=100_000)
# What is measured of a view begins at its address and ends when all of this is on the page.
VIEWS = {
    "run": (f"#/run/default/{RUN}", DRAWN),
    "run, last 2,000 steps": (f"#/run/default/{RUN}?from=98000&to=99999", DRAWN),
    "layer": (
        f"#/run/default/{RUN}/layer/blocks.100.mlp.down",
        "return document.querySelector('.chart .main-svg') !== null",
    ),
    "fleet": ("#/", "return document.querySelector('#runs .spark path') !== null"),
}
PATHS = {
    "GET /": "/",
    "GET /assets/plotly.min.js": "/assets/plotly.min.js?v=0",
    "GET /api/v1/runs": "/api/v1/runs",
    "GET /runs/{run}/risk": f"/api/v1/runs/{RUN}/risk",
    "GET /runs/{run}/risk/history": f"/api/v1/runs/{RUN}/risk/history?points=800",
    "GET /runs/{run}/series, loss": f"/api/v1/runs/{RUN}/series?name=loss&points=800",
    "GET /runs/{run}/heatmap, kurtosis": f"/api/v1/runs/{RUN}/heatmap?statistic=kurtosis",
    "GET /runs/{run}/diagnosis": f"/api/v1/runs/{RUN}/diagnosis",
    "GET /alerts": f"/api/v1/alerts?run={RUN}",
    "GET /metrics": "/metrics",
}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return {"p50_ms": round(1e3 * cuts[9], 1), "p95_ms": round(1e3 * cuts[18], 1)}


def timed(times: int, work: Callable[[], object]) -> dict[str, float]:
    """Spread of the time of `work`, the first time left out."""
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return spread(seconds)


def ask(service: Service, path: str) -> None:
    """One request.

    Raises:
        httpx.HTTPStatusError: The service did not answer with success.
    """
    service.client.get(path).raise_for_status()


def load(browser: Browser, address: str, drawn: str = DRAWN) -> None:
    """Open a view and wait until its charts are drawn."""
    browser.driver.get("about:blank")  # a change behind the # alone would not load the page anew
    browser.driver.get(address)
    browser.wait("the charts", lambda: browser.evaluate(drawn), 60)


def page_times(
    service: Service, times: int, views: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, float]]:
    """Loading the page with its charts: with an empty cache, and again; and its views."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        first = []
        for turn in range(3):
            with open_browser(Path(folder) / str(turn)) as browser:
                start = time.perf_counter()
                load(browser, f"{service.address}/?run={RUN}")
                first.append(time.perf_counter() - start)
        with open_browser(Path(folder) / "again") as browser:

            def again(tail: str, drawn: str) -> dict[str, float]:
                return timed(times, lambda: load(browser, f"{service.address}/{tail}", drawn))

            found = {"page with charts, again": again(f"?run={RUN}", DRAWN)}
            found |= {f"page, {name}": again(*view) for name, view in views.items()}
    return {"page with charts, empty cache (of 3)": spread(first)} | found


def send_usual_run(service: Service, steps: int) -> None:
    """Tensors at every step, and an illness from two thirds on."""
    run = SyntheticRun(service.client, RUN, onset=steps * 2 // 3, layers=LAYERS)
    while run.next_step < steps:
        run.send(min(250, steps - run.next_step))


def wait_for_scores(service: Service, last: int, seconds: float) -> None:
    """Until the live analysis has seen every record.

    Raises:
        SystemExit: It has not in time.
    """
    deadline = time.monotonic() + seconds
    while service.client.get(f"/api/v1/runs/{RUN}/risk").json()["step"] != last:
        if time.monotonic() > deadline:
            raise SystemExit(f"the service did not score all records in {seconds:.0f} s")
        time.sleep(0.5)


def measure(steps: int, times: int, *, long: bool) -> dict[str, dict[str, float]]:
    """All figures by what was measured."""
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder)) as service:
        began = time.perf_counter()
        if long:
            send_long_run(service.client, LONG)
        else:
            send_usual_run(service, steps)
        print(f"sent in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        wait_for_scores(service, (LONG.steps if long else steps) - 1, 900)
        print(f"scored {time.perf_counter() - began:.0f} s after the first", file=sys.stderr)
        figures = {
            name: timed(times, lambda path=path: ask(service, path))  # type: ignore[misc]
            for name, path in PATHS.items()
        }
        if installed():
            figures |= page_times(service, max(10, times // 10), VIEWS if long else {})
        return figures


def main() -> None:
    """Print the figures as JSON, or as a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--long", action="store_true", help="100,000 steps of 4,000 series")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    figures = measure(given.steps, given.times, long=given.long)
    if given.json:
        print(json.dumps(figures))
        return
    what = f"{given.steps} steps, {len(LAYERS)} layers"
    if given.long:
        what = f"{LONG.steps} steps, {LONG.series} series at every {LONG.tensor_every}th"
    print(f"{what}, {given.times} requests each\n")
    print("| what | p50 ms | p95 ms |\n|---|---|---|")
    for name, each in figures.items():
        print(f"| {name} | {each['p50_ms']} | {each['p95_ms']} |")


if __name__ == "__main__":
    main()
