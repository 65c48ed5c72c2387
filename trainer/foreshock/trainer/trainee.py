"""From a configuration to a model that can be trained, on its device and over its processes.

The order is: weights, device, recomputation, sharding, optimizer. The two seams for
other optimizers and other reductions are `make_trainee` and `Gradients`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from foreshock.trainer.checkpoint import load_weights
from foreshock.trainer.compiled import compile_model
from foreshock.trainer.config import RunConfig
from foreshock.trainer.fp8lm import Fp8AdamW
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.master_adamw import keep_in_bfloat16
from foreshock.trainer.model import Decoder
from foreshock.trainer.optimizer import clip_gradients, make_optimizer
from foreshock.trainer.parallel import TensorParallel, cut_model
from foreshock.trainer.precision import Scaling
from foreshock.trainer.recompute import recompute_in_backward
from foreshock.trainer.world import World

__all__ = ["Gradients", "Trainee", "deterministic", "make_trainee"]


class Gradients(Protocol):
    """What becomes of gradients between backward and the optimizer's step."""

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Around one forward and backward; `last` of the step's, after which they are reduced."""

    def reduce(self) -> None:
        """After the last backward: let gradients be the mean over the data-parallel processes."""

    def clip(self, limit: float | None) -> torch.Tensor:
        """Scale them to a global L2 norm of at most `limit`; returns the norm before, 0-dim."""

    def told(self, norm: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What a watch cannot see by itself, after `clip` gave the norm: scalars by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """A model and everything that trains it.

    Attributes:
        model: The decoder itself.
        entry: What is called and watched: the decoder, or its data-parallel wrapper.
        optimizer: Of its parameters.
        gradients: Their reduction and clipping.
        cut: How blocks are cut over processes, if they are.
    """

    model: Decoder
    entry: nn.Module
    optimizer: torch.optim.Optimizer
    gradients: Gradients
    cut: TensorParallel | None = None


def make_trainee(config: RunConfig, world: World) -> Trainee:
    """Make the model of a run and its optimizer; all processes begin with the same weights.

    Raises:
        ValueError: The model cannot be trained like that.
    """
    torch.manual_seed(config.seed)
    model = Decoder(config.model, config.precision)
    if world.tensor_size == 1:
        model.to(world.device)
    if config.initial is not None:
        load_weights(Path(config.initial), model)
    cut = _cut(model, config, world)
    for block in model.blocks:
        if config.execution.recompute:
            recompute_in_backward(block)
    if config.execution.compile:
        compile_model(model)
    if config.states.level != "O0":
        return _at_level(model, config, world)
    if config.states.parameters == "bfloat16":
        keep_in_bfloat16(model)
    if cut is not None:
        optimizer = make_optimizer(model, config.optimizer, config.states)
        held = CutGradients(model, cut)
        return Trainee(model=model, entry=model, optimizer=optimizer, gradients=held, cut=cut)
    entry = _spread(model, config, world)
    optimizer = make_optimizer(model, config.optimizer, config.states)
    gradients = PlainGradients(model, entry, world)
    return Trainee(model=model, entry=entry, optimizer=optimizer, gradients=gradients)


def _cut(model: Decoder, config: RunConfig, world: World) -> TensorParallel | None:
    """Cut the blocks over processes and move what is kept to the device, if the run says so."""
    if world.tensor_size == 1:
        return None
    assert world.mesh is not None
    transport = Transport(world.mesh["tensor"].get_group())
    execution = config.execution
    # Cut on the CPU, so that no device ever holds the whole; scales are agreed on later.
    cut = cut_model(model, transport, sequence=execution.sequence_parallel, form=execution.wire)
    model.to(world.device)
    return cut


def _at_level(model: Decoder, config: RunConfig, world: World) -> Trainee:
    """FP8-LM's levels: the optimizer reduces gradients itself, so that nothing wraps the model."""
    if config.execution.parallel != "ddp" and not world.alone:
        raise ValueError(
            f"states.level {config.states.level} shards and reduces by itself; "
            "execution.parallel is ddp with it"
        )
    optimizer = make_optimizer(model, config.optimizer, config.states, config.communication)
    assert isinstance(optimizer, Fp8AdamW)
    gradients = HeldGradients(model, optimizer, world)
    return Trainee(model=model, entry=model, optimizer=optimizer, gradients=gradients)


def _spread(model: Decoder, config: RunConfig, world: World) -> nn.Module:
    if world.mesh is None or world.data_size == 1:
        return model
    if config.execution.parallel == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=world.mesh["data"])
        fully_shard(model, mesh=world.mesh["data"])
        return model
    # Scales are agreed on by `PlainGradients`, as the maximum over processes, not by rank 0.
    group = world.mesh["data"].get_group()
    return DistributedDataParallel(model, process_group=group, broadcast_buffers=False)


