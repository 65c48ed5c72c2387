"""Runs, series, heatmap and records from a real service over HTTP."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from foreshock.api.wire import ARROW, JSON
from foreshock.monitor.record import SCHEMA, records_from_json, table_to_records
from tests.api.service import (
    LAYERS,
    Service,
    make_record,
    make_records,
    new_launch,
    post_run,
    put_records,
)
from tests.api.test_routes_batches import is_problem

PARQUET = "application/vnd.apache.parquet"


@pytest.fixture(scope="module")
def run(served: Service) -> str:
    """A run of 40 steps; tensors at every fourth; the loss is NaN at step 3."""
    records = [make_record(step, tensors=step % 4 == 0) for step in range(40)]
    records[3] = make_record(3, tensors=False, value=math.nan)
    launch = new_launch()
    with served.client() as client:
        members: dict[str, Any] = {"layers": [LAYERS[0], LAYERS[2]], "tokens_per_step": 1024}
        members |= {"config": {"learning_rate": 0.1}, "world_size": 8}
        name = f"reading-{launch[:8]}"
        run_id = post_run(client, name, launch, **members)["run_id"]
        assert put_records(client, run_id, launch, 1, records).status_code == 201
    return str(run_id)


def get(client: httpx.Client, run: str, what: str, **query: Any) -> Any:
    response = client.get(f"/api/v1/runs/{run}/{what}", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_list_and_the_detail_agree(client: httpx.Client, run: str) -> None:
    (listed,) = [r for r in client.get("/api/v1/runs").json()["runs"] if r["run_id"] == run]
    detail = client.get(f"/api/v1/runs/{run}").json()
    moving = {"risk", "state", "kind"}
    for name in listed.keys() - moving:
        assert detail[name] == listed[name], name
    assert (listed["status"], listed["first_step"], listed["last_step"]) == ("live", 0, 39)
    assert listed["loss"] == 39.0
    assert (detail["tokens_per_step"], detail["world_size"]) == (1024, 8)
    assert detail["config"] == {"learning_rate": 0.1}
    assert detail["scalars"] == ["grad_norm", "loss"]
    assert (detail["roles"], detail["formats"]) == (["input", "weight"], ["e4m3"])
    by_name = client.get(f"/api/v1/runs/{listed['run']}").json()
    assert by_name["run_id"] == run
    assert client.get("/api/v1/runs", params={"project": "none"}).json()["runs"] == []


def test_layers_stand_in_model_order_and_unannounced_ones_last(
    client: httpx.Client, run: str
) -> None:
    expected = [LAYERS[0], LAYERS[2], LAYERS[1]]
    assert client.get(f"/api/v1/runs/{run}").json()["layers"] == expected
    assert get(client, run, "heatmap", statistic="amax")["layers"] == expected


def test_series_of_scalars_and_tensors(client: httpx.Client, run: str) -> None:
    loss = get(client, run, "series", name="loss")
    assert loss["step"] == list(range(40))
    assert loss["mean"][2:5] == [2.0, "NaN", 4.0]
    halves = get(client, run, "series", name="loss", points=20)
    assert (halves["min"][1], halves["max"][1], halves["nonfinite"][1]) == (2.0, 2.0, 1)
    part = get(client, run, "series", name="loss", first_step=10, last_step=12)
    assert part["step"] == [10, 11, 12]
    amax = get(client, run, "series", layer=LAYERS[1], role="weight", statistic="amax")
    assert amax["step"] == list(range(0, 40, 4))
    assert amax["mean"] == [float(step) for step in range(0, 40, 4)]
    assert get(client, run, "series", name="absent")["step"] == []


def test_the_heatmap_is_layers_by_steps(client: httpx.Client, run: str) -> None:
    heatmap = get(client, run, "heatmap", statistic="amax", role="input", points=10)
    assert heatmap["steps"] == list(range(0, 40, 4))
    assert heatmap["values"] == [[float(step) for step in range(0, 40, 4)]] * 3
    assert heatmap["worst"] == "max"
    assert get(client, run, "heatmap", statistic="sqnr_db")["worst"] == "min"
    assert get(client, run, "heatmap", statistic="mu")["values"] == []


@pytest.mark.parametrize(
    ("what", "query", "status", "named"),
    [
        ("series", {}, 422, "name="),
        ("series", {"layer": "x", "statistic": "amax"}, 404, "layer"),
        ("series", {"layer": LAYERS[0], "statistic": "amux"}, 422, "kurtosis"),
        ("series", {"layer": LAYERS[0], "statistic": "amax", "role": "x"}, 422, "weight"),
        ("series", {"layer": LAYERS[0], "statistic": "amax", "format": "x"}, 422, "e4m3"),
        ("series", {"name": "loss", "points": 0}, 422, "points"),
        ("series", {"name": "loss", "first_step": "x"}, 422, "first_step"),
        ("heatmap", {}, 422, "statistic"),
        ("heatmap", {"statistic": "amax); DROP TABLE x; --"}, 422, "kurtosis"),
    ],
)
def test_wrong_questions_are_answered_with_what_is_right(
    client: httpx.Client, run: str, what: str, query: dict[str, str], status: int, named: str
) -> None:
    response = client.get(f"/api/v1/runs/{run}/{what}", params=query)
    assert named in is_problem(response, status)


def test_names_are_values_not_sql(client: httpx.Client, run: str) -> None:
    name = "loss' OR 1=1 --"
    assert get(client, run, "series", name=name)["step"] == []
    is_problem(client.get("/api/v1/runs/x'%20OR%20'1'='1"), 404)


def records(client: httpx.Client, run: str, accept: str, **query: Any) -> httpx.Response:
    response = client.get(f"/api/v1/runs/{run}/records", params=query, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].split(";")[0] == accept
    return response


def test_records_come_back_the_same_in_every_format(client: httpx.Client, run: str) -> None:
    as_json = records_from_json(records(client, run, JSON).content)
    assert [r.step for r in as_json] == list(range(40))
    with pa.ipc.open_stream(records(client, run, ARROW).content) as reader:
        arrow = reader.read_all()
    parquet = pq.read_table(io.BytesIO(records(client, run, PARQUET).content))
    assert arrow.schema.equals(SCHEMA)
    assert repr(table_to_records(arrow)) == repr(as_json)
    assert repr(table_to_records(parquet)) == repr(as_json)
    rows = list(csv.DictReader(io.StringIO(records(client, run, "text/csv").text)))
    assert list(rows[0]) == ["step", "time", "grad_norm", "loss"]
    assert [int(row["step"]) for row in rows] == list(range(40))
    assert [row["loss"] for row in rows[2:5]] == ["2.0", "NaN", "4.0"]


def test_records_of_a_range(client: httpx.Client, run: str) -> None:
    for accept in (JSON, ARROW, "text/csv", PARQUET):
        assert records(client, run, accept, first_step=90).content
    rows = json.loads(records(client, run, JSON, first_step=7, last_step=9).content)["records"]
    assert [row["step"] for row in rows] == [7, 8, 9]
    nothing = records(client, run, JSON, first_step=90)
    assert nothing.json() == {"records": []}
    refused = client.get(f"/api/v1/runs/{run}/records", headers={"Accept": "image/png"})
    assert "csv" in is_problem(refused, 406)
    default = client.get(f"/api/v1/runs/{run}/records")
    assert default.headers["content-type"] == JSON


def test_a_long_run_streams_in_pieces(client: httpx.Client) -> None:
    launch = new_launch()
    run_id = post_run(client, f"long-{launch[:8]}", launch)["run_id"]
    for sequence in range(3):
        put_records(client, run_id, launch, sequence, make_records(1000 * sequence, 1000))
    with pa.ipc.open_stream(records(client, run_id, ARROW).content) as reader:
        assert len(list(reader)) == 3
    rows = json.loads(records(client, run_id, JSON).content)["records"]
    assert [row["step"] for row in rows] == list(range(3000))
    assert records(client, run_id, "text/csv").text.count("\n") == 3001
