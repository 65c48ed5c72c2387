"""Every view of the page in a real Chromium: ways between them, keys, themes, paper, readers."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from foreshock.api.artifact import load_shipped
from tests.api.page_views import COMMAND, DRAWN, HEAT, LOSS, chart, fleet, show
from tests.browser import Browser, installed
from tests.dashboards.service import Service, running_service
from tests.dashboards.synthetic import LAYERS, SICK, SyntheticRun, record

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(not installed(), reason="chromium and chromium-driver are not installed"),
]
STEPS = 120
LAYER = f"#/run/default/sick/layer/{SICK}"
COMPARE = "#/compare?a=default/well&b=default/sick"
VIEWS = {
    "#/": ("Fleet", "#runs .spark path"),
    "#/run/default/sick": ("sick", "#causes li"),
    LAYER: (SICK, "#formats tbody tr"),
    COMPARE: ("Compare", "#partings tbody tr"),
    "#/alarms": ("Alarms", "#alarms li"),
    "#/forecaster": ("Forecaster", "#evaluated tbody tr"),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    with running_service(tmp_path_factory.mktemp("service"), command=COMMAND) as service:
        for name, onset in (("sick", 40), ("well", None)):
            SyntheticRun(service.client, name, onset=onset).send(STEPS)
        yield service


@pytest.fixture
def browser(chromium: Browser, service: Service) -> Generator[Browser]:
    chromium.errors()
    yield chromium
    assert chromium.errors() == []
    chromium.prefer("light")
    chromium.resize(1280, 1600)
    chromium.driver.get("about:blank")


def script(name: str) -> str:
    """One of the checks that run inside the page."""
    return Path(__file__).with_name(f"page_{name}.js").read_text(encoding="utf-8")


def whole(browser: Browser, service: Service, tail: str) -> None:
    """A view with all that it has to show."""
    title, last = VIEWS[tail]
    show(browser, service, tail, title)
    browser.wait(last, lambda: browser.all(last))


def test_the_fleet_tells_what_needs_somebody_first(browser: Browser, service: Service) -> None:
    fleet(browser, service)
    browser.wait("the alarm", lambda: "likely to diverge" in browser.text("#runs tr"))
    first, second = browser.all("#runs tr")
    assert "sick" in first.text
    assert "firing" in first.text
    assert "75 %" in first.text
    assert "well" in second.text
    assert "ok" in second.text
    assert "2 runs" in browser.text("#fleet-facts")
    browser.wait("the lines", lambda: len(browser.all("#runs .spark path")) == 4)
    label = browser.one("#runs .spark.risk").get_attribute("aria-label")
    assert label is not None
    assert "now 75 %" in label
    browser.one("#filter").send_keys("wel")
    browser.wait("one row", lambda: len(browser.all("#runs tr")) == 1)
    assert browser.driver.current_url.endswith("#/?q=wel")
    browser.one("#filter").send_keys("x")
    browser.wait("none", lambda: "No run is like that" in browser.text("#main"))


def test_a_fleet_without_charts_loads_no_charts(browser: Browser, service: Service) -> None:
    fleet(browser, service)
    assert browser.evaluate("return typeof Plotly") == "undefined"


def test_the_way_down_from_the_fleet_to_one_step_of_a_layer(
    browser: Browser, service: Service
) -> None:
    fleet(browser, service)
    browser.one('#runs a[href="#/run/default/sick"]').click()
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    row = LAYERS.index(SICK)
    # What a click on a cell of the map does, told by Plotly itself.
    browser.wait("the map", lambda: browser.evaluate(HEAT)["steps"])
    browser.evaluate(
        "document.getElementById('heat').emit('plotly_click',"
        " {points: [{x: 80, y: arguments[0], pointIndex: [arguments[0], 80]}]})",
        row,
    )
    browser.wait("the layer", lambda: browser.text("#main h1") == SICK)
    address = browser.driver.current_url
    assert f"/{LAYER}?" in address
    assert "step=80" in address
    lines = browser.wait("its kurtosis", lambda: chart(browser, "#of-kurtosis .chart"))
    assert [line["name"] for line in lines] == ["input", "weight", "grad output"]
    wanted = service.client.get(
        "/api/v1/runs/sick/series",
        params={"layer": SICK, "role": "input", "statistic": "kurtosis", "points": 400},
    ).json()
    assert (lines[0]["x"], lines[0]["y"]) == (wanted["step"], wanted["mean"])
    told = f"input {wanted['mean'][80]:.4g}"
    browser.wait("the value there", lambda: told in browser.text("#of-kurtosis .readout"))

    # Somebody else opens the same address and sees the same.
    browser.driver.get("about:blank")
    browser.driver.get(address)
    browser.wait("the same step", lambda: told in browser.text("#of-kurtosis .readout"))
    browser.one("#crumbs a[href='#/run/default/sick']").click()
    browser.wait("up", lambda: browser.text("#main h1") == "sick")


def test_a_layer_shows_roles_and_formats(browser: Browser, service: Service) -> None:
    whole(browser, service, LAYER)
    browser.wait("headroom", lambda: len(chart(browser, "#of-headroom_log2 .chart")) == 3)
    browser.one("#roles label:nth-child(2) input").click()
    browser.wait("two roles", lambda: len(chart(browser, "#of-headroom_log2 .chart")) == 2)
    assert "roles=input%2Cgrad_output" in browser.driver.current_url
    assert "e4m3" in browser.text("#formats")
    browser.one("#layer-format option[value=e5m2]").click()
    # Only gradients are e5m2 in this run.
    browser.wait(
        "one role",
        lambda: [c["name"] for c in chart(browser, "#of-headroom_log2 .chart")] == ["grad output"],
    )
    browser.evaluate("scrollTo(0, 1e6)")  # what is out of sight is not asked for
    browser.wait("the rest", lambda: "mu" in browser.text("#not-recorded"))
    show(browser, service, "#/run/default/sick/layer/no.such", "no.such")
    browser.wait("the reason", lambda: "no layer no.such" in browser.text("#layer-unknown"))


def test_zooming_fetches_finer_steps_and_is_in_the_address(
    browser: Browser, service: Service
) -> None:
    show(browser, service, "#/run/default/sick", "sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.evaluate(
        "document.getElementById('loss').emit('plotly_relayout',"
        " {'xaxis.range[0]': 19.6, 'xaxis.range[1]': 60.2})"
    )
    browser.wait("the stretch", lambda: browser.evaluate(LOSS)["last"] == 61)
    assert "from=19&to=61" in browser.driver.current_url
    browser.wait("the map too", lambda: browser.evaluate(HEAT)["steps"] == 43)
    browser.one("#chosen-steps button").click()
    browser.wait("all again", lambda: browser.evaluate(LOSS)["last"] == STEPS - 1)
    assert "from=" not in browser.driver.current_url


def test_two_runs_are_compared_where_they_part(browser: Browser, service: Service) -> None:
    fleet(browser, service)
    for box in browser.all("#runs input"):
        box.click()
    browser.one("#compare-picked").click()
    browser.wait("the verdict", lambda: "They part at step" in browser.text("#verdict"))
    query = {"other": "well"}
    found = service.client.get("/api/v1/runs/sick/compare", params=query).json()
    assert found["partings"][0]["layer"] == SICK
    shown = browser.text("#verdict")
    if "default%2Fsick&b" in browser.driver.current_url:
        assert f"step {found['partings'][0]['step']}" in shown
    assert SICK in shown
    lines = browser.wait("the layer", lambda: chart(browser, "#compare-tensor"))
    assert [line["name"][:1] for line in lines] == ["A", "B"]
    assert browser.evaluate("return document.getElementById('compare-layer').value") == SICK
    browser.wait("the losses", lambda: len(chart(browser, "#compare-loss")) == 2)
    z = browser.wait(
        "the map", lambda: browser.evaluate("return document.getElementById('compare-map').data")
    )[0]["z"]
    steepest = max(range(len(LAYERS)), key=lambda row: abs(z[row][-1]))
    assert LAYERS[steepest] == SICK
    before = browser.text("#verdict")
    browser.one("#swap").click()
    browser.wait("the other way", lambda: browser.text("#verdict") not in ("", before))


def test_attempts_are_compared_and_a_missing_run_is_told(
    browser: Browser, service: Service
) -> None:
    first = SyntheticRun(service.client, "twice")
    first.send(90)
    again = SyntheticRun(service.client, "twice", onset=30)
    again.send(90)
    show(browser, service, "#/compare?a=default/twice@1&b=default/twice@2", "Compare")
    browser.wait("the verdict", lambda: "They part at step" in browser.text("#verdict"))
    names = [line["name"] for line in browser.wait("it", lambda: chart(browser, "#compare-loss"))]
    assert names == ["A: twice @1", "B: twice @2"]
    show(browser, service, "#/compare?a=default/sick&b=default/nobody", "Compare")
    browser.wait("it is told", lambda: "No run called default/nobody" in browser.text("#main"))
    late = SyntheticRun(service.client, "elsewhere")
    late.put([record(step, onset=None, rise=None) for step in range(5000, 5010)])
    show(browser, service, "#/compare?a=default/sick&b=default/elsewhere", "Compare")
    browser.wait("the reason", lambda: "no step is in both runs" in browser.text("#main"))
    # The browser itself logs the refusal.
    assert [e for e in browser.errors() if "422" not in e] == []


def test_the_card_shows_the_models_own_figures(browser: Browser, service: Service) -> None:
    whole(browser, service, "#/forecaster")
    model = load_shipped()
    assert model is not None
    assert model.version in browser.text("#model-version")
    lines = browser.wait("the plot", lambda: chart(browser, "#calibration"))
    risk: dict[str, Any] = model.card["evaluation"]["risk"]
    bins = risk["full, 100 steps"]["calibration"]
    (full,) = [line for line in lines if line["name"] == "all signals"]
    assert full["x"] == [mean for mean, _ in bins]
    assert full["y"] == [seen or None for _, seen in bins]
    browser.one("#calibration-horizon option[value='10']").click()
    wanted = [mean for mean, _ in risk["full, 10 steps"]["calibration"]]
    browser.wait("the other horizon", lambda: chart(browser, "#calibration")[0]["x"] == wanted)
    assert "1,000 steps ahead it gives no answer" in browser.text("#limits")


def test_keys_lead_from_view_to_view(browser: Browser, service: Service) -> None:
    fleet(browser, service)
    browser.press("?")
    browser.wait("the list of keys", lambda: browser.visible("#help"))
    browser.press(Keys.ESCAPE)
    browser.wait("no list", lambda: not browser.visible("#help"))
    browser.press("j", "j", "k")
    focused = browser.evaluate("return document.activeElement.textContent")
    assert focused == browser.text("#runs tr:first-child th a")
    browser.press(Keys.ENTER)
    browser.wait("the run", lambda: browser.text("#main h1") == focused)
    browser.press("u")
    browser.wait("up", lambda: browser.text("#main h1") == "Fleet")
    browser.press("/")
    assert browser.evaluate("return document.activeElement.id") == "filter"
    browser.press("g", "a")
    assert browser.evaluate("return document.getElementById('filter').value") == "ga", "text"
    browser.press(Keys.ESCAPE)
    for key, title in (("a", "Alarms"), ("c", "Compare"), ("m", "Forecaster"), ("f", "Fleet")):
        browser.press("g", key)
        browser.wait(title, lambda title=title: browser.text("#main h1") == title)  # type: ignore[misc]


def test_keys_move_in_the_charts_of_a_run(browser: Browser, service: Service) -> None:
    show(browser, service, "#/run/default/sick", "sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.press(Keys.ARROW_LEFT)
    browser.wait("the last step", lambda: f"at step {STEPS - 1}" in browser.text("#chosen-steps"))
    browser.press(Keys.ARROW_LEFT)
    browser.wait("one before", lambda: f"step={STEPS - 2}" in browser.driver.current_url)
    browser.press("l")
    browser.wait(
        "a logarithmic axis",
        lambda: browser.evaluate(
            "return document.getElementById('loss').layout.yaxis.type === 'log'"
        ),
    )
    browser.press("]")
    browser.wait("the next run", lambda: browser.text("#main h1") not in ("", "sick"))
    browser.press("[")
    browser.wait("the run before", lambda: browser.text("#main h1") == "sick")


def test_single_keys_can_be_switched_off(browser: Browser, service: Service) -> None:
    """For those whose speech or hands press keys by accident (WCAG 2.1.4)."""
    show(browser, service, "#/run/default/sick", "sick")
    browser.press("?")
    browser.one("#keys-on").click()
    browser.press(Keys.ESCAPE)
    browser.press("u")
    browser.evaluate("return new Promise(done => setTimeout(done, 300))")
    assert browser.text("#main h1") == "sick"
    browser.one("#help-open").click()
    browser.one("#keys-on").click()
    browser.press(Keys.ESCAPE)


def test_a_theme_is_chosen_and_remembered(browser: Browser, service: Service) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    line = "return document.getElementById('loss').layout.xaxis.gridcolor"
    show(browser, service, "#/run/default/sick", "sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    light, light_line = browser.evaluate(ground), browser.evaluate(line)
    browser.press("t", "t")  # system, light, dark
    assert browser.text("#theme-text") == "dark"
    dark = browser.evaluate(ground)
    assert dark != light
    browser.wait("charts too", lambda: browser.evaluate(line) != light_line)
    browser.driver.refresh()
    browser.wait("remembered", lambda: browser.text("#main h1") == "sick")
    assert browser.evaluate(ground) == dark
    browser.one("#theme").click()  # system again
    assert browser.evaluate(ground) == light
    browser.prefer("dark")
    assert browser.evaluate(ground) == dark


def test_on_paper_it_is_light_and_without_controls(browser: Browser, service: Service) -> None:
    browser.prefer("dark")
    show(browser, service, "#/run/default/sick", "sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.wait("the cause", lambda: browser.all("#causes li"))
    browser.prefer("dark", media="print")
    assert browser.evaluate("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    for control in ("#theme", "#views a", "#log", "#layer-form", "#statistic"):
        assert not browser.visible(control), control
    for content in ("#loss .main-svg", "#causes li", "#horizons li", "#alarms li"):
        assert browser.visible(content), content
    font = "return document.getElementById('loss').layout.font.color"
    browser.wait("dark ink", lambda: browser.evaluate(font) == "rgb(79, 92, 107)")
    paper = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(paper["data"]) > 20_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_view_fits_and_can_be_read(
    browser: Browser, service: Service, width: int, scheme: str
) -> None:
    browser.prefer(scheme)
    browser.resize(width, 1600)
    for tail in VIEWS:
        whole(browser, service, tail)
        assert browser.evaluate("return document.documentElement.scrollWidth") <= width, tail
        assert browser.evaluate(script("contrast")) == [], tail


def test_every_view_can_be_used_by_ear_and_keyboard(browser: Browser, service: Service) -> None:
    for tail in VIEWS:
        whole(browser, service, tail)
        assert browser.evaluate(script("structure")) == [], tail
        nameless = [
            (node["role"]["value"], node.get("name"), node.get("properties"))
            for node in browser.accessibility()
            if node["role"]["value"] in NAMED and not node.get("name", {}).get("value", "").strip()
        ]
        assert nameless == [], tail


NAMED = {
    "button", "link", "textbox", "searchbox", "combobox", "checkbox", "image", "dialog",
    "heading", "region", "navigation", "columnheader", "rowheader", "DisclosureTriangle",
}  # fmt: skip
