"""How a run is computed changes its losses by rounding alone, or not at all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foreshock.trainer.config import (
    DataConfig,
    EvaluationConfig,
    ExecutionConfig,
    PrecisionConfig,
    RunConfig,
    StatesConfig,
)
from foreshock.trainer.data import batch, corpus_of, held_out_batch
from foreshock.trainer.loop import StepResult, train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.states_config import Level
from foreshock.trainer.trainee import make_trainee
from foreshock.trainer.world import World

ROOT = Path(__file__).parents[2]
CONFIG = replace(debug_cpu(seed=5), steps=8)
BF16 = replace(CONFIG, precision=PrecisionConfig(backend="bf16"))


def _seen(config: RunConfig) -> list[tuple[float, float]]:
    return [(s.loss, s.grad_norm) for s in train(config).steps]


def test_micro_batches_give_the_losses_of_the_whole_batch() -> None:
    whole = _seen(BF16)
    parts = _seen(replace(BF16, data=replace(BF16.data, micro_batches=4)))
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=2e-3)
    assert parts != whole


def test_micro_batches_add_up_where_the_optimizer_holds_the_gradients() -> None:
    level = replace(BF16, states=StatesConfig(level="O2", accumulate="fp32"))
    whole = _seen(level)
    parts = _seen(replace(level, data=replace(level.data, micro_batches=4)))
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=1e-2)
    assert parts != whole


def test_recomputation_changes_no_bit_and_no_scale_history() -> None:
    # With delayed scales: a history that saw a tensor twice would change the next scale.
    again = replace(CONFIG, execution=ExecutionConfig(recompute=True))
    assert _seen(again) == _seen(CONFIG)


def test_deterministic_mode_holds_for_the_run_alone() -> None:
    inside: list[bool] = []

    def look(step: StepResult) -> None:
        inside.append(torch.are_deterministic_algorithms_enabled())

    train(replace(CONFIG, steps=2, execution=ExecutionConfig(deterministic=True)), on_step=look)
    assert inside == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"execution\.device is cuda .* sees no CUDA device"):
        train(replace(CONFIG, execution=ExecutionConfig(device="cuda")))


def test_execution_and_evaluation_are_no_part_of_a_fingerprint() -> None:
    held = replace(CONFIG, data=replace(CONFIG.data, held_out=0.1))
    looked = replace(
        held, execution=ExecutionConfig(recompute=True), evaluation=EvaluationConfig(every=2)
    )
    assert looked.fingerprint() == held.fingerprint() != CONFIG.fingerprint()


def test_evaluation_is_reported_and_changes_no_loss() -> None:
    held = replace(CONFIG, data=replace(CONFIG.data, held_out=0.1))
    looked = train(replace(held, evaluation=EvaluationConfig(every=4, batches=2)))
    assert [(s.loss, s.grad_norm) for s in looked.steps] == _seen(held)
    assert [s.step for s in looked.steps if s.eval_loss is not None] == [3, 7]


def test_training_never_draws_what_is_held_out(tmp_path: Path) -> None:
    # Two bytes number a place, none of them zero: no row of 17 bytes occurs twice.
    numbers = [i for i in range(0x0101, 0x7000) if i & 0xFF]
    text = b"".join(i.to_bytes(2, "big") for i in numbers)
    (tmp_path / "a.txt").write_bytes(text)
    config = DataConfig(folder=str(tmp_path), sequence_length=16, batch_size=64, held_out=0.25)
    corpus = corpus_of(config)
    kept = {
        bytes(row.byte().numpy()) for n in range(8) for row in held_out_batch(corpus, config, n)
    }
    drawn = {bytes(row.byte().numpy()) for s in range(80) for row in batch(corpus, config, 0, s)}
    places = torch.zeros(len(text), dtype=torch.bool)
    for row in kept:
        at = text.index(row)
        places[at : at + 17] = True
    hit = sum(bool(places[(at := text.index(row)) : at + 17].any()) for row in drawn)
    assert len(kept) > 200
    assert hit == 0


def test_levels_refuse_what_would_reduce_twice() -> None:
    config = replace(
        CONFIG, states=StatesConfig(level="O2"), execution=ExecutionConfig(parallel="fsdp2")
    )
    with pytest.raises(ValueError, match=r"states\.level O2 shards and reduces by itself"):
        make_trainee(config, World(rank=0, size=2, data_size=2))


@pytest.mark.parametrize(
    ("parallel", "level"),
    [
        ("ddp", "O0"),
        pytest.param("fsdp2", "O0", marks=pytest.mark.long),
        pytest.param("ddp", "O2", marks=pytest.mark.long),
        ("ddp", "O3"),
    ],
)
def test_two_processes_give_the_losses_of_one(parallel: str, level: Level, tmp_path: Path) -> None:
    alone = train(replace(CONFIG, states=StatesConfig(level=level)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, parallel, level, str(tmp_path / str(rank))],
            env=os.environ
            | shared
            | {"RANK": str(rank), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert first == second, "both know the loss of all"
    for (loss, norm), step in zip(first, alone.steps, strict=True):
        assert loss == pytest.approx(step.loss, rel=5e-3)
        assert norm == pytest.approx(step.grad_norm, rel=5e-2)


_RANK = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from foreshock.trainer.config import ExecutionConfig, StatesConfig
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
torch.set_num_threads(1)
execution, states = ExecutionConfig(parallel=sys.argv[1]), StatesConfig(level=sys.argv[2])
config = replace(debug_cpu(seed=5), steps=8, execution=execution, states=states)
seen = [(s.loss, s.grad_norm) for s in train(config).steps]
Path(sys.argv[3]).write_text(json.dumps(seen))
"""
