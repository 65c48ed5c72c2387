"""Checkpoints: written whole or not at all, resumed exactly or refused with the reason.

They hold tensors and plain data only (`weights_only` loads them); model code is not pickled.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from foreshock.trainer.config import RunConfig

__all__ = [
    "CheckpointError",
    "Resumed",
    "TrainingState",
    "about",
    "check",
    "latest",
    "load",
    "load_weights",
    "read",
    "save",
]

_FORMAT: Final = 1
_KEPT: Final = 2


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed: another run's, another text's, or damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The living parts of a run that a checkpoint saves and restores.

    Attributes:
        model: Weights, and the scales and amax histories in its buffers.
        optimizer: Moments and step counts.
        corpus_sha256: Text the run reads.
        skipped: Steps of data that were left out so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    corpus_sha256: str
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        next_step: The first step that is not yet taken.
        skipped: Steps of data that were left out before it.
    """

    next_step: int
    skipped: int

    @classmethod
    def of(cls, content: dict[str, Any]) -> Resumed:
        """From what a checkpoint says of itself."""
        # Those written before data could be skipped have skipped none.
        return cls(int(content["next_step"]), int(content.get("skipped", 0)))


def save(folder: Path, config: RunConfig, state: TrainingState, next_step: int) -> Path:
    """Write `step-<next_step>.pt` and drop all but the two newest checkpoints of the folder.

    The file appears under its name only when it is whole and on the disk.

    Args:
        folder: Made when it is missing.
        config: The run; its fingerprint is what `load` compares.
        state: What to save.
        next_step: The first step that is not yet taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{next_step:08d}.pt"
    content = about(config, state, next_step) | {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    with unfinished.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)
    for old in sorted(folder.glob("step-*.pt"))[:-_KEPT]:
        old.unlink()
    return path


def about(config: RunConfig, state: TrainingState, next_step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: whose it is and where it goes on."""
    return {
        "format": _FORMAT,
        "fingerprint": config.fingerprint(),
        "config": config.as_dict(),
        "corpus_sha256": state.corpus_sha256,
        "next_step": next_step,
        "skipped": state.skipped,
        "random": torch.get_rng_state(),
    }


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, or None where there is none."""
    return max(folder.glob("step-*.pt"), default=None)


def load(path: Path, config: RunConfig, state: TrainingState) -> Resumed:
    """Restore a run in place and say where it goes on.

    Raises:
        CheckpointError: The file is damaged, or of another run or another text.
    """
    content = read(path)
    check(path, content, config, state)
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random"])
    return Resumed.of(content)


def load_weights(path: Path, model: nn.Module) -> None:
    """Take the weights of another run's checkpoint, and its scales where the layers have them.

    Args:
        path: A file of one process.
        model: Of the same sizes and architecture; the precision may differ.

    Raises:
        CheckpointError: The file is not there or no checkpoint, or its model is another.
    """
    if not path.is_file():
        raise CheckpointError(f"initial is {str(path)!r}, which is not a file; give a step-*.pt")
    held = read(path)["model"]
    own = dict(model.named_parameters())
    different = [name for name in own if name not in held or held[name].shape != own[name].shape]
    if different:
        raise CheckpointError(f"{path} is of another model: {', '.join(different[:3])} differ")
    buffers = dict(model.named_buffers())
    fits = {n: x for n, x in held.items() if n in own or _alike(buffers.get(n), x)}
    model.load_state_dict(fits, strict=False)


def _alike(own: torch.Tensor | None, held: object) -> bool:
    return own is not None and isinstance(held, torch.Tensor) and own.shape == held.shape


def check(path: Path, content: dict[str, Any], config: RunConfig, state: TrainingState) -> None:
    """Refuse a checkpoint of another run or another text.

    Raises:
        CheckpointError: It is.
    """
    if content["fingerprint"] != config.fingerprint():
        raise CheckpointError(f"{path} is of another run: {_difference(content, config)}")
    if content["corpus_sha256"] != state.corpus_sha256:
        raise CheckpointError(
            f"{path} was trained on another text (sha256 {content['corpus_sha256'][:12]}, here "
            f"{state.corpus_sha256[:12]}); resume with the same data.folder or Python version"
        )


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's file, on the CPU.

    Raises:
        CheckpointError: It is damaged, or not one.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint; delete it to resume from the one before"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of foreshock")
    return content


def _difference(content: dict[str, Any], config: RunConfig) -> str:
    """Which fields differ, as `field: theirs, here ours`."""
    theirs, ours = _flat(content["config"]), _flat(config.as_dict())
    # A field that is missing there came later, and stands at its default for that run.
    theirs = _flat(RunConfig(name="").as_dict()) | theirs
    told = [f for f in theirs if f.split(".")[0] not in ("name", "execution", "evaluation")]
    fields = [f for f in told if theirs[f] != ours.get(f)]
    listed = [f"{f} is {theirs.get(f)!r} there and {ours.get(f)!r} here" for f in sorted(fields)]
    return "; ".join(listed) or "the kind of fault differs"


def _flat(values: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(values, dict):
        return {prefix: values}
    pairs: dict[str, object] = {}
    for key, value in values.items():
        pairs |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return pairs
