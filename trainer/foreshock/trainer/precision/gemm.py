"""The matrix product of low-precision operands, as fast as the processor allows.

Knows no scales and no FP8: its operands are bfloat16 numbers, whatever they stand for.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["gemm", "gemm_in_float32"]


def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


# Without such instructions torch's bfloat16 product is 3 (AVX-512) to 45 times (AVX2) slower than
# the float32 one.
_FAST_ON_CPU: Final = _cpu_multiplies_bfloat16()


def gemm(a: Tensor, b: Tensor) -> Tensor:
    """Product of bfloat16 matrices, summed in float32, result rounded to bfloat16.

    Args:
        a: Shape (*lead, N, K).
        b: Shape (*lead, K, M).
    """
    return a @ b if _FAST_ON_CPU or not a.is_cpu else gemm_in_float32(a, b)


def gemm_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """As `gemm`, on processors without bfloat16 instructions."""
    return (a.float() @ b.float()).to(a.dtype)
