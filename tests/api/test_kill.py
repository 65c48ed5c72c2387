"""kill -9 of the service in mid-ingest, counted against a log that the service never sees."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.api.client_log import kill_and_count


# In make test `test_shards` and `test_collect_relay` kill; this takes most of a minute.
@pytest.mark.long
def test_nothing_acknowledged_is_lost_and_nothing_is_there_twice(tmp_path: Path) -> None:
    tally = kill_and_count(tmp_path, kills=3, seed=7)
    assert tally.exactly_once, tally
    assert tally.acknowledged > 3


@pytest.mark.long
def test_a_sqlite_store_loses_nothing_either(tmp_path: Path) -> None:
    store = f"sqlite://{tmp_path}/facts.sqlite"
    tally = kill_and_count(tmp_path, kills=1, seed=8, store_url=store)
    assert tally.exactly_once, tally
    assert tally.acknowledged > 1


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_forty_kills(tmp_path: Path) -> None:
    """`python -m benchmarks.faults` counts a hundred."""
    tally = kill_and_count(tmp_path, kills=40, seed=int(time.time()))
    print(f"40 kill -9: {tally}")
    assert tally.exactly_once, tally
    assert tally.acknowledged > 40
