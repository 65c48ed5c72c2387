"""Two processes over gloo: sums, scales, levels, shards, and a fault of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.fp8lm.rank_checks import CHECKS
from tests.trainer.fp8lm.ranks import run


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run(folder, *CHECKS)


@pytest.mark.parametrize("case", CHECKS)
def test_two_processes(case: str, seen: dict[str, list[Any]]) -> None:
    CHECKS[case](seen[case])


def test_states_of_two_processes_resume_on_one(seen: dict[str, list[Any]]) -> None:
    """Whole tensors and blocks: what one process loads is what two had, code for code."""
    from tests.trainer.fp8lm.ranks import LEVELS, net

    from foreshock.trainer.fp8lm import fp8_optimizer

    for name in ("O3", "O3-blocks"):
        saved = seen["levels"][0][f"{name}-fp8_sum"]["saved"]
        model = net()
        optimizer = fp8_optimizer(model, LEVELS[name], lr=1e-2)
        model.load_state_dict(saved["model"])
        optimizer.load_full_state_dict(saved["optimizer"])
        for state, (_, loaded) in zip(
            saved["optimizer"]["state"].values(), optimizer.state.items(), strict=True
        ):
            assert state.keys() == loaded.keys()
            for key, value in state.items():
                assert torch.equal(value.float().reshape(-1), loaded[key].float().reshape(-1))
        for x in torch.randn(2, 4, 16):
            model(x).backward()
        optimizer.clip_gradients(1.0)
        optimizer.step()
