"""Checkpoints of runs on several processes: exact resume, on another number of them too.

A folder `step-<number>`: torch.distributed.checkpoint's files, each process writing its own part
(DDP and FSDP2), or at one of FP8-LM's levels, and with tensor parallel, the whole states in one
file; and `about.pt`, which says whose it is. A checkpoint of one process (`checkpoint.py`) can be
read here, and one of these by one process.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.fsdp import FSDPModule

from foreshock.trainer import checkpoint
from foreshock.trainer.checkpoint import CheckpointError, TrainingState
from foreshock.trainer.config import RunConfig
from foreshock.trainer.fp8lm import Fp8AdamW
from foreshock.trainer.parallel import TensorParallel, joined_states, own_states
from foreshock.trainer.world import World

__all__ = ["latest", "load", "save"]

_ABOUT: Final = "about.pt"
_STATES: Final = "states.pt"
_KEPT: Final = 2


def save(
    folder: Path,
    config: RunConfig,
    state: TrainingState,
    next_step: int,
    *,
    entry: nn.Module,
    world: World,
    cut: TensorParallel | None = None,
) -> Path:
    """Write `step-<next_step>` and drop all but the two newest; every process has to call it.

    The folder appears under its name only when all processes have written their parts.

    Args:
        folder: On a file system that all processes see.
        config: The run.
        state: What to save.
        next_step: The first step that is not yet taken.
        entry: The model as it is wrapped.
        world: The processes.
        cut: How blocks are cut over them, if they are.
    """
    path = folder / f"step-{next_step:08d}"
    unfinished = folder / f".{path.name}.part"
    if world.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _wait(world)
    if cut is not None:
        whole = joined_states(
            state.model.state_dict(),
            state.optimizer.state_dict(),
            _names(state),
            cut.cuts,
            cut.whole,
        )
        if world.rank == 0:
            torch.save(whole, unfinished / _STATES)
    elif isinstance(state.optimizer, Fp8AdamW):
        # Weights are alike on every process; of the states each has its part.
        whole = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.full_state_dict(),
        }
        if world.rank == 0:
            torch.save(whole, unfinished / _STATES)
    else:
        model, optimizer = get_state_dict(entry, state.optimizer)
        with _quiet():
            save_parts({"model": model, "optimizer": optimizer}, checkpoint_id=unfinished)
    _wait(world)
    if world.rank == 0:
        about = checkpoint.about(config, state, next_step) | {"processes": world.size}
        torch.save(about, unfinished / _ABOUT)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
        for old in _folders(folder)[:-_KEPT]:
            shutil.rmtree(old)
    _wait(world)
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step of either kind, or None where there is none."""
    files = [*folder.glob("step-*.pt"), *_folders(folder)]
    return max(files, key=lambda path: path.stem, default=None)


def load(
    path: Path,
    config: RunConfig,
    state: TrainingState,
    *,
    entry: nn.Module,
    world: World,
    cut: TensorParallel | None = None,
) -> dict[str, Any]:
    """Restore a run in place; every process has to call it.

    Returns:
        What the checkpoint says of itself, `next_step` among it.

    Raises:
        CheckpointError: It is damaged, or of another run or another text, or of one process and
            the model is sharded.
    """
    if path.suffix == ".pt":
        return _load_file(path, config, state, entry, cut)
    content = checkpoint.read(path / _ABOUT)
    checkpoint.check(path, content, config, state)
    if isinstance(state.optimizer, Fp8AdamW):
        whole = torch.load(path / _STATES, map_location="cpu", weights_only=True)
        state.model.load_state_dict(whole["model"])
        state.optimizer.load_full_state_dict(whole["optimizer"])
    elif (path / _STATES).is_file():
        whole = torch.load(path / _STATES, map_location="cpu", weights_only=True)
        _load_whole(path, whole, state, entry, cut)
    elif cut is not None:
        raise CheckpointError(
            f"{path} is in parts of data-parallel processes; resume it with "
            "execution.tensor_parallel 1"
        )
    else:
        model, optimizer = get_state_dict(entry, state.optimizer)
        held: dict[str, Any] = {"model": model, "optimizer": optimizer}
        with _quiet():
            load_parts(held, checkpoint_id=path)
        set_state_dict(
            entry,
            state.optimizer,
            model_state_dict=held["model"],
            optim_state_dict=held["optimizer"],
        )
    torch.set_rng_state(content["random"])
    return content


def _load_file(
    path: Path,
    config: RunConfig,
    state: TrainingState,
    entry: nn.Module,
    cut: TensorParallel | None,
) -> dict[str, Any]:
    content = checkpoint.read(path)
    checkpoint.check(path, content, config, state)
    _load_whole(path, content, state, entry, cut)
    torch.set_rng_state(content["random"])
    return content


def _load_whole(
    path: Path,
    held: dict[str, Any],
    state: TrainingState,
    entry: nn.Module,
    cut: TensorParallel | None,
) -> None:
    """Whole states into whole, copied or cut ones."""
    if isinstance(entry, FSDPModule):
        raise CheckpointError(
            f"{path} is of one process and execution.parallel is fsdp2; resume it with ddp"
        )
    if cut is not None:
        held = own_states(held, _names(state), cut.cuts, cut.wire.rank)
    state.model.load_state_dict(held["model"])
    if isinstance(state.optimizer, Fp8AdamW):
        state.optimizer.load_full_state_dict(held["optimizer"])
    else:
        state.optimizer.load_state_dict(held["optimizer"])


def _names(state: TrainingState) -> list[str]:
    """Of the parameters, in the order in which the optimizer numbers them."""
    names = {parameter: name for name, parameter in state.model.named_parameters()}
    return [names[p] for group in state.optimizer.param_groups for p in group["params"]]


def _folders(folder: Path) -> list[Path]:
    """Whole checkpoints of this kind, the oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(p for p in found if (p / _ABOUT).is_file())


def _wait(world: World) -> None:
    if not world.alone:
        dist.barrier()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a single process saves or loads alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
