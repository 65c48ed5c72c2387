"""Several processes, one record: what real process groups on this machine make of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.monitor.rank_checks import (
    check_data_parallel,
    check_disagreeing,
    check_lacking,
    check_survivor,
    check_tensor_parallel,
    run,
)


def test_data_parallel(tmp_path: Path) -> None:
    check_data_parallel(run("ddp", tmp_path))


@pytest.mark.long
def test_fully_sharded(tmp_path: Path) -> None:
    check_data_parallel(run("fsdp", tmp_path))


def test_tensor_parallel(tmp_path: Path) -> None:
    check_tensor_parallel(run("tp", tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("case", ["experts", "stages"])
def test_layers_that_some_ranks_lack(case: str, tmp_path: Path) -> None:
    check_lacking(run(case, tmp_path))


@pytest.mark.long
def test_a_rank_with_another_scale_is_named(tmp_path: Path) -> None:
    check_disagreeing(run("disagree", tmp_path))


@pytest.mark.long
def test_a_rank_that_dies_costs_the_others_nothing(tmp_path: Path) -> None:
    check_survivor(run("dead", tmp_path))
