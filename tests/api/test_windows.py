"""Pieces of a run out of a real store, counted in records; risk as rows and thinned."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator

import numpy as np
import pytest

from foreshock.api.risks import risk_document, risk_history, risk_table
from foreshock.api.run_window import run_window
from foreshock.api.store import Store
from foreshock.api.store_open import open_store
from foreshock.api.store_url import ChdbPlace
from foreshock.api.windows import RunRecords
from foreshock.monitor.record import Event, Risk, records_to_table
from tests.api.live_helpers import START, record, risk
from tests.api.service import LAYERS, fact_rows, make_record


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = open_store(ChdbPlace(tmp_path_factory.mktemp("windows") / "store"), lambda _: LAYERS)
    yield store
    store.close()


@pytest.fixture(scope="module")
def sparse(store: Store) -> str:
    """A run with a record every 100 steps, then every 7."""
    run_id = uuid.uuid4().hex
    steps = [*range(0, 3000, 100), *range(3000, 3070, 7)]
    store.append([fact_rows(run_id, 1, 1, [make_record(step) for step in steps])])
    return run_id


def test_next_and_newest_count_records_not_steps(store: Store, sparse: str) -> None:
    records = RunRecords(store)
    following = records.next_records(sparse, 1, 150, 3)
    assert following["step"].to_pylist() == [200, 300, 400]
    assert records.next_records(sparse, 1, 2900, 4)["step"].to_pylist() == [3000, 3007, 3014, 3021]
    assert records.next_records(sparse, 1, 5000, 4).num_rows == 0
    newest = records.newest_records(sparse, 1, 3010, 4)
    assert newest["step"].to_pylist() == [2800, 2900, 3000, 3007]
    assert records.newest_records(sparse, 1, 10**9, 1000).num_rows == 40
    assert records.newest_records("f" * 32, 1, 100, 10).num_rows == 0
    assert records.step_before(sparse, 1, 250, 2) == 99
    assert records.step_before(sparse, 1, 250, 100) == -1


def test_a_run_may_go_between_two_looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleted, by this replica or another, while its records are read."""
    records = RunRecords(store)
    monkeypatch.setattr(store, "bounds", lambda _: (3, 40))
    gone = "e" * 32
    assert records.next_records(gone, 1, 2, 10).num_rows == 0
    assert records.newest_records(gone, 1, 40, 10).num_rows == 0
    assert records.step_before(gone, 1, 40, 10) == -1


def test_risk_rows_of_many_runs_go_in_together(store: Store) -> None:
    records = RunRecords(store)
    runs = [uuid.uuid4().hex for _ in range(3)]
    assert records.last_risk_step(runs[0], 1) is None
    records.append_risks(
        [(run_id, 1, risk_table([(START, risk(7)), (START, risk(8))])) for run_id in runs]
    )
    assert [records.last_risk_step(run_id, 1) for run_id in runs] == [8, 8, 8]
    records.append_risks([])


def test_a_window_is_the_records_over_time() -> None:
    records = [
        record(0, 4.0, kurtosis=3.0),
        record(1, math.inf, events=[Event("nonfinite")]),
        record(2, 2.0, kurtosis=5.0),
    ]
    window = run_window(records_to_table(records))
    assert window.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(window.scalars["loss"], [4.0, np.nan, 2.0])
    assert window.statistics is not None
    kurtosis = window.statistics["kurtosis"]
    assert kurtosis.shape == (3, 8)
    assert np.isnan(kurtosis[1]).all()
    assert kurtosis[:, 0].tolist()[::2] == [3.0, 5.0]
    assert np.isnan(window.statistics["sqnr_db"]).all()
    assert [identity.layer for identity in window.identities][:2] == [
        "blocks.0.mlp.down",
        "blocks.1.mlp.down",
    ]


def test_thinning_keeps_peaks_and_the_newest() -> None:
    risks = [risk(step, high=0.9 if step == 437 else 0.1) for step in range(1000)]
    history = risk_history(risk_table([(START, r) for r in risks]), 20)
    assert 437 in history["step"]
    assert history["step"][-1] == 999
    assert len(history["step"]) == 20
    assert history["step"] == sorted(history["step"])
    assert history["probability"]["1000"] == [None] * 20
    assert history["high"]["100"][history["step"].index(437)] == 1.0


def test_history_of_nothing_is_empty() -> None:
    history = risk_history(risk_table([]), 10)
    assert history["step"] == history["state"] == history["probability"]["10"] == []


def test_a_document_holds_no_number_that_is_no_json() -> None:
    odd = Risk(step=1, probability={10: 0.5}, expected_lead=math.inf, band={10: (0.1, math.nan)})
    document = risk_document(odd)
    assert document["expected_lead"] == "Infinity"
    assert document["band"] == {"10": [0.1, "NaN"]}
    assert document["probability"] == {"10": 0.5, "100": None, "1000": None}
