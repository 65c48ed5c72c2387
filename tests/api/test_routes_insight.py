"""Reading across runs: where two part, fewer lines of a heatmap than layers, the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.artifact import load_shipped
from foreshock.api.compare import CompareError
from foreshock.api.compare_stored import MOST_LAYERS, compare_stored
from foreshock.api.layer_rows import LayerChoice, layer_rows
from foreshock.api.store import View
from foreshock.api.store_rows import Placed, place, split
from foreshock.api.store_sqlite import SqliteStore
from foreshock.monitor.record import (
    StepRecord,
    TensorIdentity,
    TensorStatistics,
    records_to_table,
)
from tests.api.service import new_launch, post_run, put_records

STEPS = 300
PARTS_AT = 180
NAMES = tuple(f"blocks.{n}.mlp.down" for n in range(6))


def records(
    seed: int,
    *,
    names: Sequence[str] = NAMES,
    first: int = 0,
    steps: int = STEPS,
    every: int = 1,
    sick: str | None = None,
) -> list[StepRecord]:
    """Noise around falling curves; one layer's kurtosis grows 16 times from `PARTS_AT` on."""
    random = np.random.default_rng(seed)
    found = []
    for step in range(first, first + steps):
        tensors = [
            TensorStatistics(
                identity=TensorIdentity(name, "input", "e4m3"),
                numel=64,
                kurtosis=3
                * math.exp(random.normal(0, 0.05))
                * (16 if name == sick and step >= PARTS_AT else 1),
            )
            for name in (names if step % every == 0 else ())
        ]
        found.append(
            StepRecord(
                step=step,
                time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=step),
                scalars={
                    "loss": 2 + 3 / (1 + step / 40) + random.normal(0, 0.02),
                    "grad_norm": math.exp(random.normal(0, 0.1)),
                    "step_seconds": random.random(),
                },
                tensors=tuple(tensors),
            )
        )
    return found


def sent(client: httpx.Client, given: Sequence[StepRecord], name: str | None = None) -> str:
    launch = new_launch()
    run_id = post_run(client, name or f"compare-{launch[:8]}", launch, layers=list(NAMES))["run_id"]
    answer = put_records(client, run_id, launch, 1, given)
    assert answer.status_code == 201, answer.text
    return str(run_id)


def compare(client: httpx.Client, run: str, **query: Any) -> Any:
    answer = client.get(f"/api/v1/runs/{run}/compare", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_layer_that_goes_its_own_way_is_named_with_its_step(client: httpx.Client) -> None:
    a, b = sent(client, records(1)), sent(client, records(2, sick=NAMES[3]))
    found = compare(client, a, other=b)
    assert found["parted"]
    assert {p["layer"] for p in found["partings"]} == {NAMES[3]}
    first = found["partings"][0]
    assert (first["statistic"], first["role"], first["kind"]) == ("kurtosis", "input", "sustained")
    assert abs(first["step"] - PARTS_AT) <= 5
    assert first["b"] > 8 * first["a"]
    assert first["noise_units"] > first["asked_noise_units"]
    assert (found["first_step"], found["last_step"]) == (0, STEPS - 1)
    assert (found["width"], found["layer_width"], found["layers"]) == (1, 1, len(NAMES))

    again = client.get(f"/api/v1/runs/{a}/compare", params={"other": b})
    known = {"If-None-Match": again.headers["etag"]}
    asked = client.get(f"/api/v1/runs/{a}/compare", params={"other": b}, headers=known)
    assert asked.status_code == 304
    before = compare(client, a, other=b, last_step=PARTS_AT - 1)
    assert (before["parted"], before["last_step"]) == (False, PARTS_AT - 1)


def test_attempts_of_one_run_are_compared(client: httpx.Client) -> None:
    name = f"attempts-{new_launch()[:8]}"
    run = sent(client, records(3), name)
    assert sent(client, records(4, first=100, steps=200, sick=NAMES[0]), name) == run
    found = compare(client, run, other=run, attempt=1, other_attempt=2)
    assert (found["first_step"], found["last_step"]) == (100, 299)
    assert {p["layer"] for p in found["partings"]} == {NAMES[0]}
    same = compare(client, run, other=run, attempt=1, other_attempt=1)
    assert not same["parted"]


def test_runs_without_a_common_step_are_refused(client: httpx.Client) -> None:
    a, b = sent(client, records(5, steps=20)), sent(client, records(6, first=50, steps=20))
    answer = client.get(f"/api/v1/runs/{a}/compare", params={"other": b})
    assert (answer.status_code, answer.json()["detail"]) == (422, "no step is in both runs")
    absent = client.get(f"/api/v1/runs/{a}/compare", params={"other": "absent"})
    assert absent.status_code == 404
    wrong = client.get(f"/api/v1/runs/{a}/compare", params={"other": b, "statistic": "x"})
    assert (wrong.status_code, "kurtosis" in wrong.text) == (422, True)


def store_of(folder: Path, names: Sequence[str], runs: Mapping[str, Sequence[StepRecord]]) -> Any:
    store = SqliteStore(folder / "facts.sqlite", lambda _: names, fsync=False)
    ids = {name: index for index, name in enumerate(names)}
    for commit, (run, rows) in enumerate(runs.items(), 1):
        placed = Placed(run_id=run, attempts=np.full(len(rows), 1), commit=commit, layer_ids=ids)
        store.append([place(split(records_to_table(rows)), placed)])
    return store


def test_a_long_range_is_judged_by_blocks(tmp_path: Path) -> None:
    quick = [
        StepRecord(
            step=step,
            time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=step),
            scalars={"loss": 2.0 + noise + (0.5 if late and step > 12_000 else 0.0)},
        )
        for late in (False, True)
        for step, noise in enumerate(np.random.default_rng(late).normal(0, 0.05, 20_500))
    ]
    runs = {"a": quick[:20_500], "b": quick[20_500:]}
    store = store_of(tmp_path, NAMES, runs)
    found = compare_stored(store, View("a"), View("b"), role="input", statistic="kurtosis")
    store.close()
    assert (found.width, found.last_step, found.layers) == (64, 20_499, 0)
    (parting,) = found.partings
    assert parting.key.statistic == "loss"
    assert abs(parting.step - 12_000) <= 6 * 64


