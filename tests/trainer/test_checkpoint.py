"""Checkpoints: exact resume with delayed scaling, and clear refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foreshock.trainer import checkpoint
from foreshock.trainer.checkpoint import CheckpointError
from foreshock.trainer.config import OptimizerConfig, PrecisionConfig, RunConfig
from foreshock.trainer.faults import Fault, OutlierRamp, ScaleFault
from foreshock.trainer.loop import CheckpointPolicy, RunResult, StepResult, train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.states_config import Level, StatesConfig

DELAYED = PrecisionConfig(backend="emulated", scaling="delayed", history=4)


def _values(result: RunResult) -> list[tuple[float, float, int]]:
    return [(s.loss, s.grad_norm, s.tokens) for s in result.steps]


def _half(config: RunConfig, folder: Path) -> RunResult:
    taken: list[StepResult] = []
    return train(
        config,
        on_step=taken.append,
        stop=lambda: len(taken) == 10,
        checkpoints=CheckpointPolicy(folder=folder, every=1000),
    )


@pytest.mark.parametrize(
    "fault",
    [
        None,
        ScaleFault(start=6, growth=1.2),
        OutlierRamp(start=7, layer="blocks.1.mlp.down", growth=2.0, history=1),
    ],
)
def test_ten_and_ten_resumed_steps_equal_twenty_straight_ones(
    fault: Fault | None, tmp_path: Path
) -> None:
    config = replace(debug_cpu(), precision=DELAYED, fault=fault)
    straight = train(config)
    first = _half(config, tmp_path)
    torch.manual_seed(999)  # whatever the process did in between must not matter
    second = train(config, checkpoints=CheckpointPolicy(folder=tmp_path, resume=True))
    assert first.ended == "stopped"
    assert second.steps[0].step == 10
    assert _values(first) + _values(second) == _values(straight)


def test_without_resume_a_run_starts_anew(tmp_path: Path) -> None:
    _half(debug_cpu(), tmp_path)
    again = train(debug_cpu(), checkpoints=CheckpointPolicy(folder=tmp_path))
    assert again.steps[0].step == 0


def test_resuming_a_finished_run_takes_no_step(tmp_path: Path) -> None:
    train(debug_cpu(), checkpoints=CheckpointPolicy(folder=tmp_path))
    again = train(debug_cpu(), checkpoints=CheckpointPolicy(folder=tmp_path, resume=True))
    assert again.steps == ()
    assert again.ended == "finished"


def test_two_newest_are_kept_and_nothing_unfinished(tmp_path: Path) -> None:
    train(debug_cpu(), checkpoints=CheckpointPolicy(folder=tmp_path, every=6))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000018.pt", "step-00000020.pt"]


def test_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    _half(debug_cpu(), tmp_path)
    other = replace(debug_cpu(), optimizer=OptimizerConfig(learning_rate=0.5))
    policy = CheckpointPolicy(folder=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"learning_rate is 0\.002 there and 0\.5 here"):
        train(other, checkpoints=policy)
    renamed = train(replace(debug_cpu(), name="other-name"), checkpoints=policy)
    assert renamed.steps[0].step == 10


def test_a_field_that_an_old_checkpoint_does_not_know_is_named(tmp_path: Path) -> None:
    _half(debug_cpu(), tmp_path)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    content = torch.load(path, weights_only=True)
    del content["config"]["states"]
    torch.save(content, path)
    other = replace(debug_cpu(), states=StatesConfig(level="O2"))
    with pytest.raises(CheckpointError, match=r"states\.level is 'O0' there and 'O2' here"):
        train(other, checkpoints=CheckpointPolicy(folder=tmp_path, resume=True))


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_codes_and_scales_of_narrow_states_resume_exactly(level: Level, tmp_path: Path) -> None:
    config = replace(debug_cpu(), states=StatesConfig(level=level))
    whole = train(config)
    _half(config, tmp_path)
    rest = train(config, checkpoints=CheckpointPolicy(folder=tmp_path, resume=True))
    assert _values(rest) == _values(whole)[10:]


def test_another_text_is_refused(tmp_path: Path) -> None:
    text, folder = tmp_path / "text", tmp_path / "checkpoints"
    text.mkdir()
    (text / "a.txt").write_text("some text to read " * 100)
    config = replace(debug_cpu(), data=replace(debug_cpu().data, folder=str(text)))
    _half(config, folder)
    (text / "a.txt").write_text("some other text to read " * 100)
    with pytest.raises(CheckpointError, match="trained on another text"):
        train(config, checkpoints=CheckpointPolicy(folder=folder, resume=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_file_is_refused_by_name(share: float, tmp_path: Path) -> None:
    _half(debug_cpu(), tmp_path)
    path = checkpoint.latest(tmp_path)
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"step-00000010\.pt is not a whole checkpoint"):
        train(debug_cpu(), checkpoints=CheckpointPolicy(folder=tmp_path, resume=True))


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "step-00000003.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        train(debug_cpu(), checkpoints=CheckpointPolicy(folder=tmp_path, resume=True))


def test_zero_steps_between_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every is 0"):
        CheckpointPolicy(folder=tmp_path, every=0)
