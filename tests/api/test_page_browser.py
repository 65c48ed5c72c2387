"""The page in a real Chromium, on a real service that takes in a run while the page is open."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from foreshock.monitor.record import StepRecord
from tests.api.page_service import DRIVERS, REASON
from tests.browser import Browser, installed, open_browser
from tests.dashboards.service import Service, running_service
from tests.dashboards.synthetic import LAYERS, SICK, SyntheticRun

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(not installed(), reason="chromium and chromium-driver are not installed"),
]
COMMAND = ("-m", "tests.api.page_service")
EVIL_LAYER = "<img src=x onerror=\"document.title='broken'\">"
DRAWN = "return ['loss', 'risk', 'heat'].every(id => document.querySelector(`#${id} .main-svg`))"
# The picture that Plotly paints a heatmap as, and the numbers behind it.
HEAT = (
    "const plot = document.getElementById('heat');"
    "return {image: plot.querySelectorAll('.heatmaplayer image').length, layers: plot.data[0].y,"
    " steps: plot.data[0].x.length, values: plot.data[0].customdata}"
)
LOSS = (
    "const plot = document.getElementById('loss');"
    "if (!plot.data) return {last: -1, names: [], alarms: []};"
    "const loss = plot.data.find(t => t.name === 'loss');"
    "return {last: loss.x.at(-1), names: plot.data.map(t => t.name),"
    " alarms: plot.layout.annotations.map(a => a.text)}"
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    with running_service(tmp_path_factory.mktemp("service"), command=COMMAND) as service:
        yield service


@pytest.fixture(scope="module")
def sick(service: Service) -> SyntheticRun:
    run = SyntheticRun(service.client, "sick", onset=40, rise=110)
    run.send(40)
    return run


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1280, 1600)
        yield browser


@pytest.fixture
def browser(chromium: Browser, service: Service) -> Generator[Browser]:
    chromium.errors()
    yield chromium
    assert chromium.errors() == []
    assert chromium.origins() == {service.address}, "a request left the origin"


def show(browser: Browser, service: Service, tail: str = "") -> None:
    browser.driver.get(f"{service.address}/{tail}")
    browser.wait("the list of runs", lambda: browser.all("#runs a"))


def test_a_run_going_bad_shows_up_without_a_reload(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, "?run=sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.evaluate("window.sameDocument = true")
    assert "ok" in browser.text("#alarm")
    assert "No alerts" in browser.text("#alerts-empty")
    before = browser.evaluate(LOSS)["last"]

    sick.send(60)
    browser.wait("newer loss", lambda: browser.evaluate(LOSS)["last"] > before + 40)
    browser.wait("the alarm", lambda: "firing" in browser.text("#alarm"))
    assert browser.evaluate("return window.sameDocument"), "the page was loaded again"

    shown = browser.wait("the mark", lambda: browser.evaluate(LOSS)["alarms"])
    assert "▲ alarm at step" in shown[-1]
    assert "risk within 100 steps" in browser.evaluate(LOSS)["names"]
    assert "75 %" in browser.text("#horizons .h1")
    assert "38 % to 90 %" in browser.text("#horizons .h1")
    assert REASON in browser.text("#horizons .h2")
    assert REASON in browser.text("#reasons")
    assert "42" in browser.text("#horizons")
    browser.wait("the list", lambda: "firing" in browser.text('#runs a[aria-current="true"]'))


def test_drivers_and_diagnosis_name_the_layer(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, "?run=sick")
    browser.wait("drivers", lambda: len(browser.all("#drivers li")) == len(DRIVERS))
    shown = browser.text("#drivers")
    for driver in DRIVERS:
        assert driver.signal in shown
        assert driver.layer is None or driver.layer in shown
    assert "raises +2.31" in shown
    assert "lowers −0.30" in shown  # noqa: RUF001  the page writes a true minus

    causes = service.client.get("/api/v1/runs/sick/diagnosis").json()["causes"]
    likely = [cause for cause in causes[1:] if cause["probability"] >= 0.01]
    browser.wait("causes", lambda: len(browser.all("#causes li")) == 1 + len(likely))
    first = browser.text("#causes li:first-child")
    assert SICK in causes[0]["layers"]
    assert all(layer in first for layer in causes[0]["layers"])
    assert causes[0]["evidence"] in first
    assert causes[0]["remedy"] in first


def test_heatmap_draws_any_statistic_of_any_role(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, "?run=sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    heat = browser.evaluate(HEAT)
    assert heat["image"] == 1
    assert heat["layers"] == list(LAYERS)
    hottest = max(range(len(LAYERS)), key=lambda row: max(v or 0 for v in heat["values"][row]))
    assert LAYERS[hottest] == SICK

    browser.one("#statistic option[value=headroom_log2]").click()
    browser.one("#role option[value=grad_output]").click()
    wanted = service.client.get(
        "/api/v1/runs/sick/heatmap", params={"statistic": "headroom_log2", "role": "grad_output"}
    ).json()
    browser.wait("another map", lambda: browser.evaluate(HEAT)["values"] == wanted["values"])
    assert "statistic=headroom_log2" in browser.driver.current_url


def test_an_alert_takes_an_answer(browser: Browser, service: Service, sick: SyntheticRun) -> None:
    show(browser, service, "?run=sick")
    browser.wait("the alert", lambda: browser.all("#alerts tbody tr"))
    assert "firing" in browser.text("#alerts tbody tr")
    assert "forecast" in browser.text("#alerts tbody tr")
    browser.one("#alerts tbody button").click()
    browser.wait("the answer", lambda: browser.all('#alerts button[aria-pressed="true"]'))
    alerts = service.client.get("/api/v1/alerts", params={"run": "sick"}).json()["alerts"]
    assert alerts[0]["correct"] is True


def test_runs_are_reached_by_keyboard_and_by_address(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    SyntheticRun(service.client, "well").send(30)
    show(browser, service, "?run=sick")
    browser.wait("both runs", lambda: len(browser.all("#runs a")) >= 2)
    link = browser.one('#runs a[href="/?run=well"]')
    browser.evaluate("arguments[0].focus()", link)
    link.send_keys(Keys.ENTER)
    browser.wait("the other run", lambda: browser.text("#name") == "well")
    assert browser.driver.current_url.endswith("/?run=well")
    # The list is written anew every two seconds; the focus has to survive that.
    browser.wait(
        "a refresh",
        lambda: browser.evaluate(
            "return performance.getEntriesByType('resource')"
            ".filter(entry => new URL(entry.name).pathname === '/api/v1/runs').length > 2"
        ),
    )
    assert browser.evaluate("return document.activeElement.href").endswith("/?run=well")
    browser.driver.back()
    browser.wait("the first run", lambda: browser.text("#name") == "sick")
    run_id = service.client.get("/api/v1/runs/well").json()["run_id"]
    show(browser, service, f"?run={run_id}")
    browser.wait("a run by its id", lambda: browser.text("#name") == "well")


def test_foreign_names_stay_text(browser: Browser, service: Service) -> None:
    SyntheticRun(service.client, "foreign", layers=(EVIL_LAYER, "plain")).send(12)
    show(browser, service, "?run=foreign")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    labels = browser.evaluate(
        "return [...document.querySelectorAll('#heat .ytick text')].map(t => t.textContent)"
    )
    assert EVIL_LAYER in labels
    assert browser.driver.title == "foreign · foreshock"
    assert not browser.all("img[src=x]")


def test_a_loss_that_is_not_finite_is_marked(browser: Browser, service: Service) -> None:
    run = SyntheticRun(service.client, "broken")
    run.send(12)
    last = run.send(1)[0]
    scalars = {**last.scalars, "loss": math.nan}
    run.put([StepRecord(step=13, time=last.time, scalars=scalars)])
    show(browser, service, "?run=broken")
    browser.wait("the mark", lambda: "loss not finite" in browser.evaluate(LOSS)["names"])
    browser.wait("the word", lambda: "loss NaN" in browser.text("#facts"))


def test_an_unknown_run_says_so_until_it_reports(browser: Browser, service: Service) -> None:
    show(browser, service, "?run=later")
    browser.wait("the message", lambda: "No run called later" in browser.text("#message"))
    SyntheticRun(service.client, "later").send(12)
    browser.wait("the run", lambda: browser.text("#name") == "later")


def test_pages_left_behind_hold_no_connection(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    # A browser opens six connections to one origin, and keeps pages for its back button.
    for turn in range(8):
        show(browser, service, f"?run=sick&turn={turn}")
        browser.wait("the page", lambda: browser.text("#name") == "sick")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_and_can_be_read(
    browser: Browser, service: Service, sick: SyntheticRun, width: int, scheme: str
) -> None:
    browser.prefer(scheme)
    browser.resize(width, 1600)
    show(browser, service, "?run=sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    assert browser.evaluate("return document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CONTRAST) == []
    browser.prefer("light")
    browser.resize(1280, 1600)


# WCAG 2.1: relative luminance, and 4.5:1 for text of ordinary size (3:1 from 24 px, or bold 19 px).
CONTRAST = """
const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const ground = node => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim());
  if (!own || node.closest('svg, noscript') || !node.offsetParent) continue;
  const style = getComputedStyle(node), size = parseFloat(style.fontSize);
  const [a, b] = [light(parse(style.color)), light(ground(node))].sort((x, y) => y - x);
  const wanted = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < wanted) poor.push(`${node.textContent.trim()}: ${ratio.toFixed(2)}`);
}
return poor;
"""


def test_page_says_that_the_service_is_gone_and_comes_back_by_itself(
    chromium: Browser, tmp_path: Path
) -> None:
    with running_service(tmp_path, command=COMMAND) as first:
        run = SyntheticRun(first.client, "lasting")
        run.send(20)
        show(chromium, first, "?run=lasting")
        chromium.wait("the charts", lambda: chromium.evaluate(DRAWN))
        port = int(first.address.rpartition(":")[2])
    chromium.wait("the banner", lambda: "does not answer" in chromium.text("#banner"))
    assert chromium.text("#link-text") == "no connection"
    assert chromium.text("#name") == "lasting", "the last known state stays"

    with running_service(tmp_path, port=port, command=COMMAND) as second:
        chromium.wait("the banner to go", lambda: not chromium.visible("#banner"), 30)
        before = chromium.evaluate(LOSS)["last"]
        run.client = second.client
        run.send(20)
        chromium.wait("new records", lambda: chromium.evaluate(LOSS)["last"] > before, 30)
        chromium.driver.get("about:blank")
    # Refused connections are logged by the browser itself; nothing else may be.
    assert [e for e in chromium.errors() if "ERR_" not in e] == []


def test_an_empty_service_says_what_to_do(chromium: Browser, tmp_path: Path) -> None:
    with running_service(tmp_path, command=COMMAND) as service:
        chromium.errors()
        chromium.driver.get(service.address)
        chromium.wait("the hint", lambda: "make demo" in chromium.text("#runs-empty"))
        assert chromium.text("#message-title") == "No runs yet"
        SyntheticRun(service.client, "first").send(12)
        chromium.wait("the first run", lambda: chromium.text("#name") == "first")
        chromium.driver.get("about:blank")
    assert chromium.errors() == []


def test_a_token_is_asked_for_once(chromium: Browser, tmp_path: Path) -> None:
    token = "a-token-of-some-length"
    with running_service(
        tmp_path, command=COMMAND, environment={"FORESHOCK_TOKEN": token}
    ) as service:
        SyntheticRun(service.client, "secret").send(12)
        chromium.errors()
        assert httpx.get(f"{service.address}/api/v1/runs").status_code == 401
        chromium.driver.get(service.address)
        chromium.wait("the form", lambda: chromium.visible("#token"))
        chromium.one("#token").send_keys("wrong", Keys.ENTER)
        chromium.wait("the refusal", lambda: "not a token" in chromium.text("#signin-error"))
        chromium.one("#token").clear()
        chromium.one("#token").send_keys(token, Keys.ENTER)
        chromium.wait("the run", lambda: chromium.text("#name") == "secret")
        assert token not in chromium.evaluate("return document.cookie")
        chromium.driver.refresh()
        chromium.wait("no form again", lambda: chromium.text("#name") == "secret")
        chromium.one("#signout").click()
        chromium.wait("the form again", lambda: chromium.visible("#token"))
        chromium.driver.get("about:blank")
    # The browser itself logs every 401.
    assert [e for e in chromium.errors() if "401" not in e] == []
