"""The processes of a run: which this one is, and what they tell each other.

A process that no launcher started is a world of its own, and every question has its cheap answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from foreshock.trainer.config import ExecutionConfig

__all__ = ["World", "joined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process among those of its run.

    Attributes:
        rank: Of this process, in all.
        size: Processes in all.
        device: Where this process computes.
        data_rank: Which part of each batch is this process's.
        data_size: Into how many parts a batch is cut.
        tensor_rank, tensor_size: Which part of each block, and of how many, is this process's.
        mesh: Processes along "data" and "tensor"; None for a single process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_rank: int = 0
    data_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1

    def part(self, rows: torch.Tensor) -> torch.Tensor:
        """This process's rows of a whole batch, shape (batch / data_size, ...).

        Raises:
            ValueError: The batch does not split.
        """
        if len(rows) % self.data_size:
            raise ValueError(
                f"data.batch_size is {len(rows)}; {self.data_size} processes need a multiple of "
                f"{self.data_size}"
            )
        each = len(rows) // self.data_size
        return rows[self.data_rank * each : (self.data_rank + 1) * each]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, alike on all of them."""
        if self.alone:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Whether any process says so: what one decides, all do."""
        if self.alone:
            return flag
        said = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        return bool(said > 0)


@contextmanager
def joined(config: ExecutionConfig) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; what was joined here is left here.

    A process group that exists already is used and left as it is.

    Raises:
        ValueError: The device is not there, or too few processes or too many.
    """
    device = _device(config)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not dist.is_initialized() and not launched:
        _check_size(config, 1)
        yield World(device=device)
        return
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        _check_size(config, dist.get_world_size())
        yield _world(device, config.tensor_parallel)
    finally:
        if made:
            dist.destroy_process_group()


def _device(config: ExecutionConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "execution.device is cuda and torch sees no CUDA device; "
            "nvidia-smi and `foreshock doctor` say why; execution.device cpu trains without one"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _check_size(config: ExecutionConfig, size: int) -> None:
    wanted = config.tensor_parallel
    if wanted not in (1, size):
        raise ValueError(
            f"execution.tensor_parallel is {wanted} and {size} processes run; start {wanted} "
            f"(torchrun --nproc-per-node {wanted})"
        )


def _world(device: torch.device, tensor: int) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return World(device=device)
    return World(
        rank=rank,
        size=size,
        device=device,
        data_rank=rank // tensor,
        data_size=size // tensor,
        tensor_rank=rank % tensor,
        tensor_size=tensor,
        mesh=init_device_mesh(
            device.type, (size // tensor, tensor), mesh_dim_names=("data", "tensor")
        ),
    )
