"""The page with a long run of 4,000 series: every view is drawn, and from few points."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.api.page_views import DRAWN, HEAT, LOSS, chart, fleet, show
from tests.browser import Browser, installed
from tests.dashboards.long_run import LongRun, loss, send_long_run
from tests.dashboards.service import Service, running_service

pytestmark = [
    pytest.mark.long,
    pytest.mark.debian,
    pytest.mark.skipif(not installed(), reason="chromium and chromium-driver are not installed"),
]
RUN = LongRun(name="weeks", steps=20_000)
LATE = "#/run/default/weeks?from=18000&to=19999"
LAYER = "blocks.100.mlp.down"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as service:
        send_long_run(service.client, RUN)
        yield service


@pytest.fixture
def browser(chromium: Browser) -> Generator[Browser]:
    chromium.errors()
    yield chromium
    assert chromium.errors() == []
    chromium.driver.get("about:blank")


def test_the_whole_run_is_drawn_from_a_point_per_pixel(browser: Browser, service: Service) -> None:
    assert RUN.series == 4000
    show(browser, service, "#/run/default/weeks", "weeks")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.wait("all steps", lambda: browser.evaluate(LOSS)["last"] > RUN.steps * 0.99)
    assert 400 <= browser.evaluate(LOSS)["points"] <= 800
    heat = browser.wait(
        "layers", lambda: browser.evaluate(HEAT)["layers"] and browser.evaluate(HEAT)
    )
    # Of 500 layers as many as can be told apart, and in the order of the model.
    assert 40 <= len(heat["layers"]) <= 500
    assert heat["steps"] <= 400
    deepest, first = heat["values"][-1], heat["values"][0]
    known = [(a, b) for a, b in zip(first, deepest, strict=True) if a is not None and b is not None]
    # Outliers grow with depth: the picture has that shape.
    assert known
    assert known[-1][1] > known[-1][0]


def test_the_last_steps_are_fetched_finer(browser: Browser, service: Service) -> None:
    show(browser, service, LATE, "weeks")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.wait("the end", lambda: browser.evaluate(LOSS)["last"] > 19_990)
    (line,) = (each for each in chart(browser, "#loss") if each["name"] == "loss")
    assert line["x"][0] >= 18_000
    assert line["x"][1] - line["x"][0] <= 5
    assert abs(line["y"][-1] - loss(19_999)) < 0.1


def test_one_of_500_layers(browser: Browser, service: Service) -> None:
    show(browser, service, f"#/run/default/weeks/layer/{LAYER}", LAYER)
    lines = browser.wait("its kurtosis", lambda: chart(browser, "#of-kurtosis .chart"))
    wanted = service.client.get(
        "/api/v1/runs/weeks/series",
        params={"layer": LAYER, "role": "input", "statistic": "kurtosis", "points": 400},
    ).json()
    assert (lines[0]["x"], lines[0]["y"]) == (wanted["step"], wanted["mean"])
    assert len(lines[0]["x"]) == RUN.steps // RUN.tensor_every
    assert "layer 404 of 500" in browser.text("#layer-place")


def test_the_fleet_has_its_line(browser: Browser, service: Service) -> None:
    fleet(browser, service)
    browser.wait("the line", lambda: browser.all("#runs .spark path"))
    assert "weeks" in browser.text("#runs")