class PlainGradients:
    """Gradients as torch's DDP and FSDP2 reduce them, in float32.

    Args:
        model: Has the parameters.
        entry: Its wrapper, if it has one.
        world: Processes.
    """

    def __init__(self, model: Decoder, entry: nn.Module, world: World) -> None:
        self._model, self._entry, self._world = model, entry, world

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Gradients stay where they are until the last one."""
        if isinstance(self._entry, DistributedDataParallel) and not last:
            return self._entry.no_sync()
        if isinstance(self._entry, FSDPModule):
            self._entry.set_requires_gradient_sync(last)
        return nullcontext()

    def reduce(self) -> None:
        """DDP and FSDP2 did so during backward; what is left are the histories of scales."""
        if not self._world.alone:
            _agree_on_scales(self._model)

    def clip(self, limit: float | None) -> torch.Tensor:
        """As `optimizer.clip_gradients`."""
        return clip_gradients(self._model, limit)

    def told(self, norm: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Nothing: a watch takes the norm of what stands in `.grad`."""
        return {}


class CutGradients:
    """Gradients of a model whose blocks are cut over processes, each with the same data.

    Args:
        model: This process's part.
        cut: What the processes tell each other.
    """

    def __init__(self, model: Decoder, cut: TensorParallel) -> None:
        self._model, self._cut = model, cut

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """Gradients add up where they are."""
        return nullcontext()

    def reduce(self) -> None:
        """Whole parameters that saw a part of the tokens or of the features; scales agree."""
        self._cut.reduce_gradients()

    def clip(self, limit: float | None) -> torch.Tensor:
        """As `optimizer.clip_gradients`, over all processes' pieces."""
        norm = self._cut.gradient_norm()
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self._model.parameters(), limit, norm)
        return norm

    def told(self, norm: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The norm: a watch saw gradients before they were added up."""
        return {"grad_norm": norm}


class HeldGradients:
    """Gradients that an `Fp8AdamW` holds, adds up, reduces and clips.

    Args:
        model: Has the scales of GEMMs.
        optimizer: Holds the gradients.
        world: Processes.
    """

    def __init__(self, model: Decoder, optimizer: Fp8AdamW, world: World) -> None:
        self._model, self._optimizer, self._world = model, optimizer, world

    def micro_batch(self, last: bool) -> AbstractContextManager[object]:
        """The optimizer adds them up by itself."""
        return nullcontext()

    def reduce(self) -> None:
        """The optimizer does so when it clips; what is left are the histories of scales."""
        if not self._world.alone:
            _agree_on_scales(self._model)

    def clip(self, limit: float | None) -> torch.Tensor:
        """As `Fp8AdamW.clip_gradients`."""
        return self._optimizer.clip_gradients(limit)

    def told(self, norm: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The norm, which never stands in `.grad`, and the counts of the reduction."""
        return {"grad_norm": norm, **self._optimizer.exchange.counts()}


def _agree_on_scales(model: nn.Module) -> None:
    """Let delayed scales follow the largest magnitude on any process, as Transformer Engine does.

    Current scales stay each process's own, as there.
    """
    scalings = [m for m in model.modules() if isinstance(m, Scaling)]
    if not scalings:
        return
    histories = torch.cat([s.history.reshape(-1) for s in scalings])
    # Not every backend's maximum keeps NaN; infinity does the same here.
    histories = histories.nan_to_num(nan=torch.inf, posinf=torch.inf)
    dist.all_reduce(histories, op=dist.ReduceOp.MAX)
    scales = torch.stack([s.scale for s in scalings])
    dist.all_reduce(scales, op=dist.ReduceOp.MIN)
    parts = torch.split(histories, [s.history.numel() for s in scalings])
    for scaling, history, scale in zip(scalings, parts, scales, strict=True):
        scaling.adopt(history.view_as(scaling.history), scale)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use only algorithms that repeat bit for bit, inside.

    Raises:
        ValueError: On a CUDA device without CUBLAS_WORKSPACE_CONFIG, which must be set before the
            process starts to use it.
    """
    if not wanted:
        yield
        return
    if torch.cuda.is_available() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise ValueError(
            "execution.deterministic on a CUDA device needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the "
            "environment"
        )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
