"""torchao's Float8Linear, emulated: formats, granularity and scales of every operand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from tests.monitor.models import Recorder, row

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def float8() -> Any:
    return pytest.importorskip("torchao.float8")


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(20):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def converted(float8: Any, config: Any) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32))
    float8.convert_to_float8_training(model, config=config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def config_of(float8: Any, recipe: str) -> Any:
    config = float8.Float8LinearConfig
    if recipe == "rounded":
        return config(emulate=True, round_scales_to_power_of_2=True)
    if recipe == "forward_in_high_precision":
        off = float8.CastConfig(scaling_type=float8.ScalingType.DISABLED)
        on = float8.CastConfig(target_dtype=torch.float8_e4m3fn)
        return config(
            emulate=True,
            cast_config_input=replace(off, target_dtype=torch.float8_e4m3fn),
            cast_config_weight=replace(off, target_dtype=torch.float8_e4m3fn),
            cast_config_input_for_grad_weight=on,
            cast_config_weight_for_grad_input=on,
        )
    return replace(config.from_recipe_name(recipe), emulate=True)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("tensorwise", [("e4m3", "tensor"), ("e4m3", "tensor"), ("e5m2", "tensor")]),
        ("rounded", [("e4m3", "tensor"), ("e4m3", "tensor"), ("e5m2", "tensor")]),
        ("rowwise", [("e4m3", "row")] * 3),
        ("rowwise_with_gw_hp", [("e4m3", "row"), ("e4m3", "row"), ("e4m3", "row")]),
        (
            "forward_in_high_precision",
            [("fp32", "tensor"), ("fp32", "tensor"), ("e5m2", "tensor")],
        ),
    ],
)
def test_operands_as_the_config_casts_them(
    float8: Any,
    recipe: str,
    expected: list[tuple[str, str]],
    start: Callable[..., Watch],
    recorder: Recorder,
) -> None:
    alone = train(*converted(float8, config_of(float8, recipe)))
    model, optimizer = converted(float8, config_of(float8, recipe))
    seen: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].detach().clone())
        weights.append(module.get_parameter("weight").detach().clone())

    with start(model, optimizer):
        model[3].register_forward_pre_hook(keep)
        assert train(model, optimizer) == alone
    records = recorder.records
    assert [r.step for r in records] == list(range(20))
    for record, x, weight in zip(records, seen, weights, strict=True):
        rows = [row(record, "3", role) for role in ("input", "weight", "grad_output")]
        assert [(t.identity.format, t.identity.granularity) for t in rows] == expected
        assert rows[0].amax == x.abs().max()
        assert rows[1].amax == weight.abs().max()
        if recipe in ("tensorwise", "rounded"):
            for found, tensor in zip(rows, (x, weight), strict=False):
                scale = own_scale(tensor, rounded=recipe == "rounded")
                assert found.scale_log2 == pytest.approx(math.log2(scale), abs=1e-6)


def own_scale(x: torch.Tensor, *, rounded: bool) -> float:
    from torchao.float8.float8_utils import tensor_to_scale

    return float(tensor_to_scale(x, torch.float8_e4m3fn, round_scales_to_power_of_2=rounded))
