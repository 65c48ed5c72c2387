"""What two processes must have seen, over gloo or NCCL; see `ranks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.trainer.fp8lm.ranks import gradients
from torch import Tensor

Seen = list[dict[str, Any]]


def _same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_reduction(seen: Seen) -> None:
    first, second = seen
    own = [gradients(rank) for rank in range(2)]
    truth = [(own[0][i].cpu() + own[1][i].cpu()) / 2 for i in range(2)]
    truth.append(own[1][2].cpu() / 2)
    for way, found in first.items():
        for name in ("codes", "scale_inv"):
            assert _same(found[name], second[way][name]), (way, name)
        assert bool(found["finite"])
        assert found["present"].tolist() == [True] * 3
        for value, expected in zip(found["gradients"], truth, strict=True):
            error = (value.cpu() - expected).square().sum() / expected.square().sum()
            # 27 dB after two casts and a sum; pre-scaling and saturation cost more.
            assert float(error) < (2e-3 if way != "fp8_sum-post" else 2e-2), way
        assert found["overflow"].sum() == 0, "a shared scale fits the largest of all"
    auto, wide = first["fp8_sum-auto"], first["fp32_sum-auto"]
    numel = sum(g.numel() for g in own[0])
    # A byte for each element there and back, plus scales and flags.
    assert numel * 0.9 < auto["bytes"] < numel * 1.5
    assert numel * 0.5 < wide["bytes"] < numel * 1.5
    assert torch.equal(auto["mu"], second["fp8_sum-auto"]["mu"])


def check_broken(seen: Seen) -> None:
    """Every process hears of one process's NaN or infinity; no other tensor suffers."""
    for found in seen:
        for key, one in found.items():
            assert not bool(one["finite"]), key
            assert one["gradients"][0].isnan().any(), key
            assert torch.equal(one["gradients"][1].cpu(), torch.ones(4, 4)), key


def check_saturating(seen: Seen) -> None:
    for found in seen:
        assert set(found["codes"].tolist()) == {0x7E}, "448 + 18 saturates and is no NaN"
        assert bool(found["over"].all())
        assert found["golden"].tolist() == [0x55, 0x62]


def check_levels(seen: Seen) -> None:
    first, second = seen
    for name, found in first.items():
        other = second[name]
        assert _same(found["weights"].values(), other["weights"].values()), name
        assert torch.equal(found["norms"], other["norms"]), name
        if "resumed" in found:
            assert _same(found["resumed"].values(), found["straight"].values()), name
    whole, cut = first["O3-fp8_sum"], first["O2-fp8_sum"]
    # Processes own different numbers of matrices, or pieces of them, and the states with them.
    assert whole["owned"] + second["O3-fp8_sum"]["owned"] < 2 * cut["owned"]
    alone = [found["O3-fp8_sum"]["weights"] for found in seen]
    close = cut["weights"]
    for name, value in alone[0].items():
        torch.testing.assert_close(value, close[name], rtol=0.1, atol=0.03)


def check_one_bad_rank(seen: Seen) -> None:
    for found in seen:
        assert _same(found["before"].values(), found["after"].values())
        assert found["steps"] == {0.0, 2.0}, "a skipped step is not counted, an unused layer at all"


def check_fsdp(seen: Seen) -> None:
    first, second = seen
    assert torch.equal(first["losses"], second["losses"])
    assert torch.equal(first["norms"], second["norms"])
    torch.testing.assert_close(first["losses"], first["expected"], rtol=2e-3, atol=2e-3)
    assert first["losses"][-1] < first["losses"][0]
    for kind in ("weights", "states"):
        assert first["bytes"][kind] < 0.85 * first["whole"][kind]


def check_sequence(seen: Seen) -> None:
    first, second = seen
    whole: Tensor = first["whole"]
    assert torch.equal(first["gathered"], second["gathered"])
    error = (first["gathered"] - whole).square().sum() / whole.square().sum()
    assert float(error) < 1e-3, "30 dB"
    # Weights of both processes are added: 1 x (rank + 1) and 2 x.
    for rank, found in enumerate(seen):
        expected = torch.arange(1.0, 9.0).view(2, 4)[rank] * 3
        torch.testing.assert_close(found["grad"][0, :, 0], expected, rtol=0.13, atol=0)
    # 128 of a process's codes one way, 128 the other, and scales: a quarter of float32's.
    assert first["bytes"] == pytest.approx(2 * 128, rel=0.1)


CHECKS: dict[str, Callable[[Seen], None]] = {
    "reduce_all": check_reduction,
    "broken": check_broken,
    "saturating": check_saturating,
    "levels": check_levels,
    "one_bad_rank": check_one_bad_rank,
    "fsdp": check_fsdp,
    "sequence": check_sequence,
}
