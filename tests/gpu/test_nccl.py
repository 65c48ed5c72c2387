"""Two processes with a device each, over NCCL: what two over gloo must show, and no less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.monitor.rank_checks import (
    check_data_parallel,
    check_disagreeing,
    check_lacking,
    check_survivor,
    check_tensor_parallel,
    run,
)
from tests.trainer.tensor_ranks import run as tensor_parallel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize(
    ("case", "check"),
    [
        ("ddp", check_data_parallel),
        ("fsdp", check_data_parallel),
        ("tp", check_tensor_parallel),
        ("experts", check_lacking),
        ("stages", check_lacking),
        ("disagree", check_disagreeing),
        ("dead", check_survivor),
    ],
)
def test_over_nccl(
    case: str, check: Callable[[list[dict[str, Any]]], None], tmp_path: Path
) -> None:
    check(run(case, tmp_path, RANKS_OVER="nccl"))


def test_tensor_parallel_over_nccl(tmp_path: Path) -> None:
    tensor_parallel(tmp_path, "exact", "casts", "bytes_sent", RANKS_OVER="nccl")
