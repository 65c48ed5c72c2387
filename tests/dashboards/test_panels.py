"""Every query of every dashboard against real parts, while a real run goes bad.

A real Prometheus scraped the real service that a real training sent its records to. Panels of the
service are asked of the service itself and put through what Infinity and Grafana make of answers.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from dashboards.frames import from_prometheus, transformed
from dashboards.parts import FLEET, NUMERICS
from dashboards.queries import PanelQuery, panels, service_read

from foreshock.api.cli.processes import Children
from tests.dashboards.compared import COMPARE
from tests.dashboards.looks import (
    BOARDS,
    BY_HAND,
    LAYER,
    ON_STEPS,
    OVER_TIME,
    VARIABLES,
    Look,
    asked,
    get,
    look,
    reads,
    variables,
)
from tests.dashboards.prometheus import Prometheus, Vector, labels, running_prometheus, wait
from tests.dashboards.real_plan import CHECKPOINTS, NAME, PAUSES
from tests.dashboards.service import Service, running_service
from tests.dashboards.synthetic import SyntheticRun, by_hand

pytestmark = [
    # Two minutes, most of which a real run takes to go bad.
    pytest.mark.long,
    pytest.mark.debian,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
# Zero as long as all is well; that they are is tested below.
ALWAYS_ZERO = {"Silent runs", "Waiting to be scored"}


@dataclass(frozen=True)
class Seen:
    early: Look
    late: Look
    ended: Look
    client: httpx.Client


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Generator[Seen]:
    folder = tmp_path_factory.mktemp("panels")
    # Nobody listens there: tries to deliver fail, and are counted.
    environment = {"FORESHOCK_ALERT_URLS": "json://127.0.0.1:9"}
    with ExitStack() as stack:
        service = stack.enter_context(running_service(folder, environment=environment))
        prometheus = stack.enter_context(
            running_prometheus(tmp_path_factory.mktemp("prometheus"), service)
        )
        hand = SyntheticRun(service.client, BY_HAND, layers=(LAYER,), project="hand")
        hand.put([by_hand(step, LAYER) for step in range(4)])
        children = stack.enter_context(Children(folder))
        arguments = ("--url", service.address, "--folder", str(folder))
        children.start("run", ("-m", "tests.dashboards.real_run", *arguments))
        looks = []
        for pause in PAUSES:
            children.wait_for_file("run", folder / f"paused-{pause}", 240)
            settled(prometheus, service, pause - 1)
            looks.append(look(prometheus, service))
            hand.put([by_hand(4 + len(looks), LAYER)])
            (folder / f"go-{pause}").write_text("go")
        wait("the end of training", lambda: not children.running("run"), 120)
        assert children.exit_code("run") == 0, children.tail("run")
        settled(prometheus, service, PAUSES[-1] + 1)
        early, late = looks
        yield Seen(early, late, look(prometheus, service), service.client)


def settled(prometheus: Prometheus, service: Service, step: int) -> None:
    """Wait until a step is stored, scored and scraped."""
    newest = f'foreshock_step{{run="{NAME}"}}'
    stored = f"/api/v1/runs/{NAME}"
    wait(
        "the run", lambda: service.client.get(stored).is_success
    )  # it is announced beside the training
    wait(f"step {step}", lambda: (get(service.client, stored)["last_step"] or 0) >= step)
    last = get(service.client, stored)["last_step"]
    wait("its risk", lambda: get(service.client, f"{stored}/risk")["step"] == last)
    wait("the scrape", lambda: prometheus.ask(newest) == {labels(): last})
    time.sleep(2.5)


# Panels over time


def metric_of(query: PanelQuery) -> str:
    words = query.expression.replace("(", " ").replace("{", " ").split()
    return next(word for word in words if word.startswith("foreshock_"))


def name_of(query: PanelQuery) -> str:
    return f"{query.panel}: {query.reference}"


@pytest.mark.parametrize("query", OVER_TIME, ids=name_of)
def test_every_expression_returns_data_that_changes(seen: Seen, query: PanelQuery) -> None:
    looks = [look.panels[query.expression] for look in (seen.early, seen.late, seen.ended)]
    assert looks[1], "no data after it went bad"
    assert not any(math.isnan(value) for value in looks[1].values())
    if query.panel in ALWAYS_ZERO:
        assert [set(found.values()) for found in looks] == [{0.0}] * 3
        return
    assert looks[0] != looks[1] or looks[1] != looks[2]


COMPARED = [
    query
    for query in OVER_TIME
    if "rate(" not in query.expression
    and "time()" not in query.expression
    and query.panel not in {*ALWAYS_ZERO, "Live runs", "Clock behind"}
]


@pytest.mark.parametrize("query", COMPARED, ids=name_of)
def test_every_gauge_equals_the_stored_value(seen: Seen, query: PanelQuery) -> None:
    metric = metric_of(query)
    for moment in (seen.early, seen.late):
        shown, store = moment.panels[query.expression], dict(moment.store[metric])
        if query.panel == "Checkpoints":
            store = {key: value * 1000 for key, value in store.items()}
        if query.panel == "Alerts firing":
            store = {labels(): sum(store.values())}
        if query.panel in ("Firing now", "Alarms"):
            shown = {frozenset(p for p in key if p[0] == "kind"): v for key, v in shown.items()}
            store = {key: value for key, value in store.items() if value}
        if query.panel in ("Runs", "Risk of every run", "Largest risk"):
            store = chosen(query, store)
        everything = not query.expression.startswith(("topk", "bottomk"))
        assert shown.keys() == store.keys() if everything else shown.keys() <= store.keys()
        for key, value in shown.items():
            assert value == pytest.approx(store[key], rel=1e-6), (metric, key)


def chosen(query: PanelQuery, store: Vector) -> Vector:
    """Of risks only those of the horizon that is asked for, without their label."""
    kept = {
        k: v
        for k, v in store.items()
        if not k or f'horizon="{dict(k).get("horizon")}"' in query.expression
    }
    return {labels(): value for value in kept.values()}


def test_the_worst_layers_are_the_worst_of_all(seen: Seen) -> None:
    for query in COMPARED:
        pick = query.expression.partition("(")[0]
        if pick in ("topk", "bottomk"):
            largest = pick == "topk"
            everything = sorted(seen.late.store[metric_of(query)].values(), reverse=largest)
            shown = sorted(seen.late.panels[query.expression].values(), reverse=largest)
            assert shown[:5] == pytest.approx(everything[:5], rel=1e-6), query


def test_a_run_is_live_until_it_says_that_it_is_over(seen: Seen) -> None:
    (live,) = [query for query in OVER_TIME if query.panel == "Live runs"]
    looks = (seen.early, seen.late, seen.ended)
    assert [look.panels[live.expression] for look in looks] == [
        {labels(): 1.0},
        {labels(): 1.0},
        {labels(): 0.0},
    ]


def test_rows_of_the_fleet_are_joined_by_run(seen: Seen) -> None:
    (runs,) = [panel for panel in panels(BOARDS[FLEET]) if panel["title"] == "Runs"]
    shown = [q for q in OVER_TIME if q.panel == "Runs"]
    frames = [
        from_prometheus(
            [({"project": "default", "run": NAME}, next(iter(values.values())))],
            f"Value #{query.reference}",
        )
        for query in shown
        if (values := seen.late.panels[query.expression])
    ]
    (frame,) = transformed(frames, runs["transformations"])
    row = {column.name: column.values for column in frame}
    assert row["Run"] == (NAME,)
    assert row["Loss"] == pytest.approx(tuple(seen.late.store["foreshock_loss"].values()))
    assert list(row) == list(runs["transformations"][1]["options"]["renameByName"].values())


def test_what_fires_leads_to_what_to_do(seen: Seen) -> None:
    (query,) = [query for query in OVER_TIME if query.panel == "Firing now"]
    ((key, value),) = seen.late.panels[query.expression].items()
    assert (dict(key)["kind"], value) == ("detection", 1.0)
    number = int(dict(key)["runbook"].removeprefix("panel-"))
    (panel,) = [panel for panel in panels(BOARDS[FLEET]) if panel["id"] == number]
    assert panel["title"] == "TrainingLossDiverging"


def test_marks_stand_where_checkpoints_were_saved(seen: Seen) -> None:
    (query,) = [query for query in OVER_TIME if query.panel == "Checkpoints"]
    for moment, step in zip((seen.early, seen.late), CHECKPOINTS, strict=True):
        saved = next(
            r.time
            for r in moment.records[NAME]
            if r.step >= step and any(e.kind == "checkpoint" for e in r.events)
        )
        (shown,) = moment.panels[query.expression].values()
        assert shown / 1000 == pytest.approx(saved.timestamp(), abs=1e-3)


def test_time_since_it_was_heard_of_is_near_the_truth(seen: Seen) -> None:
    for query in OVER_TIME:
        if "last_received" in query.expression:
            for moment in (seen.early, seen.late):
                (silent,) = moment.panels[query.expression].values()
                assert 0 <= silent < 60, query


def test_rates_follow_what_was_sent(seen: Seen) -> None:
    for panel, reference in (("Records per second", "A"), ("Records per second", "B")):
        (query,) = [q for q in OVER_TIME if (q.panel, q.reference) == (panel, reference)]
        (value,) = seen.late.panels[query.expression].values()
        assert 0 < value < 200
    drops = [q for q in OVER_TIME if q.panel == "Records dropped per second"]
    assert len(drops) == 2
    for query in drops:
        assert max(seen.late.panels[query.expression].values()) > 0


# Panels on a step axis


def title(panel: Mapping[str, Any]) -> str:
    return str(panel["title"])


@pytest.mark.parametrize("panel", ON_STEPS, ids=title)
def test_every_panel_of_the_service_has_data_that_changes(
    seen: Seen, panel: Mapping[str, Any]
) -> None:
    early, late = (moment.frames[panel["title"]][1] for moment in (seen.early, seen.late))
    assert len(late) == 1, "a panel draws one frame"
    (frame,) = late
    assert frame[0].values
    assert early != late
    if panel["type"] == "trend":
        step = next(column for column in frame if column.name == panel["options"]["xField"])
        assert step.kind == "number"
        assert list(step.values) == sorted(step.values)
        lines = [c for c in frame if c.kind == "number" and c is not step]
        assert any(value is not None for column in lines for value in column.values)
    if panel["type"] == "heatmap":
        step, *layers = frame
        assert step.kind == "number"
        assert list(step.values) == sorted(step.values)
        assert {column.kind for column in layers} == {"number"}


@pytest.mark.parametrize("panel", ON_STEPS, ids=title)
def test_every_read_equals_the_stored_value(seen: Seen, panel: Mapping[str, Any]) -> None:
    for moment in (seen.early, seen.late):
        raw = moment.frames[panel["title"]][0]
        for read, frame in zip(reads(panel), raw, strict=True):
            kind = read.path.rpartition("/")[2]
            records = moment.records[variables(panel)["run"]]
            rows = [
                dict(zip([c.name for c in frame], values, strict=True))
                for values in zip(*(c.values for c in frame), strict=True)
            ]
            COMPARE[kind](rows, read, records, moment)


def test_layers_of_a_heatmap_stand_in_model_order(seen: Seen) -> None:
    order = get(seen.client, f"/api/v1/runs/{NAME}")["layers"]
    (frame,) = seen.late.frames["Kurtosis"][1]
    shown = [column.name for column in frame[1:]]
    assert len(shown) == 10
    assert shown == [name for name in order if name in shown]


def test_variables_offer_what_there_is(seen: Seen) -> None:
    found = {}
    for variable in BOARDS[NUMERICS]["templating"]["list"]:
        if variable["type"] == "query":
            asked_for = variable["query"]["infinityQuery"]
            (column,) = asked(seen.client, service_read(variable["name"], asked_for, VARIABLES))
            found[variable["name"]] = set(column.values)
    assert found["project"] == {"default", "hand"}
    assert found["run"] == {NAME}
    assert {"input", "weight", "grad_output", "exp_avg", "exp_avg_sq"} <= found["role"]
    assert LAYER in found["layer"]
    assert {"e4m3", "mxfp8_e4m3"} <= found["format"]
