"""A real Prometheus scrapes a real service while a run goes bad: the rules fire as it does."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Generator
from dataclasses import dataclass, replace

import pytest

from foreshock.api.alert_log import ALERT_NAMES
from foreshock.monitor.record import Event, StepRecord
from tests.dashboards.prometheus import Prometheus, labels, running_prometheus, wait
from tests.dashboards.service import running_service
from tests.dashboards.synthetic import SyntheticRun, record

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
RUN = "llama-1b"
# Forecasts come from a script, so that they are there whatever model is shipped; the rest is real.
SCRIPTED = ("-m", "tests.api.page_service")


@dataclass(frozen=True)
class Seen:
    alerts: set[tuple[str, str]]
    metrics: str


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Generator[Seen]:
    folder = tmp_path_factory.mktemp("service")
    with (
        running_service(folder, command=SCRIPTED) as service,
        running_prometheus(tmp_path_factory.mktemp("prometheus"), service) as prometheus,
    ):
        run = SyntheticRun(service.client, RUN, onset=40, rise=90)
        feed(run, prometheus, 120, dropped=7)
        # It waits for its causes, and the rule for the next evaluation.
        alert = ALERT_NAMES["forecast"], "firing"
        wait("the alert", lambda: alert in prometheus.alerts())
        yield Seen(prometheus.alerts(), service.client.get("/metrics").text)


def feed(run: SyntheticRun, prometheus: Prometheus, steps: int, dropped: int) -> None:
    """Send steps over several scrapes, then wait until the last one was scraped and has settled."""
    for _ in range(3):
        run.send(steps // 3)
        time.sleep(1.2)
    # An increase needs a value from before it.
    counter = "foreshock_records_dropped_total"
    wait("its first scrape", lambda: prometheus.ask(counter) == {labels(): 0})
    event = Event("dropped", detail=f"{dropped} records: the spool was full")
    last: StepRecord = record(run.next_step, onset=run.onset, rise=run.rise)
    run.put([replace(last, events=(event,))])
    run.next_step += 1
    wait("the last step", lambda: prometheus.ask("foreshock_step") == {labels(): run.next_step - 1})
    # Recording rules and the alerts on them each take an evaluation more.
    time.sleep(3)


def test_what_was_sent_is_counted(seen: Seen) -> None:
    assert "foreshock_ingest_records_total 121.0" in seen.metrics
    assert f'foreshock_records_dropped_total{{project="default",run="{RUN}"}} 7.0' in seen.metrics


def test_the_rule_fires_as_the_service_does(seen: Seen) -> None:
    firing = {name for name, state in seen.alerts if state == "firing"}
    assert "TrainingDivergenceRisk" in firing
    assert "TrainingRecordsDropped" in firing
    assert "ForeshockDown" not in firing


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_exposition_is_lint_clean(seen: Seen) -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=seen.metrics,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