def test_of_many_layers_those_are_judged_that_moved(tmp_path: Path) -> None:
    names = [f"blocks.{n}.up" for n in range(2 * MOST_LAYERS)]
    runs = {
        "a": records(7, names=names, every=5),
        "b": records(8, names=names, every=5, sick=names[150]),
    }
    store = store_of(tmp_path, names, runs)
    found = compare_stored(store, View("a"), View("b"), role="input", statistic="kurtosis")
    with pytest.raises(CompareError, match="no step"):
        compare_stored(store, View("a"), View("c"), role="input", statistic="kurtosis")
    store.close()
    assert (found.layers, found.judged_layers) == (2 * MOST_LAYERS, MOST_LAYERS)
    assert {p.key.layer for p in found.partings} == {names[150]}


CELLS = st.one_of(st.none(), st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(-1e9, 1e9))


@given(
    rows=st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=30),
    most=st.integers(1, 12),
    smallest=st.booleans(),
)
def test_a_shared_row_shows_the_worst_of_its_layers(
    rows: list[tuple[float | None, ...]], most: int, smallest: bool
) -> None:
    values = {f"layer {n}": row for n, row in enumerate(rows)}
    found = layer_rows(values, values, LayerChoice(most=most), smallest=smallest)
    assert len(found.layers) == len(found.values) == len(found.counts) <= most
    assert sum(found.counts) == len(rows)
    assert len({*found.counts[:-1]}) <= 1, "all but the last are alike"
    start = 0
    for count, shown in zip(found.counts, found.values, strict=True):
        for column, cell in enumerate(shown):
            group = [row[column] for row in rows[start : start + count]]
            known = [value for value in group if value is not None]
            finite = [value for value in known if math.isfinite(value)]
            if finite:
                assert cell == (min(finite) if smallest else max(finite))
            elif known:
                assert cell is not None
                assert not math.isfinite(cell)
            else:
                assert cell is None
        start += count


def test_a_heatmap_has_as_many_rows_as_asked_for(client: httpx.Client) -> None:
    run = sent(client, records(9, steps=40, sick=None))

    def heatmap(**query: Any) -> Any:
        return client.get(
            f"/api/v1/runs/{run}/heatmap", params={"statistic": "kurtosis", **query}
        ).json()

    whole = heatmap()
    assert (whole["layers"], whole["counts"]) == (list(NAMES), [1] * 6)
    shared = heatmap(rows=4)
    assert shared["layers"] == list(NAMES[::2])
    assert shared["counts"] == [2, 2, 2]
    assert shared["values"][1] == [max(p) for p in zip(*whole["values"][2:4], strict=True)]
    assert heatmap(match="BLOCKS.4", rows=1)["values"] == [whole["values"][4]]
    assert heatmap(match="nothing")["layers"] == []
    assert heatmap(start=NAMES[2], span=3)["layers"] == list(NAMES[2:5])
    assert heatmap(start=NAMES[2], span=4, rows=2)["counts"] == [2, 2]
    assert heatmap(start="no layer")["layers"] == []


def test_the_card_is_that_of_the_shipped_model(client: httpx.Client) -> None:
    card = client.get("/api/v1/forecaster").json()
    model = load_shipped()
    assert model is not None
    assert (card["version"], card["training_runs"]) == (model.version, len(model.fingerprints))
    assert [head["name"] for head in card["heads"]] == list(model.heads)
    for head in card["heads"]:
        assert head["thresholds"] == model.heads[head["name"]].thresholds
        assert set(head["unsupported"]) == set(model.card["unsupported_horizons"][head["name"]])
    assert card["evaluation"] == model.card["evaluation"]


def test_the_shipped_report_is_the_published_one_and_of_the_shipped_data() -> None:
    model = load_shipped()
    assert model is not None
    published = Path(__file__).parents[2] / "docs" / "results" / "forecast.json"
    report = model.card["evaluation"]
    assert report == json.loads(published.read_text())
    counted = ("runs", "groups", "events")
    assert [report[name] for name in counted] == [model.card[name] for name in counted]
    for quality in report["risk"].values():
        means = [mean for mean, _ in quality["calibration"]]
        assert means == sorted(means)
        assert 0 <= min(means) <= max(means) <= 1
