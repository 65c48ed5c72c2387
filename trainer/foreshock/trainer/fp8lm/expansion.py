"""Dynamic range expansion: FP8 for tensors that span more, or fewer, octaves than FP8 does.

COAT (Xi et al., "COAT: Compressing Optimizer States and Activation for Memory-Efficient FP8
Training", ICLR 2025), section 4: f(x) = sign(x) |x|^k per block, k chosen so that the block's range
fills that of E4M3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from foreshock.trainer.fp8lm.scaled import cast

__all__ = ["Expanded", "expand"]

_LARGEST: Final = 448.0
_OCTAVES: Final = math.log2(_LARGEST**2 / 2)
_STEP: Final = 16
_MOST: Final = 16.0


@dataclass(frozen=True, slots=True)
class Expanded:
    """E4M3 codes of |x / centre|^exponent / scale, with the sign of x.

    Attributes:
        codes: Flat E4M3.
        exponent, centre, scale: k, c and the scale of each block, float32.
        block: Elements per block.
        shape: Of the tensor.
    """

    codes: Tensor
    exponent: Tensor
    centre: Tensor
    scale: Tensor
    block: int
    shape: torch.Size

    def values(self) -> Tensor:
        """float32, in the tensor's shape: c (|code| scale)^(1/k)."""
        size = self.codes.numel()
        flat = torch.nn.functional.pad(self.codes.float(), (0, -size % self.block))
        blocks = flat.view(-1, self.block)
        magnitude = (blocks.abs() * self.scale[:, None]) ** (1 / self.exponent[:, None])
        return (blocks.sign() * magnitude * self.centre[:, None]).view(-1)[:size].view(self.shape)


def expand(x: Tensor, block: int) -> Expanded:
    """Encode with k = floor_1/16(log2(448^2 / 2) / log2(max / min)), c = sqrt(max min).

    max and min are the largest and the smallest non-zero magnitude of a block; its zeros stay zero
    and nothing else becomes one. k stays within [1/16, 16]; a block without range, or of zeros, has
    the largest k, or k = c = 1.
    """
    flat = x.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    magnitude = blocks.abs()
    largest = magnitude.amax(1)
    smallest = torch.where(magnitude > 0, magnitude, math.inf).amin(1)
    some = largest > 0
    largest, smallest = (torch.where(some, e, 1.0) for e in (largest, smallest))
    octaves = largest.log2() - smallest.log2()
    exponent = ((_OCTAVES / octaves) * _STEP).floor() / _STEP
    exponent = torch.where(some, exponent.clamp(1 / _STEP, _MOST), 1.0)
    # The root of each, since the product may leave float32's range.
    centre = largest.sqrt() * smallest.sqrt()
    scale = (largest / centre) ** exponent / _LARGEST
    powers = (magnitude / centre[:, None]) ** exponent[:, None]
    codes = cast(blocks.sign() * powers / scale[:, None], "e4m3").view(-1)[: flat.numel()].clone()
    return Expanded(codes, exponent, centre, scale, block, x.shape)
