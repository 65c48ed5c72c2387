"""Casts with many scales: one per row, per block of a row, or per square of a weight.

Every GEMM contracts the last axis of both its operands here, and blocks lie along it. As in
`foreshock.monitor.blocks`, whose what-if figures these casts agree with, scales come from the
largest finite magnitude that they cover; a block of zeros has scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from foreshock.monitor.formats import FORMATS
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.cast import saturating_cast

__all__ = ["BlockFormat", "BlockTensor", "block_cast", "hadamard", "round_e2m1"]

HADAMARD_SIZE: Final = 16
_BIAS: Final = 127
_NVFP4_LARGEST: Final = FORMATS["nvfp4"].largest
_E4M3_LARGEST: Final = FORMATS["e4m3"].largest


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """What an operand is cast to.

    Attributes:
        name: In `foreshock.monitor.formats.FORMATS`.
        element: e4m3, e5m2 or e2m1.
        size: Elements of a row that share a scale; None for the whole row.
        rows: Rows that share it.
        power_of_two: Round scales down to powers of two (E8M0).
    """

    name: str
    element: str
    size: int | None
    rows: int = 1
    power_of_two: bool = False

    @classmethod
    def of(cls, recipe: PrecisionConfig, role: str) -> BlockFormat:
        """The format of the operand `role` (input, weight, grad_output) under a recipe."""
        if recipe.scaling == "rowwise":
            name = recipe.gradient_format if role == "grad_output" else recipe.forward_format
            return cls(name=name, element=name, size=None)
        if recipe.scaling == "mxfp8":
            return cls(name="mxfp8_e4m3", element="e4m3", size=32, power_of_two=True)
        if recipe.scaling == "nvfp4":
            return cls(name="nvfp4", element="e2m1", size=16)
        if recipe.scaling == "block128":
            rows = 128 if role == "weight" else 1
            power = recipe.block_scales == "power_of_two"
            return cls(
                name="block128_e4m3", element="e4m3", size=128, rows=rows, power_of_two=power
            )
        raise ValueError(f"scaling {recipe.scaling} has one scale per tensor, none per block")

    @property
    def granularity(self) -> str:
        """As records name it."""
        return "row" if self.size is None else "block"


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A matrix after its cast.

    Attributes:
        codes: Shape (*lead, R, C): float8, or the numbers of E2M1 in float32.
        inverse: What a block's codes are multiplied by, float32 (*lead, row blocks, blocks).
        format: Of the cast.
    """

    codes: Tensor
    inverse: Tensor
    format: BlockFormat

    def values(self) -> Tensor:
        """What the cast left, float32 of the shape of the codes."""
        rows, columns = self.codes.shape[-2:]
        blocks = self.inverse
        if self.format.rows > 1:
            blocks = blocks.repeat_interleave(self.format.rows, -2)[..., :rows, :]
        if self.format.size is not None:
            blocks = blocks.repeat_interleave(self.format.size, -1)[..., :columns]
        return self.codes.float() * blocks


def block_cast(x: Tensor, to: BlockFormat, *, chance: torch.Generator | None = None) -> BlockTensor:
    """Cast a matrix with scales along its last axis.

    NaN stays NaN; infinities and what a scale leaves above the largest value saturate.

    Args:
        x: Shape (*lead, R, C).
        to: The format.
        chance: Round E2M1 up or down by chance, drawn from here; None rounds to nearest even.
    """
    x = x.float()
    rows, columns = x.shape[-2:]
    size = columns if to.size is None else to.size
    padded = functional.pad(x, (0, -columns % size, 0, -rows % to.rows))
    height, width = padded.shape[-2] // to.rows, padded.shape[-1] // size
    grid = padded.reshape(*x.shape[:-2], height, to.rows, width, size)
    # (*lead, row blocks, rows, blocks, size)
    magnitude = grid.abs().nan_to_num(0.0, 0.0, 0.0)
    amax = magnitude.amax((-3, -1))
    if to.element == "e2m1":
        scale, inverse = _nvfp4_scales(amax)
    elif to.power_of_two:
        scale = _power_of_two(amax)
        inverse = scale.reciprocal()
    else:
        scale = _exact(amax, FORMATS[to.element].largest)
        inverse = scale.reciprocal()
    scaled = grid * scale[..., :, None, :, None]
    if to.element == "e2m1":
        codes = round_e2m1(scaled, chance)
    else:
        one = torch.ones((), device=x.device)
        codes = saturating_cast(scaled, one, to.element)
    flat = codes.flatten(-2).flatten(-3, -2)
    return BlockTensor(flat[..., :rows, :columns], inverse, to)


def round_e2m1(x: Tensor, chance: torch.Generator | None = None) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, float32; ties to even.

    Args:
        x: Already scaled; magnitudes above 6 become 6.
        chance: Round to either neighbour with the probability that makes the mean right.
    """
    magnitude = x.abs().clamp(max=_NVFP4_LARGEST)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    if chance is None:
        whole = (magnitude / step).round()
    else:
        drawn = torch.rand(x.shape, generator=chance, device=chance.device).to(x.device)
        whole = (magnitude / step + drawn).floor()
    return torch.where(x.isnan(), x, (whole * step).copysign(x))


def hadamard(x: Tensor, seed: int) -> Tensor:
    """Mix each 16 rows by a Hadamard matrix with random signs; the transform is orthonormal.

    Both operands of a product that contracts the rows, so mixed, give the same product.

    Args:
        x: Shape (*lead, N, C); N is padded with zeros to a multiple of 16.
        seed: Of the signs.

    Returns:
        Shape (*lead, padded N, C).
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < HADAMARD_SIZE:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    drawn = torch.randint(0, 2, (HADAMARD_SIZE,), generator=torch.Generator().manual_seed(seed))
    mix = matrix * (2.0 * drawn - 1.0) / HADAMARD_SIZE**0.5
    padded = functional.pad(x.float(), (0, 0, 0, -x.shape[-2] % HADAMARD_SIZE))
    groups = padded.reshape(*x.shape[:-2], -1, HADAMARD_SIZE, x.shape[-1])
    mixed: Tensor = mix.to(x.device) @ groups
    return mixed.flatten(-3, -2)


def _exact(amax: Tensor, largest: float) -> Tensor:
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(amax > 0, scale, 1.0)


def _power_of_two(amax: Tensor) -> Tensor:
    """The largest power of two, at most 2^127, that keeps amax within 448."""
    # frexp reads the exponent without rounding: log2 can be off by one at a power of two.
    exponent = torch.frexp(_E4M3_LARGEST / amax.clamp(min=2.0**-118)).exponent - 1
    scale = ((exponent.clamp(1 - _BIAS, _BIAS) + _BIAS) << 23).view(torch.float32)
    return torch.where(amax > 0, scale, 1.0)


def _nvfp4_scales(amax: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 numbers per block under a float32 factor per matrix, 2688 / amax.

    A block whose number rounds to zero is flushed: its codes mean nothing, its inverse is 0.
    """
    whole = amax.amax((-2, -1), keepdim=True)
    factor = _exact(whole, _NVFP4_LARGEST * _E4M3_LARGEST)
    one = torch.ones((), device=amax.device)
    stored = saturating_cast(amax / _NVFP4_LARGEST * factor, one, "e4m3").float()
    inverse = stored * factor.reciprocal()
    largest = torch.finfo(torch.float32).max
    scale = torch.where(inverse > 0, inverse.reciprocal().clamp(max=largest), 1.0)
    return scale, inverse
