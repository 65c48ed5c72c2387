"""The loop: same config same losses, watched or not; endings; what a watch and a service hear."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from foreshock.trainer.config import ModelConfig, OptimizerConfig, RunConfig
from foreshock.trainer.data import load_corpus
from foreshock.trainer.faults import BadBatch, LearningRateRamp
from foreshock.trainer.loop import StepResult, public_config, train
from foreshock.trainer.recipes import debug_cpu, demo


class Ear:
    """A watch that only listens."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.heard: list[tuple[str, object]] = []

    def log(self, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            assert not isinstance(value, torch.Tensor) or not value.requires_grad
            self.heard.append((name, float(value)))

    def event(self, kind: str, detail: str | None = None) -> None:
        self.heard.append((kind, detail))

    def close(self) -> None:
        self.heard.append(("close", None))


def _losses(config: RunConfig) -> list[float]:
    return [s.loss for s in train(config).steps]


def test_same_config_gives_the_same_losses_bit_for_bit() -> None:
    config = debug_cpu(seed=3)
    assert _losses(config) == _losses(replace(config, name="another-name"))
    assert _losses(config) != _losses(replace(config, seed=4))


def test_it_learns() -> None:
    losses = _losses(replace(debug_cpu(), steps=60))
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert sum(losses[-10:]) / 10 < losses[0] - 1.0


def test_each_step_is_reported_whole() -> None:
    seen: list[StepResult] = []
    result = train(debug_cpu(), on_step=seen.append)
    assert tuple(seen) == result.steps
    assert [s.step for s in seen] == list(range(20))
    assert [s.tokens for s in seen] == [128 * (i + 1) for i in range(20)]
    assert seen[0].learning_rate == pytest.approx(2e-3 / 5)
    assert all(s.grad_norm > 0 and s.seconds > 0 for s in seen)
    assert result.ended == "finished"
    assert result.corpus_sha256 == load_corpus().sha256


def test_watch_hears_every_loss_and_is_closed() -> None:
    ears: list[Ear] = []

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer, first_step: int) -> Ear:
        assert first_step == 0
        ears.append(Ear(model, optimizer))
        return ears[0]

    result = train(debug_cpu(), watch=attach)
    assert ears[0].heard == [("loss", s.loss) for s in result.steps] + [("close", None)]
    assert list(ears[0].model.parameters())


def test_watch_is_closed_when_the_run_breaks() -> None:
    ears: list[Ear] = []

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer, first_step: int) -> Ear:
        assert first_step == 0
        ears.append(Ear(model, optimizer))
        return ears[0]

    def fail(step: StepResult) -> None:
        raise RuntimeError("somebody's callback")

    with pytest.raises(RuntimeError, match="somebody's callback"):
        train(debug_cpu(), watch=attach, on_step=fail)
    assert ears[0].heard[-1] == ("close", None)


def test_nonfinite_loss_is_recorded_before_it_ends_the_run() -> None:
    config = replace(
        debug_cpu(),
        optimizer=OptimizerConfig(learning_rate=2e-3, clip=None),
        fault=LearningRateRamp(start=5, factor=1e30, limit=1e38),
    )
    result = train(config, nonfinite_steps=3)
    bad = [s.step for s in result.steps if not math.isfinite(s.loss)]
    assert result.ended == "nonfinite"
    assert 5 < bad[0] < 10
    assert bad[-3:] == [s.step for s in result.steps[-3:]]
    assert len(result.steps) < 20


def test_stop_ends_in_good_order() -> None:
    taken: list[StepResult] = []
    result = train(debug_cpu(), on_step=taken.append, stop=lambda: len(taken) == 7)
    assert result.ended == "stopped"
    assert len(result.steps) == 7


def test_bad_batch_shows_in_the_loss_and_its_gain_does_not() -> None:
    healthy = replace(debug_cpu(), steps=14)
    plain = replace(healthy, fault=BadBatch(start=12, duration=1))
    weighted = replace(healthy, fault=BadBatch(start=12, duration=1, gain=50.0))
    losses = {name: _losses(c) for name, c in (("h", healthy), ("p", plain), ("w", weighted))}
    assert losses["h"][:12] == losses["p"][:12] == losses["w"][:12]
    assert losses["p"][12] == losses["w"][12] > losses["h"][12]
    norms = [train(c).steps[12].grad_norm for c in (plain, weighted)]
    assert norms[1] > 20 * norms[0]  # not 50: the gradient outgrows the delayed scale


def test_service_never_hears_of_the_fault() -> None:
    failing, healthy = demo(7)
    told = public_config(failing)
    assert "fault" not in told
    assert {k: v for k, v in told.items() if k != "name"} == {
        k: v for k, v in public_config(healthy).items() if k != "name"
    }
    text = json.dumps(told)
    assert "Ramp" not in text
    assert "fault" not in text


def test_text_that_the_vocabulary_does_not_reach_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes([65, 200]) * 100)
    config = replace(
        debug_cpu(),
        model=ModelConfig(width=32, layers=1, heads=2, vocabulary=128),
        data=replace(debug_cpu().data, folder=str(tmp_path)),
    )
    with pytest.raises(ValueError, match=r"holds byte 200, model\.vocabulary is 128"):
        train(config)
