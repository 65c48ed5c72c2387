"""What breaks around the service costs no acknowledged batch, and stores none twice.

The faults that need root (a disk full to the last byte, one that is read-only) and the full counts
are in `benchmarks/faults.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api import fault_scenarios


def test_a_disk_that_another_program_fills(tmp_path: Path) -> None:
    tally = fault_scenarios.nearly_full_disk(tmp_path)
    assert tally.exactly_once, tally
    assert tally.acknowledged > 3


@pytest.mark.long
def test_a_store_that_hangs_fails_health_and_loses_nothing(tmp_path: Path) -> None:
    tally, said = fault_scenarios.hung_store(tmp_path)
    assert "a query hangs" in said
    assert tally.exactly_once, tally


@pytest.mark.long
@pytest.mark.debian
@pytest.mark.skipif(not Path(fault_scenarios.FAKETIME).exists(), reason="needs libfaketime")
def test_clocks_that_jump(tmp_path: Path) -> None:
    tally = fault_scenarios.clock_jumps(tmp_path)
    assert tally.exactly_once, tally
    assert tally.acknowledged > 5


@pytest.mark.long
def test_a_spool_through_an_outage_says_what_it_dropped(tmp_path: Path) -> None:
    """Six minutes of a step a second with room for a part of them."""
    bound = 20_000
    outcome = fault_scenarios.outage(tmp_path, hours=0.1, max_bytes=bound)
    assert outcome.dropped > 0
    assert outcome.stored + outcome.dropped == outcome.written
    assert outcome.doubled == 0
    assert outcome.most_bytes <= bound


@pytest.mark.long
def test_a_spool_with_room_enough_loses_nothing(tmp_path: Path) -> None:
    outcome = fault_scenarios.outage(tmp_path, hours=0.1, max_bytes=2**20)
    assert (outcome.stored, outcome.dropped, outcome.doubled) == (outcome.written, 0, 0)
