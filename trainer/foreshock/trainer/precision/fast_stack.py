"""Where the Triton kernels of a stack can take over from torch's operations.

They give the same bits, in one pass each; anywhere else torch's own operations do the work.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["stack_kernels_for"]


def stack_kernels_for(x: Tensor, lead: int) -> ModuleType | None:
    """`stack_kernels` for a tensor of a stack of models on a CUDA device; None where it cannot be.

    Args:
        x: Shape (*lead, ...).
        lead: Number of leading axes that hold models.
    """
    if not x.is_cuda or lead != 1 or not x[0].is_contiguous():
        return None
    if x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _kernels()


@functools.cache
def _kernels() -> ModuleType | None:
    # It comes with torch's CUDA builds, but not on every platform.
    if importlib.util.find_spec("triton") is None:
        return None
    from foreshock.trainer.precision import stack_kernels

    return stack_kernels
