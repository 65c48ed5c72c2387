"""Draw every panel of the Grafana dashboards from a real run, without Grafana.

    python -m docs.dashboard_pictures                  # trains the demo's two runs first: minutes
    python -m docs.dashboard_pictures --service http://127.0.0.1:8420 \
        --prometheus http://127.0.0.1:9090 --run llama-1b

Each panel asks what it asks in Grafana, and what comes back goes through its transformations
(`dashboards.frames`); only the drawing is Plotly's. Needs Debian's prometheus, chromium and
chromium-driver.
"""

from __future__ import annotations

import argparse
import html
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx
from dashboards.build import DASHBOARDS
from dashboards.parts import NUMERICS
from docs.panel_figures import PanelData, drawn
from plotly.offline import get_plotlyjs
from tests.browser import open_browser
from tests.dashboards.prometheus import running_prometheus, wait
from tests.dashboards.service import running_service

from foreshock.api.cli.processes import Children

SEED: Final = 7
WIDTH: Final = 1500
ROW: Final = 34
"""Pixels of one row of Grafana's grid."""

STYLE: Final = """
body { margin: 0; font: 13px system-ui, sans-serif; background: #f4f5f5; color: #24292e }
.grid { position: relative }
.panel, .row { position: absolute; box-sizing: border-box; overflow: hidden }
.panel { background: #fff; border: 1px solid #dadde1; border-radius: 3px }
.panel h2 { margin: 0; padding: 5px 9px; font-size: 13px; height: 16px; white-space: nowrap }
.row { font-weight: 600; font-size: 15px; padding: 8px 4px }
.stat { font-size: 27px; font-weight: 600; text-align: center; padding-top: 22px }
.stat small { font-size: 12px; font-weight: 400; color: #555 }
table { border-collapse: collapse; width: 100%; font-size: 11px }
td, th { text-align: left; padding: 2px 8px; border-bottom: 1px solid #eee }
td { max-width: 420px }
.none { color: #777; padding: 20px; text-align: center }
"""


def page(board: Mapping[str, Any], sources: PanelData, *, closed: bool) -> tuple[str, int]:
    """One dashboard as a page.

    Args:
        board: Its JSON.
        sources: Answers its queries.
        closed: The panels of closed rows, instead of the others.

    Returns:
        The page, and its height in pixels.
    """
    rows = [p for p in board["panels"] if (p["type"] == "row" and bool(p.get("panels"))) == closed]
    shown = [each for row in rows for each in (row, *row.get("panels", ()))]
    shown = [panel for panel in shown if panel["type"] != "text"]
    top = min(panel["gridPos"]["y"] for panel in shown)
    bottom = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in shown) - top
    body = "".join(_placed(panel, sources, board, top) for panel in shown)
    script = f"<script>{get_plotlyjs()}</script>"
    text = (
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{script}"
        f'<div class=grid style="height:{bottom * ROW}px">{body}</div>'
    )
    return text, bottom * ROW


def _placed(panel: Mapping[str, Any], data: PanelData, board: Mapping[str, Any], top: int) -> str:
    at = panel["gridPos"]
    column = WIDTH / 24
    place = (
        f"left:{at['x'] * column + 3:.0f}px; top:{(at['y'] - top) * ROW + 3}px; "
        f"width:{at['w'] * column - 6:.0f}px; height:{at['h'] * ROW - 6}px"
    )
    title = html.escape(panel["title"])
    if panel["type"] == "row":
        return f'<div class=row style="{place}">{title}</div>'
    size = (int(at["w"] * column - 10), at["h"] * ROW - 40)
    inner = drawn(panel, data, board, size)
    return f'<div class=panel style="{place}"><h2>{title}</h2>{inner}</div>'


def take(sources: PanelData, out: Path) -> list[Path]:
    """Write a picture of each dashboard, and of the closed rows of the numerics."""
    written = []
    for make in DASHBOARDS:
        board = make()
        short = board["uid"].removeprefix("foreshock-")
        written.append(_picture(page(board, sources, closed=False), out / f"grafana-{short}.png"))
        if board["uid"] == NUMERICS:
            name = out / f"grafana-{short}-rows.png"
            written.append(_picture(page(board, sources, closed=True), name))
    return written


def _picture(made: tuple[str, int], target: Path) -> Path:
    text, height = made
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open_browser(Path(profile)) as browser,
    ):
        file = Path(profile) / "page.html"
        file.write_text(text, encoding="utf-8")
        browser.resize(WIDTH, height)
        browser.driver.get(file.as_uri())
        plots = "return document.querySelectorAll('.plot').length"
        ready = "return document.querySelectorAll('.plot .main-svg').length > 0"
        if browser.evaluate(plots):
            browser.wait("the charts", lambda: browser.evaluate(ready), 60)
        browser.evaluate("return new Promise(done => setTimeout(done, 1500))")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(browser.driver.get_screenshot_as_png())
    return target


@contextmanager
def trained() -> Iterator[tuple[str, str, str]]:
    """A service and a Prometheus with the demo's failing run and its twin; addresses and name."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        service = stack.enter_context(running_service(folder))
        prometheus = stack.enter_context(running_prometheus(folder, service))
        children = stack.enter_context(Children(folder))
        where = ("--url", service.address, "--folder", str(folder))
        common = ("-m", "tests.dashboards.real_run", "--demo", str(SEED), *where)
        children.start("failing", common)
        children.start("healthy", (*common, "--healthy"))
        wait("the failing run", lambda: not children.running("failing"), 1800)
        wait("its twin", lambda: not children.running("healthy"), 600)
        time.sleep(3)
        yield service.address, str(prometheus.client.base_url), f"demo-{SEED}"


def sources_of(service: str, prometheus: str, run: str) -> PanelData:
    """What the panels of a run ask; the layer is the one with the strongest outlier channel."""
    client = httpx.Client(base_url=service, timeout=60)
    scraped = httpx.Client(base_url=prometheus, timeout=60)
    detail = client.get(f"/api/v1/runs/{run}").raise_for_status().json()
    strongest: dict[str, str | int] = {"statistic": "top_channel_share", "limit": 1}
    tensors = client.get(f"/api/v1/runs/{run}/tensors", params=strongest).raise_for_status().json()
    asked = client.get(f"/api/v1/runs/{run}/records", params={"limit": 1}).json()["records"]
    start = datetime.fromisoformat(asked[0]["time"]).timestamp()
    ends = scraped.get("/api/v1/query", params={"query": "foreshock_last_record_timestamp_seconds"})
    newest = max(float(s["value"][1]) for s in ends.json()["data"]["result"])
    what_if = [name for name in detail["formats"] if name not in ("e4m3", "e5m2", "fp32")]
    variables = {
        "job": "foreshock",
        "instance": ".+",
        "project": detail["project"],
        "run": run,
        "role": "input",
        "layer": tensors["tensors"][0]["layer"],
        "format": (what_if or detail["formats"])[0],
        "first_step": "0",
        "last_step": "1000000000000",
        "__rate_interval": "20s",
    }
    return PanelData(client, scraped, variables, start, newest + 2)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service")
    parser.add_argument("--prometheus")
    parser.add_argument("--run", default=f"demo-{SEED}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    given = parser.parse_args()
    with ExitStack() as stack:
        if given.service and given.prometheus:
            addresses = given.service, given.prometheus, given.run
        else:
            addresses = stack.enter_context(trained())
        for path in take(sources_of(*addresses), given.out):
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
