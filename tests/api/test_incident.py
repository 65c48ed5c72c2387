"""The file of an incident: from a real service, opened without a network, and complete."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from foreshock.api.cli.main import app
from foreshock.api.incident.facts import Grid
from foreshock.api.incident.movers import movers
from foreshock.api.incident.pictures import heat_image, line_chart
from foreshock.monitor import Client
from foreshock.monitor.client import NotFound
from foreshock.monitor.record import Event, StepRecord
from tests.api.live_helpers import wait_until
from tests.api.service import Service, new_launch, post_run
from tests.browser import installed, open_browser
from tests.dashboards.synthetic import LAYERS, SICK, SyntheticRun, record

STEPS, ONSET, RISE, LOST = 360, 200, 280, 345
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
EVENTS = {
    100: Event("checkpoint", detail="ckpt-100.pt"),
    150: Event("data_switch", detail=f"shard 7 {EVIL}"),
    180: Event("checkpoint", detail="ckpt-180.pt"),
    320: Event("checkpoint", detail="ckpt-320.pt"),
    LOST: Event("nonfinite", layer=SICK, role="input", rank=3),
}


def step_record(step: int) -> StepRecord:
    made = record(step, onset=ONSET, rise=RISE, layers=(*LAYERS, EVIL))
    scalars = dict(made.scalars) | {EVIL: 1.0}
    if step >= LOST:
        scalars["loss"] = math.nan
    events = (EVENTS[step],) if step in EVENTS else ()
    return replace(made, scalars=scalars, events=events)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("incident"))
    made.start()
    with made.client() as client:
        run = SyntheticRun(client, "llama", layers=(*LAYERS, EVIL))
        for first in range(0, STEPS, 60):
            run.put([step_record(step) for step in range(first, first + 60)])
        with Client(made.url) as typed:
            wait_until(lambda: typed.risk("llama").step == STEPS - 1, 120)
            wait_until(lambda: len(typed.risk_history("llama").step) == STEPS, 30)
    yield made
    assert made.stop() == 0, made.log


@pytest.fixture(scope="module")
def folder(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command wrote, unpacked."""
    target = tmp_path_factory.mktemp("unpacked")
    arguments = ["incident", "llama@350", "-o", str(target / "a.zip"), "--url", service.url]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    with zipfile.ZipFile(target / "a.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(target)
    names = {path.name for path in target.iterdir()}
    assert names == {"a.zip", "incident.html", "incident.json", "records.parquet"}
    return target


def test_the_parquet_holds_what_the_store_holds(service: Service, folder: Path) -> None:
    table = pq.read_table(folder / "records.parquet")
    with Client(service.url) as client:
        stored = client.records("llama")
    assert table.num_rows == STEPS
    assert table.schema.equals(stored.schema)
    # NaN is not equal to itself in Arrow, but its words are.
    assert repr(table.to_pylist()) == repr(stored.to_pylist())


def test_the_facts_are_there(service: Service, folder: Path) -> None:
    facts = json.loads((folder / "incident.json").read_text())
    assert (facts["run"], facts["step"], facts["attempt"]) == ("llama", 350, 1)
    assert (facts["first_step"], facts["last_step"], facts["records"]) == (0, STEPS - 1, STEPS)
    assert ONSET - 60 < facts["trouble_since"] <= LOST
    checkpoint = facts["checkpoint"]
    # The checkpoint of step 320 was written when the loss rose already: it is not known to be good.
    assert checkpoint["step"] == (180 if facts["trouble_since"] <= 320 else 320)
    assert checkpoint["tokens"] == 4096 * (checkpoint["step"] + 1)
    assert checkpoint["tokens_counted"]
    assert "shard 7" in checkpoint["data"]
    assert facts["causes"][0]["remedy"]
    assert {"foreshock service", "forecaster"} <= facts["versions"].keys()
    kinds = [alert["kind"] for alert in facts["alerts"]]
    assert "detection" in kinds
    page = (folder / "incident.html").read_text()
    for words in ("ckpt-", "What moved most", SICK, "records.parquet", "downsampled", "shard 7"):
        assert words in page, words
    with Client(service.url) as client:
        (cause, *_) = client.diagnosis("llama", step=350).causes
    assert facts["causes"][0]["name"] == cause.name


def test_words_of_others_stay_words(folder: Path) -> None:
    page = (folder / "incident.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"<[^>]*\sonerror=", page)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "default-src &#x27;none&#x27;" in page


@pytest.mark.debian
@pytest.mark.skipif(not installed(), reason="needs Debian's chromium and chromium-driver")
def test_it_opens_without_a_network(folder: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as browser:
        browser.offline(True)
        browser.resize(1000, 1400)
        browser.driver.get((folder / "incident.html").as_uri())
        assert browser.evaluate("return document.title") == "llama at step 350 · foreshock incident"
        assert browser.origins() <= {"file://"}
        assert browser.errors() == []
        assert "Where to go back to" in browser.text("body")
        assert EVIL in browser.text("body")
        drawn = "return [...document.querySelectorAll('img')].map(image => image.naturalWidth)"
        widths = browser.evaluate(drawn)
        assert widths
        assert min(widths) > 100
        assert len(browser.all("svg polyline")) >= 8
        across = "return document.documentElement.scrollWidth <= window.innerWidth"
        assert browser.evaluate(across)
        browser.driver.save_screenshot(str(folder / "picture.png"))


def test_what_there_is_not_is_said(service: Service, tmp_path: Path) -> None:
    with Client(service.url) as client, httpx.Client(base_url=service.url) as plain:
        target = tmp_path / "x.zip"
        with pytest.raises(NotFound, match="no step 5000; it has 0 to 359"):
            client.save_incident("llama", 5000, target)
        with pytest.raises(NotFound, match="in attempt 2"):
            client.save_incident("llama", 5, target, attempt=2)
        with pytest.raises(NotFound, match="no run 'nobody'"):
            client.save_incident("nobody", 5, target)
        post_run(plain, "empty", new_launch())
        with pytest.raises(NotFound, match="no records yet"):
            client.save_incident("empty", 5, target)
        assert list(tmp_path.iterdir()) == []
    for wrong in ("llama", "llama@", "@5", "llama@x"):
        done = CliRunner().invoke(app, ["incident", wrong, "--url", service.url])
        assert (done.exit_code, "RUN@STEP" in done.output) == (2, True)


def test_a_calm_run_says_that_it_is_calm(service: Service, tmp_path: Path) -> None:
    with httpx.Client(base_url=service.url) as plain:
        calm = SyntheticRun(plain, "calm", layers=LAYERS[:1])
        calm.send(5)
    with Client(service.url) as client:
        client.save_incident("calm", 2, tmp_path / "calm.zip")
    with zipfile.ZipFile(tmp_path / "calm.zip") as archive:
        page = archive.read("incident.html").decode()
        assert pq.read_table(io.BytesIO(archive.read("records.parquet"))).num_rows == 5
    for words in ("No alert of this attempt", "Too few records", "No checkpoint was recorded"):
        assert words in page


def test_pictures_cope_with_whatever_was_measured() -> None:
    nothing = np.full((3, 5), np.nan)
    for grid in (nothing, np.zeros((3, 5)), np.full((1, 1), 1e300), -np.ones((2, 2))):
        picture, low, high, _ = heat_image(grid)
        assert picture.startswith("data:image/png;base64,")
        assert math.isfinite(low)
        assert math.isfinite(high)
    steps = np.arange(5.0)
    for values in (nothing[0], np.zeros(5), np.array([1e-30, 1, 1e30, np.nan, 2])):
        chart = line_chart(steps, {"a": values}, span=(0, 4), lost=[3])
        assert "nan" not in chart
        assert "inf" not in chart


def test_movers_compare_with_what_was_usual() -> None:
    values = np.ones((2, 10))
    values[1, 8:] = 8.0
    grid = Grid(role="input", statistic="amax", layers=("a", "b"), values=values, nonfinite=0)
    (first, second) = movers([grid], bucket=9)
    assert (first.layer, first.usual, first.now, first.change) == ("b", 1.0, 8.0, 3.0)
    assert second.change == 0.0
    assert movers([replace(grid, values=np.full((2, 10), np.nan))], bucket=9) == []
