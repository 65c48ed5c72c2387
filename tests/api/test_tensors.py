"""The newest measured tensors, worst first: as a search by hand finds them, and over HTTP."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.api.measured import TensorChoice, newest_measured, worst_tensors
from foreshock.api.store import View
from foreshock.api.store_sqlite import SqliteStore
from foreshock.monitor.record import StepRecord, TensorIdentity, TensorStatistics
from tests.api.service import LAYERS, fact_rows, new_launch, post_run, put_records
from tests.api.test_routes_batches import is_problem

COMMITS = itertools.count(1)
ROLES = ("input", "weight")
FORMATS = (("bf16", False), ("e4m3", True), ("mxfp8_e4m3", True))
NUMBERS = st.one_of(
    st.none(), st.sampled_from([math.nan, math.inf, 0.0]), st.floats(-99, 99, width=32)
)
# Wide gaps, so that each of the spans that are searched is needed.
STEPS = st.sets(st.sampled_from([0, 1, 63, 64, 65, 700, 1024, 1090, 5000, 5063]), min_size=1)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorStatistics, ...]:
    keys = draw(
        st.lists(
            st.tuples(st.sampled_from(LAYERS), st.sampled_from(ROLES), st.sampled_from(FORMATS)),
            unique=True,
            max_size=4,
        )
    )
    return tuple(
        TensorStatistics(
            identity=TensorIdentity(layer, role, form, what_if=what_if),
            numel=64,
            kurtosis=draw(NUMBERS),
            sqnr_db=draw(NUMBERS),
        )
        for layer, role, (form, what_if) in keys
    )


@st.composite
def runs(draw: st.DrawFn) -> list[StepRecord]:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        StepRecord(step=step, time=start + timedelta(seconds=step), tensors=draw(tensors()))
        for step in sorted(draw(STEPS))
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqliteStore]:
    path = tmp_path_factory.mktemp("tensors") / "facts.sqlite"
    made = SqliteStore(path, lambda _: LAYERS, fsync=False)
    yield made
    made.close()


def badness(value: float, smallest: bool) -> float:
    return math.inf if not math.isfinite(value) else -value if smallest else value


def wanted(tensor: TensorStatistics, choice: TensorChoice) -> bool:
    identity = tensor.identity
    return (
        identity.role == choice.role
        and getattr(tensor, choice.statistic) is not None
        and choice.format in (None, identity.format)
    )


@settings(deadline=None, max_examples=40)
@given(
    records=runs(),
    role=st.sampled_from(ROLES),
    statistic=st.sampled_from(["kurtosis", "sqnr_db"]),
    form=st.sampled_from([None, "bf16", "e4m3"]),
    last=st.sampled_from([0, 64, 800, 9999]),
)
def test_it_finds_what_a_search_by_hand_finds(
    store: SqliteStore,
    records: list[StepRecord],
    role: str,
    statistic: str,
    form: str | None,
    last: int,
) -> None:
    run, commit = f"{next(COMMITS):032x}", next(COMMITS)
    store.append([fact_rows(run, 1, commit, records)])
    choice = TensorChoice(role=role, statistic=statistic, format=form)
    view = View(run, 1, last_step=last)
    holding = [
        record
        for record in records
        if record.step <= last and any(wanted(tensor, choice) for tensor in record.tensors)
    ]
    assert newest_measured(store, view, choice) == (holding[-1].step if holding else None)
    rows = worst_tensors(store, view, choice, 3).to_pylist()
    if not holding:
        assert rows == []
        return
    found = [float(row[statistic]) for row in rows]
    smallest = statistic == "sqnr_db"
    expected = sorted(
        (
            badness(float(getattr(tensor, statistic)), smallest)
            for tensor in holding[-1].tensors
            if wanted(tensor, choice)
        ),
        reverse=True,
    )
    assert [badness(value, smallest) for value in found] == expected[:3]
    assert {row["step"] for row in rows} == {holding[-1].step}
    assert {row["role"] for row in rows} == {role}


@pytest.fixture
def run(client: httpx.Client) -> str:
    """Measured at step 0 and 4; the channels, as on a GPU, at step 0 only."""
    launch = new_launch()
    run_id = post_run(client, f"tensors-{launch[:8]}", launch, layers=list(LAYERS))["run_id"]
    records = [
        StepRecord(
            step=step,
            time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=step),
            tensors=tuple(
                TensorStatistics(
                    identity=TensorIdentity(layer, "input", "e4m3"),
                    numel=64,
                    kurtosis=math.nan if place == 1 else 3.0 + step + place,
                    top_channel=17 + place if step == 0 else None,
                    top_channel_share=0.1 * (place + 1) if step == 0 else None,
                )
                for place, layer in enumerate(LAYERS)
            )
            if step in (0, 4)
            else (),
        )
        for step in range(7)
    ]
    assert put_records(client, run_id, launch, 1, records).status_code == 201
    return str(run_id)


def test_the_route_answers_with_the_worst_first(client: httpx.Client, run: str) -> None:
    path = f"/api/v1/runs/{run}/tensors"
    body = client.get(path, params={"statistic": "kurtosis"}).json()
    assert (body["step"], body["worst"]) == (4, "max")
    assert [(t["layer"], t["kurtosis"]) for t in body["tensors"]] == [
        (LAYERS[1], "NaN"),
        (LAYERS[2], 9.0),
        (LAYERS[0], 7.0),
    ]
    channels = client.get(path, params={"statistic": "top_channel_share", "limit": 2}).json()
    assert channels["step"] == 0
    assert [t["top_channel"] for t in channels["tensors"]] == [19, 18]
    before = client.get(path, params={"statistic": "kurtosis", "last_step": 3}).json()
    assert before["step"] == 0
    nothing = client.get(path, params={"statistic": "kurtosis", "format": "nvfp4"}).json()
    assert nothing == {"step": None, "worst": "max", "tensors": []}


def test_the_table_says_the_same(client: httpx.Client, run: str) -> None:
    path = f"/api/v1/runs/{run}/tensors"
    text = client.get(path, params={"statistic": "kurtosis", "as": "csv"}).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["step"], row["layer"], row["kurtosis"]) for row in rows] == [
        ("4", LAYERS[1], "NaN"),
        ("4", LAYERS[2], "9.0"),
        ("4", LAYERS[0], "7.0"),
    ]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({}, "statistic"),
        ({"statistic": "kurtoses"}, "kurtosis"),
        ({"statistic": "amax", "role": "x"}, "grad_output"),
        ({"statistic": "amax", "format": "x"}, "e4m3"),
        ({"statistic": "amax", "limit": 0}, "limit"),
    ],
)
def test_wrong_questions_are_told_what_would_be_right(
    client: httpx.Client, run: str, query: dict[str, str], named: str
) -> None:
    assert named in is_problem(client.get(f"/api/v1/runs/{run}/tensors", params=query), 422)
