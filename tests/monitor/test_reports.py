"""Reports of ranks: joining is a semilattice, bounds included, and the wire form keeps them."""

from __future__ import annotations

import functools
import json
import random
import time
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.monitor.entry import Entry
from foreshock.monitor.rank_reports import report_of
from foreshock.monitor.record import (
    Event,
    Held,
    Place,
    ReportError,
    StepReport,
    TensorIdentity,
    decode_reports,
    encode_reports,
)
from foreshock.monitor.record.reports import (
    MOST_EVENTS,
    MOST_PLACES,
    MOST_RANKS,
    event_key,
    join,
    rank_list,
    rank_mask,
)
from foreshock.monitor.report_sender import ReportSender
from foreshock.monitor.table import FIELDS, NEUTRAL, SumTable
from tests.monitor.report_strategies import reports


@given(reports(step=1), reports(step=1), reports(step=1))
def test_joining_is_idempotent_commutative_and_associative(
    a: StepReport, b: StepReport, c: StepReport
) -> None:
    assert join(a, a) == a
    assert join(a, b) == join(b, a)
    assert join(join(a, b), c) == join(a, join(b, c))


@given(st.integers(0, 2**32), st.integers(2, 5))
def test_bounds_do_not_depend_on_the_order(seed: int, parts: int) -> None:
    """Ten times more than fits, joined in two orders through two trees."""
    rng = random.Random(seed)
    many = [crowded(rng, rank) for rank in range(12)]
    whole = functools.reduce(join, many)
    rng.shuffle(many)
    nodes = [functools.reduce(join, many[part::parts]) for part in range(parts)]
    assert functools.reduce(join, [*nodes, *many[:3]]) == whole
    assert len(whole.largest) == len(whole.tightest) == MOST_PLACES
    assert len(whole.events) == MOST_EVENTS
    expected = max(held.value for report in many for held in report.largest.values())
    assert max(held.value for held in whole.largest.values()) == expected
    assert whole.broken == rank_mask(range(12)), "who broke is known beyond the bound"


def crowded(rng: random.Random, rank: int) -> StepReport:
    names = rng.sample(range(400), MOST_PLACES)
    held = {Place(f"l{n}", "input"): Held(float(rng.randrange(50)), rank) for n in names}
    seen = [Event("nonfinite", rng.randrange(4), f"l{n}", "input", rank, "inf") for n in names[:40]]
    return StepReport(
        step=3,
        ranks=1 << rank,
        broken=1 << rank,
        largest=held,
        tightest=held,
        events={event_key(e): e for e in seen},
    )


def test_joined_extremes_keep_their_ranks() -> None:
    up = Place("up", "input")
    a = StepReport(
        step=0,
        ranks=1 << 3,
        largest={up: Held(5.0, 3)},
        tightest={up: Held(2.0, 3)},
        health={"step_seconds_max": Held(1.0, 3), "step_seconds_min": Held(1.0, 3)},
    )
    b = StepReport(
        step=0,
        ranks=1 << 7,
        largest={up: Held(9.0, 7)},
        tightest={up: Held(2.0, 7)},
        health={"step_seconds_max": Held(2.0, 7), "step_seconds_min": Held(2.0, 7)},
    )
    both = join(a, b)
    assert both.largest[up] == Held(9.0, 7)
    assert both.tightest[up] == Held(2.0, 3), "the lowest rank of equals"
    assert both.health == {"step_seconds_max": Held(2.0, 7), "step_seconds_min": Held(1.0, 3)}
    assert rank_list(both.ranks) == [3, 7]


def test_an_event_that_all_ranks_tell_stands_once_and_non_finite_values_each() -> None:
    def of(rank: int) -> StepReport:
        seen = [
            Event("data_switch", rank=rank, detail="prose"),
            Event("nonfinite", 0, "up", "input", rank, "1 element"),
        ]
        return StepReport(step=0, ranks=1 << rank, events={event_key(e): e for e in seen})

    told = list(join(of(5), of(2)).events.values())
    assert sorted((e.kind, e.rank) for e in told) == [
        ("data_switch", 2),
        ("nonfinite", 2),
        ("nonfinite", 5),
    ]


@given(st.lists(reports(), min_size=1, max_size=5))
def test_the_wire_form_keeps_everything(sent: list[StepReport]) -> None:
    assert decode_reports(encode_reports(sent)) == sent


@given(st.sets(st.integers(0, MOST_RANKS - 1), min_size=1, max_size=50))
def test_ranks_of_a_mask(ranks: set[int]) -> None:
    assert rank_list(rank_mask(ranks)) == sorted(ranks)


def body(**report: Any) -> dict[str, Any]:
    item = {"step": 0, "ranks": [0, 0]} | report
    return {"version": 1, "layers": ["up"], "reports": [item]}


HOSTILE: list[tuple[object, str]] = [
    ([], "version"),
    ({"version": 2, "reports": []}, "version"),
    ({"version": 1, "reports": []}, "no report"),
    ({"version": 1, "reports": [7]}, "object"),
    ({"version": 1, "reports": [{"step": 0, "ranks": [0, 0]}] * 1025}, "at most 1024"),
    (body(step=-1), "step"),
    (body(step=True), "step"),
    (body(step=10**40), "step"),
    (body(ranks=[]), "no rank"),
    (body(ranks=[0]), "pairs"),
    (body(ranks=[5, 2]), "ascending"),
    (body(ranks=[0, 3, 2, 4]), "ascending"),
    (body(ranks=[0, 2**40]), "rank"),
    (body(broken=[1, 1]), "does not report"),
    (body(largest=[[1, 0, 1.0, 0]]), "layer"),
    (body(largest=[[0, 99, 1.0, 0]]), "role"),
    (body(largest=[[0, 0, "NaN", 0]]), "finite"),
    (body(largest=[[0, 0, 10**400, 0]]), "finite"),
    (body(largest=[[0, 0]]), "extreme"),
    (body(largest=[[0, 0, 1.0, 0]] * 65), "at most 64"),
    (body(events=[{"kind": 3}]), "kind"),
    (body(events=[{"kind": "x", "detail": "y" * 501}]), "detail"),
    (body(events=[{"kind": "x", "detail": "\ud800"}]), "Unicode"),
    (body(health={"mood": [1, 0]}), "health"),
    (body(health={"errors_max": [1]}), "number"),
]


