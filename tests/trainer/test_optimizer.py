"""Parameter groups, and clipping that tells the norm before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

from foreshock.monitor import watch
from foreshock.monitor.record import table_to_records
from foreshock.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StatesConfig,
)
from foreshock.trainer.fp8lm import Level
from foreshock.trainer.loop import CheckpointPolicy, Watcher, train
from foreshock.trainer.optimizer import clip_gradients, make_optimizer, set_learning_rate


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def test_gains_and_biases_do_not_decay() -> None:
    model = _model()
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {n: decays[id(p)] for n, p in model.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_settings_reach_the_optimizer() -> None:
    config = OptimizerConfig(learning_rate=0.5, beta1=0.8, beta2=0.7, eps=1e-6)
    optimizer = make_optimizer(_model(), config)
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    assert optimizer.defaults["eps"] == 1e-6
    set_learning_rate(optimizer, 0.25)
    assert {g["lr"] for g in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize(("limit", "after"), [(2.0, 2.0), (10.0, 5.0), (None, 5.0)])
def test_clipping_returns_the_norm_before_it(limit: float | None, after: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(clip_gradients(model, limit)) == pytest.approx(5.0)
    assert float(model.weight.grad.norm()) == pytest.approx(after, rel=1e-4)


def test_a_nonfinite_gradient_shows_in_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[math.nan, 4.0]])
    assert math.isnan(float(clip_gradients(model, 1.0)))


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_a_level_is_part_of_the_config(level: Level, tmp_path: Path) -> None:
    """It trains, is watched with states and weights, and resumes bit for bit."""
    config = RunConfig(
        name="level",
        model=ModelConfig(width=16, layers=1, heads=2),
        data=DataConfig(sequence_length=16, batch_size=2),
        schedule=ScheduleConfig(warmup_steps=2),
        states=StatesConfig(level=level),
        steps=6,
    )
    plain = RunConfig(
        name="level", model=config.model, data=config.data, schedule=config.schedule, steps=6
    )
    assert config.fingerprint() != plain.fingerprint()
    batches: list[pa.RecordBatch] = []

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> Watcher:
        return watch(model, optimizer, run="r", spool=tmp_path / "spool", sinks=[batches.append])

    whole = train(config, watch=attach)
    (record, *others) = table_to_records(pa.Table.from_batches(batches))
    assert [r.scalars["grad_norm"] for r in (record, *others)] == [
        pytest.approx(step.grad_norm) for step in whole.steps
    ]
    roles = {row.identity.role for row in record.tensors}
    expected = {"input", "weight", "grad_output", "exp_avg", "exp_avg_sq", "master_weight"}
    assert roles >= expected | {"grad_reduced"}
    policy = CheckpointPolicy(folder=tmp_path / "a", every=3)
    train(config, checkpoints=policy, stop=_after(3))
    resumed = train(config, checkpoints=replace(policy, resume=True))
    assert [s.loss for s in resumed.steps] == [s.loss for s in whole.steps[3:]]


def _after(steps: int) -> Callable[[], bool]:
    taken = iter(range(steps - 1))
    return lambda: next(taken, None) is None
