"""Which part of a logical tensor a process holds: the words of DTensor, put for the monitor.

A share adds up over processes; a replica stands in the record once, and its peers are compared with
it. Measures nothing.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Final

import torch

from foreshock.monitor.operands import KeptAsCodes, Part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = ["PLAIN", "WHOLE", "Part", "is_batched", "local_of", "part_of", "replicas"]


WHOLE: Final = Part()


def part_of(x: torch.Tensor) -> tuple[torch.Tensor, Part] | None:
    """The local piece of a tensor and what it stands for.

    Plain tensors are whole, and so is what `KeptAsCodes` stands for. None where nothing can be
    said: a sum that is still to be reduced, another subclass than DTensor (nested tensors), a
    tensor inside of `torch.vmap`, or no dense floating numbers.
    """
    if not (x.is_floating_point() and x.layout is torch.strided) or x.is_meta:
        return None
    if is_batched(x):
        return None
    if type(x) in PLAIN:
        return x, WHOLE
    if not _is_dtensor(x):
        return (x.plain(), WHOLE) if isinstance(x, KeptAsCodes) else None
    local = x.to_local()
    local = local.plain() if isinstance(local, KeptAsCodes) else local
    if type(local) not in PLAIN or any(placement.is_partial() for placement in x.placements):
        return None
    return local, _part(x)


def is_batched(x: torch.Tensor) -> bool:
    """Whether `torch.vmap` is at work: the tensor holds more than it shows."""
    if not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return torch._C._functorch.is_batchedtensor(x)


def local_of(x: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: the tensor itself, or a DTensor's piece."""
    return x.to_local() if _is_dtensor(x) else x


def replicas(parameter: torch.Tensor) -> float | None:
    """How many processes hold the same piece of a DTensor; None for a plain tensor.

    A plain parameter that was cut by hand says so (`operands.held_by`), or a framework has marked
    it: Megatron with `tensor_model_parallel`, a piece of its own: 1.
    """
    if not _is_dtensor(parameter):
        told: int | None = getattr(parameter, "held_by_processes", None)
        if told is not None:
            return float(told)
        return 1.0 if getattr(parameter, "tensor_model_parallel", False) else None
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return float(math.prod(size for size, placement in sizes if placement.is_replicate()))


PLAIN: Final = (torch.Tensor, torch.nn.Parameter)
"""Types of tensors that hold their own numbers, and all of them."""


def _is_dtensor(x: torch.Tensor) -> TypeIs[DTensor]:
    # A process that never loaded the class has none; loading it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _part(x: DTensor) -> Part:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    coordinate = x.device_mesh.get_coordinate()
    placements = x.placements
    if coordinate is None:
        return Part(counted=False)
    counted = all(
        place == 0
        for place, placement in zip(coordinate, placements, strict=True)
        if placement.is_replicate()
    )
    sharded = any(placement.is_shard() for placement in placements)
    _, offsets = compute_local_shape_and_global_offset(x.shape, x.device_mesh, placements)
    last = x.ndim - 1
    by_feature = any(placement.is_shard(last) for placement in placements)
    if x.ndim == 0 or not by_feature:
        return Part(counted=counted, sharded=sharded)
    return Part(counted, int(offsets[last]), int(x.shape[last]), sharded)
