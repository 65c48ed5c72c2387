"""The learning rate of every step, worked out by hand."""

from __future__ import annotations

import pytest

from foreshock.trainer.config import OptimizerConfig, RunConfig, ScheduleConfig
from foreshock.trainer.faults import LearningRateRamp
from foreshock.trainer.schedule import learning_rate


def _run(fault: LearningRateRamp | None = None, **schedule: float) -> RunConfig:
    return RunConfig(
        name="run",
        steps=100,
        optimizer=OptimizerConfig(learning_rate=0.1),
        schedule=ScheduleConfig(**schedule),  # type: ignore[arg-type]
        fault=fault,
    )


def test_warmup_is_linear_and_never_zero() -> None:
    rates = [learning_rate(_run(warmup_steps=10), s) for s in range(12)]
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert rates[9:] == pytest.approx([0.1, 0.1, 0.1])


def test_no_warmup_and_no_decay_is_constant() -> None:
    assert {learning_rate(_run(warmup_steps=0), s) for s in range(100)} == {0.1}


def test_decay_is_one_minus_square_root() -> None:
    config = _run(warmup_steps=0, decay_share=0.25)
    assert learning_rate(config, 75) == pytest.approx(0.1)
    assert learning_rate(config, 76) == pytest.approx(0.1 * (1 - 0.2))
    assert learning_rate(config, 91) == pytest.approx(0.1 * (1 - 0.8))
    assert learning_rate(config, 99) > 0


def test_ramp_multiplies_from_its_start_up_to_its_limit() -> None:
    config = _run(LearningRateRamp(start=20, factor=2.0, limit=50.0), warmup_steps=0)
    assert learning_rate(config, 19) == pytest.approx(0.1)
    assert learning_rate(config, 20) == pytest.approx(0.2)
    assert learning_rate(config, 24) == pytest.approx(3.2)
    assert learning_rate(config, 90) == pytest.approx(5.0)
