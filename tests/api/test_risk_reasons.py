"""What the risk of a run says when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from foreshock.api.registry import Attempt, Run
from foreshock.api.risks import risk_table
from foreshock.api.routes.risk import _from_store
from foreshock.api.store_sqlite import STORE_FILE, SqliteStore
from tests.api.live_helpers import START, risk

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / STORE_FILE, lambda _: ())
    yield made
    made.close()


def run_of(*last_steps: int | None) -> Run:
    attempts = tuple(
        Attempt(
            number=number,
            launch_id="l",
            epoch=0,
            first_step=0,
            last_step=last,
            started_at=NOW,
            parent_launch=None,
            last_received=NOW,
            last_loss=None,
        )
        for number, last in enumerate(last_steps, 1)
    )
    return Run(
        run_id="a" * 32,
        project="default",
        name="r",
        created_at=NOW,
        layers=(),
        config={},
        tokens_per_step=None,
        world_size=None,
        attempts=attempts,
    )


def test_a_new_attempt_without_a_risk_points_at_the_one_before(store: SqliteStore) -> None:
    store.append_risks([("a" * 32, 1, risk_table([(START, risk(90))]))])
    answer = _from_store(run_of(99, None, 5), store)
    assert (answer.step, answer.attempt) == (None, 3)
    assert set(answer.probability.values()) == {None}
    (reason,) = set(answer.reasons.values())
    assert reason.startswith("no record of attempt 3 has been scored yet; attempt 1 was")
    assert "step 90" in reason
    # Its own once it has one.
    store.append_risks([("a" * 32, 3, risk_table([(START, risk(5))]))])
    assert _from_store(run_of(99, None, 5), store).step == 5


def test_a_run_of_which_nothing_was_scored_says_so(store: SqliteStore) -> None:
    for run in (run_of(), run_of(None), run_of(7), run_of(7, 9)):
        reasons = set(_from_store(run, store).reasons.values())
        assert reasons == {"no record of this run has been scored yet"}
