"""Scaled tensors: codes of a narrow format and the power of two that they were multiplied by.

value = code x scale_inv. Products and quotients with a number touch scale_inv alone, never a code.
No operation here waits for a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from foreshock.monitor.formats import FORMATS

__all__ = [
    "DTYPES",
    "BlockScaled",
    "Scaled",
    "amax_of",
    "cast",
    "encode",
    "encode_blocks",
    "power_of_two_scale",
    "saturated",
]

DTYPES: Final = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""Storage type of each format. bf16 and fp32 have float32's range, so their scale is 1."""

_SCALED: Final = ("e4m3", "e5m2", "fp16")
_LARGEST_EXPONENT: Final = 126


def amax_of(x: Tensor) -> Tensor:
    """Largest magnitude, 0-dim float32; NaN where there is a NaN, 0 of an empty tensor."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    flat = x.detach().float()
    return torch.maximum(flat.amax(), -flat.amin())


def power_of_two_scale(amax: Tensor, fp_format: str, previous: Tensor) -> Tensor:
    """Power of two s = 2^floor(log2(M / amax)): s amax lies in (M/2, M] (FP8-LM, section 2.1).

    Found from the exponents, without a logarithm, hence exact. Where amax is zero or not finite
    the previous scale stays: an infinity must neither zero a scale nor invert it.

    Args:
        amax: float32, any shape.
        fp_format: Its largest value is M; bf16 and fp32 give 1.
        previous: What stays, float32 of amax's shape.
    """
    if fp_format not in _SCALED:
        return torch.ones_like(previous)
    largest_mantissa, largest_exponent = math.frexp(FORMATS[fp_format].largest)
    mantissa, exponent = torch.frexp(amax.float())
    power = largest_exponent - exponent - (mantissa > largest_mantissa).to(exponent.dtype)
    power = power.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    # The bits of 2^power: exp2 may be wrong in the last one.
    scale = ((power + 127) << 23).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, previous)


def cast(scaled: Tensor, fp_format: str) -> Tensor:
    """Round to the format's numbers; what exceeds the largest becomes it.

    Infinities become NaN in E4M3, which has none: saturated, a fault would look like a number.
    """
    dtype = DTYPES[fp_format]
    if fp_format not in _SCALED:
        return scaled.to(dtype)
    largest = FORMATS[fp_format].largest
    bounded = scaled.float().clamp(-largest, largest)
    if fp_format == "e4m3":
        return torch.where(scaled.isinf(), math.nan, bounded).to(dtype)
    return torch.where(scaled.isinf(), scaled.float(), bounded).to(dtype)


def saturated(codes: Tensor) -> Tensor:
    """Which E4M3 codes have the largest magnitude (0x7E without the sign)."""
    return (codes.view(torch.uint8) & 0x7F) == 0x7E


@dataclass(frozen=True, slots=True)
class Scaled:
    """A tensor with one scale.

    Attributes:
        codes: In the format's type.
        scale: What values were multiplied by before the cast; 0-dim float32.
        scale_inv: What a code is multiplied by to give the value; 1 / scale until `mul_`.
        format: Name of the format.
    """

    codes: Tensor
    scale: Tensor
    scale_inv: Tensor
    format: str

    def values(self) -> Tensor:
        """float32."""
        return self.codes.float().mul_(self.scale_inv)

    def amax(self) -> Tensor:
        """Largest magnitude of the values, 0-dim float32."""
        return amax_of(self.codes) * self.scale_inv.abs()

    def norm(self) -> Tensor:
        """L2 norm of the values, 0-dim float32."""
        norm: Tensor = torch.linalg.vector_norm(self.codes.float())
        return norm * self.scale_inv.abs()

    def mul_(self, factor: Tensor | float) -> Scaled:
        """Multiply the values; codes stay."""
        self.scale_inv.mul_(factor)
        return self

    def div_(self, divisor: Tensor | float) -> Scaled:
        """Divide the values; codes stay."""
        self.scale_inv.div_(divisor)
        return self

    def copy_(self, other: Scaled) -> Scaled:
        """Take over another one's values, which may not be of another shape or format."""
        self.codes.copy_(other.codes)
        self.scale.copy_(other.scale)
        self.scale_inv.copy_(other.scale_inv)
        return self

    @property
    def bytes(self) -> int:
        """Memory of codes and scales."""
        parts = (self.codes, self.scale, self.scale_inv)
        return sum(x.numel() * x.element_size() for x in parts)


def encode(x: Tensor, fp_format: str, previous: Tensor | None = None) -> Scaled:
    """Cast under the scale that the tensor's own amax asks for.

    Args:
        x: Floating tensor.
        fp_format: A key of `DTYPES`.
        previous: Scale to keep where amax is zero or not finite; None keeps 1.
    """
    kept = torch.ones((), device=x.device) if previous is None else previous
    scale = power_of_two_scale(amax_of(x), fp_format, kept)
    return Scaled(cast(x.detach().float() * scale, fp_format), scale, scale.reciprocal(), fp_format)


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """A tensor with a scale per block of consecutive elements; the last block may be short.

    Attributes:
        codes: Flat, in the format's type.
        scale_inv: One per block, float32.
        block: Elements per block.
        shape: Of the tensor.
        format: Name of the format.
    """

    codes: Tensor
    scale_inv: Tensor
    block: int
    shape: torch.Size
    format: str

    def values(self) -> Tensor:
        """float32, in the tensor's shape."""
        of_each = self.scale_inv.repeat_interleave(self.block)[: self.codes.numel()]
        return self.codes.float().mul_(of_each).view(self.shape)

    def mul_(self, factor: Tensor | float) -> BlockScaled:
        """Multiply the values; codes stay."""
        self.scale_inv.mul_(factor)
        return self


def encode_blocks(x: Tensor, fp_format: str, block: int) -> BlockScaled:
    """Cast with a power-of-two scale per block; 1 for a block whose amax is zero or not finite."""
    flat = x.detach().float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    amax = torch.maximum(padded.amax(1), -padded.amin(1))
    scale = power_of_two_scale(amax, fp_format, torch.ones_like(amax))
    codes = cast(padded * scale[:, None], fp_format).view(-1)[: flat.numel()].clone()
    return BlockScaled(codes, scale.reciprocal(), block, x.shape, fp_format)