@pytest.mark.parametrize(("document", "reason"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_bundle_is_refused_with_the_reason(document: object, reason: str) -> None:
    with pytest.raises(ReportError, match=reason):
        decode_reports(json.dumps(document).encode())


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"[" * 100_000, b'{"version":1,"reports":[{"step":NaN,"ranks":[0,0]}]}']
)
def test_what_is_no_json_is_refused(raw: bytes) -> None:
    with pytest.raises(ReportError):
        decode_reports(raw)


def table(amax: list[float], headroom: list[float]) -> SumTable:
    values = np.tile(NEUTRAL, (len(amax), 1))
    values[:, FIELDS.index("amax")] = amax
    values[:, FIELDS.index("headroom_log2")] = headroom
    entries = tuple(
        Entry(TensorIdentity(f"l{row}", "input", "e4m3", what_if=row == 0), None)
        for row in range(len(amax))
    )
    return SumTable(entries, values, np.full(len(amax), np.inf), np.zeros(len(amax)))


def test_a_rank_names_its_worst_tensors_and_no_what_if() -> None:
    amax = [1e9, 3.0, 9.0, 1.0, 5.0, 7.0, -np.inf]
    headroom = [-9.0, 2.0, np.inf, -1.0, 0.5, 3.0, 1.0]
    report = report_of(4, 6, table=table(amax, headroom), health={"errors": 0, "dropped": None})
    assert [(p.layer, h) for p, h in report.largest.items()] == [
        ("l2", Held(9.0, 6)),
        ("l5", Held(7.0, 6)),
        ("l4", Held(5.0, 6)),
        ("l1", Held(3.0, 6)),
    ]
    assert [p.layer for p in report.tightest] == ["l3", "l4", "l6", "l1"]
    assert report.health == {}
    assert rank_list(report.ranks) == [6]


def test_a_float32_survives_the_way() -> None:
    exact = np.array([0.1, 1 / 3, 3e38, 1e-40], np.float32)
    amax = [0.0, *exact.astype(float)]
    (came,) = decode_reports(
        encode_reports([report_of(0, 0, table=table(amax, [np.inf] * 5), health={})])
    )
    values = np.array([held.value for held in came.largest.values()], np.float32)
    np.testing.assert_array_equal(np.sort(values), np.sort(exact))


class Relay:
    """Answers as it is told, and keeps what it took."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.taken: list[StepReport] = []
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        status = self.answers.pop(0) if self.answers else 202
        if status == 0:
            raise httpx.ConnectError("nobody is there")
        if status == 202:
            self.taken += decode_reports(request.read())
        return httpx.Response(status)


def sender(relay: Relay, **more: Any) -> ReportSender:
    return ReportSender(
        "http://relay:1/",
        run="a b",
        launch_id="id",
        token="secret",
        transport=httpx.MockTransport(relay),
        interval=0.01,
        **more,
    )


def plain(step: int, *seen: Event) -> StepReport:
    return StepReport(step=step, ranks=1, events={event_key(e): e for e in seen})


def test_reports_arrive_in_spite_of_failures() -> None:
    relay = Relay(0, 503, 401)
    out = sender(relay)
    for step in range(5):
        out.submit(plain(step))
    assert wait_for(lambda: len(relay.taken) >= 5)
    assert out.close(10)
    assert {r.step for r in relay.taken} == set(range(5))
    assert out.dropped == 0
    request = relay.requests[0]
    assert request.url.raw_path == b"/api/v1/runs/a%20b/reports/id"
    assert request.headers["Authorization"] == "Bearer secret"


def test_a_dead_relay_costs_a_bounded_queue_and_events_stay_longest() -> None:
    relay = Relay(*[0] * 10_000)
    out = sender(relay, most_reports=4)
    out.submit(plain(0, Event("nonfinite", rank=0)))
    for step in range(1, 50):
        out.submit(plain(step))
    assert out.waiting == 4
    assert out.dropped == 46
    relay.answers = []
    assert wait_for(lambda: bool(relay.taken))
    assert out.close(10)
    assert [r.step for r in relay.taken] == [0, 47, 48, 49]


def test_a_refused_bundle_is_counted_and_not_sent_again() -> None:
    relay = Relay(422)
    out = sender(relay)
    out.submit(plain(0))
    assert wait_for(lambda: out.dropped == 1)
    out.submit(plain(1))
    assert out.close(10)
    assert [r.step for r in relay.taken] == [1]


def test_a_dead_relay_does_not_hold_up_the_end() -> None:
    out = sender(Relay(*[0] * 10_000))
    out.submit(plain(0))
    began = time.monotonic()
    assert not out.close(60)
    assert time.monotonic() - began < 30


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="http"):
        ReportSender("relay:8421", run="r", launch_id="id")


def wait_for(condition: Any, seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
