"""What the browser tests of the page share: opening a view, and reading what its charts show."""

from __future__ import annotations

from typing import Any

from tests.browser import Browser
from tests.dashboards.service import Service

__all__ = ["COMMAND", "DRAWN", "HEAT", "LOSS", "chart", "fleet", "show"]

COMMAND = ("-m", "tests.api.page_service")
DRAWN = "return ['loss', 'risk', 'heat'].every(id => document.querySelector(`#${id} .main-svg`))"
# The picture that Plotly paints a heatmap as, and the numbers behind it.
HEAT = (
    "const plot = document.getElementById('heat');"
    "if (!plot?.data) return {image: 0, layers: [], steps: 0, values: []};"
    "return {image: plot.querySelectorAll('.heatmaplayer image').length,"
    " layers: plot.data[0].customdata.map(row => row[0][0]), steps: plot.data[0].x.length,"
    " values: plot.data[0].customdata.map(row => row.map(cell => cell[1]))}"
)
LOSS = (
    "const plot = document.getElementById('loss');"
    "if (!plot?.data) return {last: -1, points: 0, names: [], alarms: []};"
    "const loss = plot.data.find(t => t.name === 'loss' && t.hoverinfo !== 'skip');"
    "return {last: loss.x.at(-1), points: loss.x.length, names: plot.data.map(t => t.name),"
    " alarms: plot.layout.annotations.map(a => a.text)}"
)
CHART = (
    "const plot = document.querySelector(arguments[0]);"
    "return (plot?.data ?? []).filter(t => t.name && t.hoverinfo !== 'skip')"
    ".map(t => ({name: t.name, x: t.x, y: t.y}))"
)


def show(browser: Browser, service: Service, tail: str, title: str) -> None:
    """Open a view and wait for its heading; `tail` is what follows the address of the service."""
    # A change behind the # alone would not load the page anew.
    browser.driver.get("about:blank")
    browser.driver.get(f"{service.address}/{tail}")
    browser.wait(f"the view {title}", lambda: browser.text("#main h1") == title)


def fleet(browser: Browser, service: Service, tail: str = "#/") -> None:
    """Open the list of runs."""
    show(browser, service, tail, "Fleet")
    browser.wait("the list of runs", lambda: browser.all("#runs a"))


def chart(browser: Browser, selector: str) -> list[dict[str, Any]]:
    """Lines of a chart, each with name, x and y; bands left out. Nothing while it is not drawn."""
    found: list[dict[str, Any]] = browser.evaluate(CHART, selector)
    return found
