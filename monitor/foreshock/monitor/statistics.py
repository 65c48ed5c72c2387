"""Sums of a tensor on its device: the torch half of `foreshock.monitor.record.TensorSums`.

Never waits for the device: no host read, no shape that depends on data, no branch on a value.
Does not turn sums into statistics; `TensorSums.statistics` is the only place for that.

Every pass runs in float32 over magnitudes scaled by a power of two per sequence (so that 4th
powers neither overflow nor vanish) and is reduced over tokens in float32, from there in float64:
sums agree with float64 to about 1e-6. Counts and extremes are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from foreshock.monitor.formats import Format, format_named

__all__ = ["tensor_sums"]

# Block formats have one scale per block; a single scale would misreport them.
_BLOCK_FORMATS = ("mxfp8_e4m3", "block128_e4m3", "nvfp4")


@dataclass(frozen=True, slots=True)
class _Layout:
    """The bit layout of the floating type that the passes run in."""

    floating: torch.dtype
    integer: torch.dtype
    mantissa_bits: int
    exponents: int
    largest_integer: int

    @property
    def exponent_mask(self) -> int:
        return self.exponents << self.mantissa_bits


_SINGLE = _Layout(torch.float32, torch.int32, 23, 0xFF, 2**31 - 1)
_DOUBLE = _Layout(torch.float64, torch.int64, 52, 0x7FF, 2**63 - 1)


def tensor_sums(
    x: torch.Tensor, *, format: str, scale: torch.Tensor | None, lead: int = 0
) -> dict[str, torch.Tensor]:
    """Sums over the finite elements of x and over its cast q under the scale in force.

    Args:
        x: Shape lead dims + (batch..., tokens, features). Fewer trailing dims, as a weight has,
            are no sequences: their `sequences` is 0. Any floating type; float64 is computed in float64, others in float32.
        format: Name of the format that x is cast to. In an unscaled one (bf16, fp16, fp32)
            nothing is counted about the cast.
        scale: Scale in force s, 0-dim or one per leading entry, on x's device; None is current
            scaling: M / amax, and 1 where amax is 0.
        lead: Leading dims that hold different models; each gets its own sums.

    Returns:
        float64 tensors on x's device of shape x.shape[:lead], one per key of
        `record.FIELD_REDUCTIONS`, and `channel_sum2` of shape x.shape[:lead] + (features,).
        Overflow counts abs(x s) > M (1 + 2^-24): what exceeds M only because the scale itself is
        a rounded float32 is no overflow.

    Raises:
        ValueError: The format is unknown or scales blocks, x is not floating, or lead is larger
            than x.ndim.
    """
    number_format = format_named(format)
    if format in _BLOCK_FORMATS:
        raise ValueError(f"{format} scales blocks; per-tensor sums know {', '.join(_per_tensor())}")
    if not x.is_floating_point():
        raise ValueError(f"statistics need a floating tensor, got {x.dtype}")
    if not 0 <= lead <= x.ndim:
        raise ValueError(f"lead is {lead}; a tensor of {x.ndim} dims allows 0 to {x.ndim}")
    shape = x.shape[:lead]
    with torch.no_grad():
        stack = _as_sequences(x.detach(), lead)
        sums = _sums(stack, number_format, scale) if stack.numel() else _no_sums(stack)
        if x.ndim - lead < 3:
            sums["sequence_kurtosis"] = sums["sequences"] = torch.zeros_like(sums["numel"])
        channels = sums.pop("channel_sum2").reshape(*shape, stack.shape[-1])
        return {name: value.reshape(shape) for name, value in sums.items()} | {
            "channel_sum2": channels
        }


def _per_tensor() -> tuple[str, ...]:
    return ("e4m3", "e5m2", "bf16", "fp16", "fp32")


def _as_sequences(x: torch.Tensor, lead: int) -> torch.Tensor:
    """View x as (models, sequences, tokens, features)."""
    models = math.prod(x.shape[:lead])
    trailing = x.shape[lead:]
    features = trailing[-1] if trailing else 1
    tokens = trailing[-2] if len(trailing) > 1 else 1
    return x.reshape(models, math.prod(trailing[:-2]), tokens, features)


def _no_sums(stack: torch.Tensor) -> dict[str, torch.Tensor]:
    def full(value: float) -> torch.Tensor:
        return torch.full((stack.shape[0],), value, dtype=torch.float64, device=stack.device)

    zeros = ("numel", "nonfinite", "zeros", "sum2", "sum4", "sequence_kurtosis", "sequences")
    cast = ("flushed", "subnormal", "overflow", "error2")
    sums = {name: full(0.0) for name in (*zeros, *cast)}
    sums |= {"observations": full(1.0), "amax": full(-math.inf), "min_nonzero": full(math.inf)}
    sums |= _unscaled(full(0.0))
    sums["channel_sum2"] = full(0.0)[:, None].expand(-1, stack.shape[-1]).clone()
    return sums


def _unscaled(like: torch.Tensor) -> dict[str, torch.Tensor]:
    infinite = torch.full_like(like, math.inf)
    return {"headroom_log2": infinite, "scale_log2": infinite, "scale_log2_max": -infinite}


def _sums(
    stack: torch.Tensor, number_format: Format, scale: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    layout = _DOUBLE if stack.dtype == torch.float64 else _SINGLE
    magnitude = stack.to(layout.floating).abs()
    scratch = torch.empty_like(magnitude)
    finite = _count(torch.le(magnitude, torch.finfo(layout.floating).max, out=scratch))
    magnitude.nan_to_num_(0.0, 0.0, 0.0)
    nonzero = _count(torch.gt(magnitude, 0.0, out=scratch))
    amax = magnitude.amax((2, 3))
    sums = _moments(magnitude, amax, finite, scratch, layout)
    total = float(stack[0].numel())
    sums["numel"] = finite.sum(1)
    sums["observations"] = torch.ones_like(sums["numel"])
    sums["nonfinite"] = total - sums["numel"]
    sums["zeros"] = sums["numel"] - nonzero.sum(1)
    sums["amax"] = torch.where(sums["numel"] > 0, amax.amax(1).double(), -math.inf)
    sums["min_nonzero"] = _min_nonzero(magnitude, scratch, layout)
    if not number_format.scaled:
        nothing = torch.zeros_like(sums["numel"])
        names = ("flushed", "subnormal", "overflow", "error2")
        return sums | dict.fromkeys(names, nothing) | _unscaled(nothing)
    in_force = _scale_in_force(amax.amax(1), number_format, scale)
    cast = _Cast(magnitude, scratch, layout, number_format, in_force)
    return sums | cast.sums(amax, nonzero.sum(1))


def _count(ones: torch.Tensor) -> torch.Tensor:
    """Ones per (model, sequence). A float32 partial sum over tokens is exact up to 2^24 tokens."""
    return ones.sum(2).sum(2, dtype=torch.float64)


def _unit_inverse(amax: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """The power of two that brings amax (0 included) into [0, 4), [2, 4) unless subnormal."""
    exponent = amax.view(layout.integer) & layout.exponent_mask
    exponent = exponent.clamp_min(1 << layout.mantissa_bits)
    return (layout.exponent_mask - exponent).view(layout.floating)


def _moments(
    magnitude: torch.Tensor,
    amax: torch.Tensor,
    finite: torch.Tensor,
    scratch: torch.Tensor,
    layout: _Layout,
) -> dict[str, torch.Tensor]:
    inverse = _unit_inverse(amax, layout)
    unit2 = inverse.double().reciprocal().square()
    torch.mul(magnitude, inverse[:, :, None, None], out=scratch)
    squares = scratch.mul_(scratch).sum(2).double()
    fourths = scratch.mul_(scratch).sum(2).sum(2, dtype=torch.float64)
    sum2 = squares.sum(2)
    kurtosis = finite * fourths / sum2.square()
    some = sum2 > 0
    return {
        "sum2": (sum2 * unit2).sum(1),
        "sum4": (fourths * unit2.square()).sum(1),
        "sequence_kurtosis": torch.where(some, kurtosis, 0.0).sum(1),
        "sequences": some.double().sum(1),
        "channel_sum2": (squares * unit2[:, :, None]).sum(1),
    }


def _min_nonzero(magnitude: torch.Tensor, scratch: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """Smallest non-zero magnitude per model, infinity for none, in one pass.

    Non-negative floats order as their bits do. Adding the largest integer wraps every non-zero
    pattern around to the bottom of the range, in order, and leaves zero at the top.
    """
    top = layout.largest_integer
    wrapped = torch.add(magnitude.view(layout.integer), top, out=scratch.view(layout.integer))
    smallest = wrapped.amin((1, 2, 3))
    value = (smallest - top).view(layout.floating).double()
    return torch.where(smallest == top, math.inf, value)


def _scale_in_force(
    amax: torch.Tensor, number_format: Format, scale: torch.Tensor | None
) -> torch.Tensor:
    """The scale per model, in the type of amax."""
    if scale is not None:
        return scale.detach().to(amax.dtype).reshape(-1).expand(amax.shape[0])
    current = (number_format.largest / amax).clamp_max(torch.finfo(torch.float32).max)
    return torch.where(amax > 0, current, 1.0)


@dataclass(frozen=True, slots=True)
class _Cast:
    """The saturating cast of magnitudes (models, sequences, tokens, features), scale (models,)."""

    magnitude: torch.Tensor
    scratch: torch.Tensor
    layout: _Layout
    number_format: Format
    scale: torch.Tensor

    def sums(self, amax: torch.Tensor, nonzero: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums over the cast.

        Args:
            amax: Per sequence, (models, sequences).
            nonzero: Non-zero elements per model.
        """
        number_format, scratch = self.number_format, self.scratch
        overflow = _count(torch.gt(self.magnitude, self._overflow_threshold(), out=scratch))
        scaled = self.magnitude * self.scale[:, None, None, None]
        scaled.clamp_max_(number_format.largest)
        normal = _count(torch.ge(scaled, number_format.smallest_normal, out=scratch))
        kept = _count(torch.gt(scaled, number_format.flush_threshold, out=scratch))
        scale = self.scale.double().log2()
        headroom = math.log2(number_format.largest) - amax.amax(1).double().log2() - scale
        return {
            "flushed": nonzero - kept.sum(1),
            "subnormal": nonzero - normal.sum(1),
            "overflow": overflow.sum(1),
            "error2": self._error2(scaled, amax),
            "headroom_log2": headroom,
            "scale_log2": scale,
            "scale_log2_max": scale,
        }

    def _overflow_threshold(self) -> torch.Tensor:
        """Largest magnitude that is no overflow."""
        exact = self.number_format.largest * (1 + 2.0**-24) / self.scale.double()
        rounded = exact.to(self.magnitude.dtype)
        below = torch.nextafter(rounded, torch.zeros_like(rounded))
        return torch.where(rounded.double() > exact, below, rounded)[:, None, None, None]

    def _error2(self, scaled: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        """Sum of (q / s - x)^2 per model; `scaled` is used up.

        Rounds to the format in floating arithmetic: adding and taking away 1.5 x 2^k leaves a
        multiple of the format's spacing, ties to even. Bit-identical to the hardware types'
        `.to()` (tests/monitor/test_statistics.py), without their slow way back.
        """
        spare = self.layout.mantissa_bits - self._format_mantissa_bits()
        anchor = torch.bitwise_and(
            scaled.view(self.layout.integer),
            self.layout.exponent_mask,
            out=self.scratch.view(self.layout.integer),
        ).view(self.layout.floating)
        anchor.clamp_min_(self.number_format.smallest_normal).mul_(1.5 * 2.0**spare)
        scaled.add_(anchor).sub_(anchor)
        inverse = _unit_inverse(amax, self.layout)
        unit = inverse.double().reciprocal()
        # Where the factor would pass 2^40 every q is zero, so the bound changes nothing.
        factor = (1 / (self.scale.double()[:, None] * unit)).clamp_max(2.0**40)
        scaled.mul_(factor.to(scaled.dtype)[:, :, None, None])
        scaled.addcmul_(self.magnitude, inverse[:, :, None, None], value=-1.0)
        squares = scaled.mul_(scaled).sum(2).sum(2, dtype=torch.float64)
        return (squares * unit.square()).sum(1)

    def _format_mantissa_bits(self) -> int:
        ratio = self.number_format.smallest_normal / self.number_format.smallest_subnormal
        return int(math.log2(ratio))
