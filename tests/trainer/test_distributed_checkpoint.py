"""Runs on two processes stop and go on exactly, and go on alone or the other way round."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from foreshock.trainer.checkpoint import CheckpointError
from foreshock.trainer.config import ExecutionConfig, RunConfig, StatesConfig
from foreshock.trainer.loop import CheckpointPolicy, StepResult, train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.states_config import Level

ROOT = Path(__file__).parents[2]
STOP = 4


def _config(level: Level, parallel: str = "ddp") -> RunConfig:
    execution = ExecutionConfig(parallel=parallel)  # type: ignore[arg-type]
    return replace(
        debug_cpu(seed=5), steps=8, states=StatesConfig(level=level), execution=execution
    )


def _after(seen: Sequence[StepResult]) -> Callable[[], bool]:
    return lambda: len(seen) == STOP


def _two(tmp_path: Path, *arguments: str) -> dict[str, list[list[float]]]:
    """What two processes print: the losses of each of their runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path), *arguments],
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=90) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], told[0][1] + told[1][1]
    first, second = (json.loads(out.strip().splitlines()[-1]) for out, _ in told)
    assert first == second
    found: dict[str, list[list[float]]] = first
    return found


@pytest.mark.parametrize(
    ("parallel", "level"),
    [
        pytest.param("ddp", "O0", marks=pytest.mark.long),
        ("fsdp2", "O0"),
        pytest.param("ddp", "O3", marks=pytest.mark.long),
    ],
)
def test_two_processes_resume_exactly_and_one_goes_on_from_theirs(
    parallel: str, level: Level, tmp_path: Path
) -> None:
    found = _two(tmp_path, parallel, level)
    assert found["half"] + found["resumed"] == found["straight"]
    assert len(found["half"]) == STOP

    policy = CheckpointPolicy(folder=tmp_path / "half", resume=True)
    alone = train(_config(level, parallel), checkpoints=policy)
    assert [s.step for s in alone.steps] == list(range(STOP, 8))
    for step, (loss, norm) in zip(alone.steps, found["resumed"], strict=True):
        assert step.loss == pytest.approx(loss, rel=5e-3)
        assert step.grad_norm == pytest.approx(norm, rel=5e-2)

    with pytest.raises(CheckpointError, match="seed is 5 there and 6 here"):
        train(replace(_config(level, parallel), seed=6), checkpoints=policy)


@pytest.mark.long
def test_two_processes_go_on_from_the_checkpoint_of_one(tmp_path: Path) -> None:
    for level in ("O0", "O3"):
        config, folder = _config(level), tmp_path / level
        seen: list[StepResult] = []
        first = train(
            config,
            on_step=seen.append,
            stop=_after(seen),
            checkpoints=CheckpointPolicy(folder=folder / "half"),
        )
        assert first.ended == "stopped"
        straight = [s.loss for s in train(config).steps][STOP:]
        found = _two(folder, "ddp", level, "resume only")
        assert [loss for loss, _ in found["resumed"]] == pytest.approx(straight, rel=5e-3)


_RANK = """
import json, shutil, sys
from dataclasses import replace
from pathlib import Path
import torch
import torch.distributed as dist
from foreshock.trainer.config import ExecutionConfig, StatesConfig
from foreshock.trainer.loop import CheckpointPolicy, train
from foreshock.trainer.recipes import debug_cpu
torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, parallel, level, *only = Path(sys.argv[1]), *sys.argv[2:]
config = replace(
    debug_cpu(seed=5), steps=8, states=StatesConfig(level=level),
    execution=ExecutionConfig(parallel=parallel),
)
def losses(**options):
    return [(s.loss, s.grad_norm) for s in train(config, **options).steps]
found = {}
if not only:
    found["straight"] = losses()
    seen = []
    found["half"] = losses(
        on_step=seen.append, stop=lambda: len(seen) == 4,
        checkpoints=CheckpointPolicy(folder=folder / "half"),
    )
    if dist.get_rank() == 0:
        shutil.copytree(folder / "half", folder / "again")
    dist.barrier()
    torch.manual_seed(dist.get_rank())
again = folder / ("half" if only else "again")
found["resumed"] = losses(checkpoints=CheckpointPolicy(folder=again, resume=True))
print(json.dumps(found))
"""
