"""A run on the page in a real Chromium, on a real service that takes the run in meanwhile."""

from __future__ import annotations

import math
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest
from selenium.webdriver.common.keys import Keys

from foreshock.monitor.record import StepRecord
from tests.api.page_service import DRIVERS, REASON
from tests.api.page_views import COMMAND, DRAWN, HEAT, LOSS, chart, fleet, show
from tests.browser import Browser, installed
from tests.dashboards.service import Service, running_service
from tests.dashboards.synthetic import LAYERS, SICK, SyntheticRun

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(not installed(), reason="chromium and chromium-driver are not installed"),
]
EVIL_LAYER = "<img src=x onerror=\"document.title='broken'\">"
RUN = "#/run/default/"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Generator[Service]:
    with running_service(tmp_path_factory.mktemp("service"), command=COMMAND) as service:
        yield service


@pytest.fixture(scope="module")
def sick(service: Service) -> SyntheticRun:
    run = SyntheticRun(service.client, "sick", onset=40, rise=110)
    run.send(40)
    return run


@pytest.fixture
def browser(chromium: Browser, service: Service) -> Generator[Browser]:
    chromium.errors()
    before = len(chromium.requests())
    yield chromium
    assert chromium.errors() == []
    assert chromium.origins(before) <= {service.address}, "a request left the origin"
    chromium.driver.get("about:blank")


def test_a_run_going_bad_shows_up_without_a_reload(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, f"{RUN}sick", "sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    browser.evaluate("window.sameDocument = true")
    assert "ok" in browser.text("#alarm")
    assert "No alarm" in browser.text("#alarms-empty")
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
    label = browser.one("#loss").get_attribute("aria-label")
    assert label is not None
    assert "at step 99, 1 alarms" in label, "what a chart shows is told in words too"


def test_drivers_and_diagnosis_name_the_layer(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, f"{RUN}sick", "sick")
    browser.wait("drivers", lambda: len(browser.all("#drivers li")) == len(DRIVERS))
    shown = browser.text("#drivers")
    for driver in DRIVERS:
        assert driver.signal in shown
        assert driver.layer is None or driver.layer in shown
    assert "raises +2.31" in shown
    assert "lowers −0.30" in shown  # noqa: RUF001  the page writes a true minus

    answer = service.client.get("/api/v1/runs/sick/diagnosis").json()
    causes, advice = answer["causes"], answer["precision"]
    likely = [cause for cause in causes[1:] if cause["probability"] >= 0.01]
    browser.wait("causes", lambda: len(browser.all("#causes li")) == 1 + len(likely))
    first = browser.text("#causes li:first-child")
    assert SICK in causes[0]["layers"]
    assert all(layer in first for layer in causes[0]["layers"])
    assert causes[0]["evidence"] in first
    assert causes[0]["remedy"] in first
    assert browser.one("#causes-doubt").is_displayed() is answer["abstains"]
    assert browser.one("#precision").is_displayed() is (advice is not None)
    assert advice is not None, "what the run is made to suffer from is a matter of precision"
    browser.one("#precision summary").click()
    for text in ("transformer_engine_recipe", "transformer_engine_debug", "torchao_filter"):
        assert advice[text].strip() in browser.text("#precision")
    browser.one("#causes li:first-child a").click()
    browser.wait("its layer", lambda: browser.text("#main h1") == causes[0]["layers"][0])


def test_heatmap_draws_any_statistic_of_any_role(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, f"{RUN}sick", "sick")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    heat = browser.evaluate(HEAT)
    assert heat["image"] == 1
    assert heat["layers"] == list(LAYERS)
    hottest = max(range(len(LAYERS)), key=lambda row: max(v or 0 for v in heat["values"][row]))
    assert LAYERS[hottest] == SICK
    assert browser.text("#heat-worst li:first-child a") == SICK

    browser.one("#statistic option[value=headroom_log2]").click()
    browser.one("#role option[value=grad_output]").click()
    wanted = service.client.get(
        "/api/v1/runs/sick/heatmap", params={"statistic": "headroom_log2", "role": "grad_output"}
    ).json()
    browser.wait("another map", lambda: browser.evaluate(HEAT)["values"] == wanted["values"])
    assert "statistic=headroom_log2" in browser.driver.current_url
    browser.one("#match").send_keys("BLOCKS.2.mlp")
    wanted_layers = [name for name in LAYERS if "blocks.2.mlp" in name]
    browser.wait("fewer rows", lambda: browser.evaluate(HEAT)["layers"] == wanted_layers)


def test_an_alarm_says_why_and_takes_an_answer(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    show(browser, service, f"{RUN}sick", "sick")
    browser.wait("the alarm", lambda: browser.all("#alarms li"))
    item = browser.text("#alarms li")
    assert "firing" in item
    assert "forecast" in item
    browser.one("#alarms summary").click()
    alert = service.client.get("/api/v1/alerts", params={"run": "sick"}).json()["alerts"][0]
    shown = browser.text("#alarms .more")
    assert alert["causes"][0]["evidence"] in shown
    assert alert["causes"][0]["remedy"] in shown
    assert "risk within 100 steps 75 %" in shown
    assert "Nobody was told" in shown

    browser.one('#alarms input[type="text"]').send_keys("the rate was too high")
    browser.one('#alarms [aria-label="Was this alarm right?"] button').click()
    browser.wait("the answer", lambda: browser.all('#alarms button[aria-pressed="true"]'))
    answered = service.client.get(f"/api/v1/alerts/{alert['id']}").json()
    assert (answered["correct"], answered["note"]) == (True, "the rate was too high")
    assert browser.one("#alarms details").get_attribute("open"), "what was opened stays open"

    browser.one('#alarms [aria-label="acknowledge: I have it"]').click()
    browser.wait("who has it", lambda: "acknowledged by" in browser.text("#alarms li"))
    muted = service.client.get(f"/api/v1/alerts/{alert['id']}").json()["mute"]
    assert muted["decision"] == "acknowledged"
    browser.one('#alarms [aria-label="undo: acknowledged"]').click()
    browser.wait("the buttons", lambda: browser.all('#alarms [aria-label="snooze for 4 h"]'))
    browser.one('#alarms [aria-label="snooze for 4 h"]').click()
    browser.wait("the snooze", lambda: "snoozed by" in browser.text("#alarms li"))
    assert service.client.get(f"/api/v1/alerts/{alert['id']}").json()["mute"]["until"]


def test_runs_are_reached_by_keyboard_and_by_address(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    SyntheticRun(service.client, "well").send(30)
    fleet(browser, service)
    browser.wait("both runs", lambda: len(browser.all("#runs a")) >= 2)
    link = browser.one(f'#runs a[href="{RUN}well"]')
    browser.evaluate("arguments[0].focus()", link)
    # The list is written anew every two seconds; the focus has to survive that.
    browser.wait(
        "a refresh",
        lambda: browser.evaluate(
            "return performance.getEntriesByType('resource')"
            ".filter(entry => new URL(entry.name).pathname === '/api/v1/runs').length > 2"
        ),
    )
    assert browser.evaluate("return document.activeElement.href").endswith(f"{RUN}well")
    link.send_keys(Keys.ENTER)
    browser.wait("the run", lambda: browser.text("#name") == "well")
    assert browser.driver.current_url.endswith(f"{RUN}well")
    browser.driver.back()
    browser.wait("the fleet again", lambda: browser.text("#main h1") == "Fleet")
    run_id = service.client.get("/api/v1/runs/well").json()["run_id"]
    # As alerts have it, by id; and the oldest form, by name.
    for old in (f"?run={run_id}", "?run=well&statistic=amax"):
        show(browser, service, old, "well")
        assert f"/{RUN}well" in browser.driver.current_url
        assert "?run" not in browser.driver.current_url
    assert browser.driver.current_url.endswith("?statistic=amax")


def test_foreign_names_stay_text(browser: Browser, service: Service) -> None:
    SyntheticRun(service.client, "foreign", layers=(EVIL_LAYER, "plain")).send(12)
    show(browser, service, f"{RUN}foreign", "foreign")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    labels = browser.evaluate(
        "return [...document.querySelectorAll('#heat .ytick text')].map(t => t.textContent)"
    )
    assert any(EVIL_LAYER.endswith(label.lstrip("…")) and "<img" not in label for label in labels)
    browser.wait("the link", lambda: EVIL_LAYER in browser.text("#heat-worst"))
    browser.one("#layer-name").send_keys(EVIL_LAYER, Keys.ENTER)
    browser.wait("the layer", lambda: browser.text("#main h1") == EVIL_LAYER)
    browser.wait("its charts", lambda: chart(browser, "#of-kurtosis .chart"))
    assert browser.driver.title == f"{EVIL_LAYER} · foreign · foreshock"
    assert not browser.all("img[src=x]")


def test_a_loss_that_is_not_finite_is_marked(browser: Browser, service: Service) -> None:
    run = SyntheticRun(service.client, "broken")
    run.send(12)
    last = run.send(1)[0]
    scalars = {**last.scalars, "loss": math.nan}
    run.put([StepRecord(step=13, time=last.time, scalars=scalars)])
    show(browser, service, f"{RUN}broken", "broken")
    browser.wait("the mark", lambda: "loss not finite" in browser.evaluate(LOSS)["names"])
    browser.wait("the word", lambda: "loss NaN" in browser.text("#facts"))


def test_an_unknown_run_says_so_until_it_reports(browser: Browser, service: Service) -> None:
    show(browser, service, f"{RUN}later", "No run called later")
    SyntheticRun(service.client, "later").send(12)
    browser.wait("the run", lambda: browser.text("#name") == "later")


def test_a_run_without_records_says_so(browser: Browser, service: Service) -> None:
    run = SyntheticRun(service.client, "empty")
    show(browser, service, f"{RUN}empty", "empty")
    browser.wait("the reason", lambda: "no record yet" in browser.text("#loss-empty"))
    assert "no records yet" in browser.text("#facts")
    browser.wait("no map", lambda: "No kurtosis" in browser.text("#heat-empty"))
    assert browser.text("#horizons").count("–") == 4  # noqa: RUF001  as the page writes it
    run.send(12)
    browser.wait("its first records", lambda: browser.evaluate(LOSS)["last"] == 11)


def test_a_deleted_run_is_told_and_the_page_goes_on(browser: Browser, service: Service) -> None:
    SyntheticRun(service.client, "leaving").send(12)
    show(browser, service, f"{RUN}leaving", "leaving")
    browser.wait("the charts", lambda: browser.evaluate(DRAWN))
    service.client.delete("/api/v1/runs/leaving").raise_for_status()
    browser.wait("the message", lambda: "The run leaving is gone" in browser.text("#main"))
    browser.one('#views a[data-view="fleet"]').click()
    browser.wait("the others", lambda: browser.text("#main h1") == "Fleet")
    assert "leaving" not in browser.text("#runs")
    # A question that was under way gets 404, which the browser itself logs.
    assert [e for e in browser.errors() if "404" not in e] == []


def test_pages_left_behind_hold_no_connection(
    browser: Browser, service: Service, sick: SyntheticRun
) -> None:
    # A browser opens six connections to one origin, and keeps pages for its back button.
    for turn in range(8):
        browser.driver.get(f"{service.address}/?turn={turn}{RUN}sick")
        browser.wait("the page", lambda: browser.text("#name") == "sick")


def test_page_says_that_the_service_is_gone_and_comes_back_by_itself(
    chromium: Browser, tmp_path: Path
) -> None:
    with running_service(tmp_path, command=COMMAND) as first:
        run = SyntheticRun(first.client, "lasting")
        run.send(20)
        show(chromium, first, f"{RUN}lasting", "lasting")
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
        for view, said in (("alarms", "No alarm so far"), ("compare", "No runs yet")):
            chromium.one(f'#views a[data-view="{view}"]').click()
            chromium.wait(view, lambda said=said: said in chromium.text("#main"))  # type: ignore[misc]
        chromium.driver.get(f"{service.address}/#/")
        SyntheticRun(service.client, "first").send(12)
        chromium.wait("the first run", lambda: "first" in chromium.text("#runs"))
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
        chromium.driver.get(f"{service.address}/{RUN}secret")
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
