"""Sums of a tensor on its device: the torch half of `foreshock.monitor.record.TensorSums`.

Never waits for the device: no host read, no shape that depends on data, no branch on a value.
Does not turn sums into statistics; `TensorSums.statistics` is the only place for that.

Every pass runs in float32 over magnitudes scaled by a power of two per sequence (so that 4th
powers neither overflow nor vanish) and is reduced over tokens in float32, from there in float64:
sums agree with float64 to about 1e-6. Counts and extremes are exact. The passes are plain
arithmetic with float results because that is what eager torch does fast: a comparison into a
boolean tensor, a masked fill or a cast from FP8 costs 3 to 20 times as much on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from foreshock.monitor.formats import Format, format_named
from foreshock.monitor.record import FIELD_REDUCTIONS

__all__ = ["SUM_FIELDS", "packed_sums", "scaled_per_tensor", "tensor_sums"]

SUM_FIELDS: Final = tuple(FIELD_REDUCTIONS)
"""Order of the rows of `packed_sums`."""

# Block formats have one scale per block; a single scale would misreport them.
_BLOCK_FORMATS: Final = ("mxfp8_e4m3", "block128_e4m3", "nvfp4")

# Rows of the table of sums over tokens.
_FINITE, _NONZERO, _SQUARES, _FOURTHS, _OVERFLOW, _NORMAL, _KEPT, _ERRORS = range(8)

# On a CPU the passes go over pieces of this many elements, so that they stay in the cache.
_CACHED_ELEMENTS: Final = 131072


@dataclass(frozen=True, slots=True)
class _Layout:
    """The bit layout of the floating type that the passes run in."""

    floating: torch.dtype
    integer: torch.dtype
    mantissa_bits: int
    exponent_mask: int
    largest_integer: int


_SINGLE: Final = _Layout(torch.float32, torch.int32, 23, 0xFF << 23, 2**31 - 1)
_DOUBLE: Final = _Layout(torch.float64, torch.int64, 52, 0x7FF << 52, 2**63 - 1)


def tensor_sums(
    x: torch.Tensor, *, format: str, scale: torch.Tensor | None, lead: int = 0
) -> dict[str, torch.Tensor]:
    """Sums over the finite elements of x and over its cast q under the scale in force.

    Args:
        x: Shape lead dims + (batch..., tokens, features). Fewer trailing dims, as a weight has,
            are no sequences: their `sequences` is 0. Any floating type; float64 is computed in
            float64, all others in float32.
        format: Name of the format that x is cast to. In an unscaled one (bf16, fp16, fp32)
            nothing is counted about the cast.
        scale: Scale in force s, 0-dim or one per leading entry, on x's device; None is current
            scaling: M / amax, and 1 where amax is 0.
        lead: Leading dims that hold different models; each gets its own sums.

    Returns:
        float64 tensors on x's device of shape x.shape[:lead], one per key of
        `record.FIELD_REDUCTIONS`, and `channel_sum2` of shape x.shape[:lead] + (features,).

    Raises:
        ValueError: As `packed_sums`.
    """
    packed, channels = packed_sums(x, format=format, scale=scale, lead=lead)
    return dict(zip(SUM_FIELDS, packed.unbind(0), strict=True)) | {"channel_sum2": channels}


def packed_sums(
    x: torch.Tensor, *, format: str, scale: torch.Tensor | None, lead: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tensor_sums`, all scalar fields in one tensor.

    Overflow counts abs(x s) > M; what passes M only because s is a rounded float32 (the scale of
    current scaling does) is no overflow.

    Returns:
        Fields in the order of `SUM_FIELDS`, float64 of shape (fields,) + x.shape[:lead], and the
        channel sums, float64 of shape x.shape[:lead] + (features,).

    Raises:
        ValueError: The format is unknown or scales blocks, x is not floating, or lead does not
            fit x.
    """
    number_format = scaled_per_tensor(format)
    if not x.is_floating_point():
        raise ValueError(f"statistics need a floating tensor, got {x.dtype}")
    if not 0 <= lead <= x.ndim:
        raise ValueError(f"lead is {lead}; a tensor of {x.ndim} dims allows 0 to {x.ndim}")
    with torch.no_grad():
        plan = _Plan.of(x.detach(), lead)
        if x.numel() == 0:
            packed, channels = _no_sums(plan)
        else:
            packed, channels = _Measurement(plan, number_format, scale).result()
        shape = x.shape[:lead]
        return packed.reshape(len(SUM_FIELDS), *shape), channels.reshape(*shape, plan.features)


def scaled_per_tensor(format: str) -> Format:
    """The format of that name, if a tensor in it has one scale or none.

    Raises:
        ValueError: It is unknown or has a scale per block.
    """
    if format in _BLOCK_FORMATS:
        raise ValueError(f"{format} has a scale per block; only per-tensor scales are measured")
    return format_named(format)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A tensor as (pieces, tokens, features), where pieces = models x sequences x splits."""

    pieces: torch.Tensor
    models: int
    sequences: int
    splits: int
    features: int
    chunk: int
    are_sequences: bool
    layout: _Layout

    @classmethod
    def of(cls, x: torch.Tensor, lead: int) -> _Plan:
        models = math.prod(x.shape[:lead])
        trailing = x.shape[lead:]
        features = trailing[-1] if trailing else 1
        tokens = trailing[-2] if len(trailing) > 1 else 1
        splits = 1
        if x.device.type == "cpu":
            while tokens % 2 == 0 and tokens * features > _CACHED_ELEMENTS:
                tokens //= 2
                splits *= 2
        pieces = x.reshape(models * math.prod(trailing[:-2]) * splits, tokens, features)
        size = max(tokens * features, 1)
        chunk = max(_CACHED_ELEMENTS // size, 1) if x.device.type == "cpu" else len(pieces)
        return cls(
            pieces=pieces,
            models=models,
            sequences=math.prod(trailing[:-2]),
            splits=splits,
            features=features,
            chunk=chunk,
            are_sequences=len(trailing) > 2,
            layout=_DOUBLE if x.dtype == torch.float64 else _SINGLE,
        )

    def chunks(self) -> Iterator[slice]:
        """Ranges of pieces that are worked on together."""
        for first in range(0, len(self.pieces), self.chunk):
            yield slice(first, first + self.chunk)


def _no_sums(plan: _Plan) -> tuple[torch.Tensor, torch.Tensor]:
    values = dict.fromkeys(SUM_FIELDS, 0.0) | {"observations": 1.0, "amax": -math.inf}
    values |= {"min_nonzero": math.inf, "headroom_log2": math.inf}
    values |= {"scale_log2": math.inf, "scale_log2_max": -math.inf}
    device = plan.pieces.device
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    channels = torch.zeros(plan.models, plan.features, dtype=torch.float64, device=device)
    return packed[:, None].expand(-1, plan.models), channels


class _Measurement:
    """One tensor on its way through the passes."""

    def __init__(self, plan: _Plan, number_format: Format, scale: torch.Tensor | None) -> None:
        self.plan = plan
        self.format = number_format
        count, tokens, features = plan.pieces.shape
        floating, device = plan.layout.floating, plan.pieces.device
        rows = 8 if number_format.scaled else 4
        self.table = torch.empty(rows, count, features, dtype=floating, device=device)
        self.amax = torch.empty(count, dtype=floating, device=device)
        self.smallest = torch.empty(count, dtype=plan.layout.integer, device=device)
        shape = (min(plan.chunk, count), tokens, features)
        self.buffers = tuple(torch.empty(shape, dtype=floating, device=device) for _ in range(3))
        self.scale = self._scale(scale) if number_format.scaled else None
        if self.scale is not None:
            self.piece_scale = (
                self.scale[:, None].expand(-1, count // plan.models).reshape(-1, 1, 1)
            )
            # Half a float32 rounding above M / s: the amax that a rounded scale came from stays in.
            above = number_format.largest * (1 + 2.0**-25)
            self.threshold = (above / self.piece_scale.double()).to(floating)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the passes and reduce over pieces."""
        for chunk in self.plan.chunks():
            self._measure(chunk)
        return self._reduce()

    def _scale(self, scale: torch.Tensor | None) -> torch.Tensor:
        """The scale per model."""
        plan = self.plan
        if scale is not None:
            return scale.detach().to(plan.layout.floating).reshape(-1).expand(plan.models)
        for chunk in plan.chunks():
            magnitude = self._magnitude(chunk).nan_to_num_(0.0, 0.0, 0.0)
            torch.amax(magnitude, (1, 2), out=self.amax[chunk])
        amax = self.amax.view(plan.models, -1).amax(1)
        # `number / tensor` is a reciprocal and a product in torch: two roundings.
        current = torch.full_like(amax, self.format.largest).div_(amax)
        current.clamp_max_(torch.finfo(torch.float32).max)
        return torch.where(amax > 0, current, 1.0)

    def _magnitude(self, chunk: slice) -> torch.Tensor:
        source = self.plan.pieces[chunk]
        out = self.buffers[0][: len(source)]
        return out.copy_(source).abs_() if source.dtype != out.dtype else torch.abs(source, out=out)

    def _measure(self, chunk: slice) -> None:
        magnitude = self._magnitude(chunk)
        scratch = self.buffers[1][: len(magnitude)]
        table, layout = self.table, self.plan.layout
        torch.le(magnitude, torch.finfo(layout.floating).max, out=scratch)
        torch.sum(scratch, 1, out=table[_FINITE, chunk])
        magnitude.nan_to_num_(0.0, 0.0, 0.0)
        torch.sum(torch.sign(magnitude, out=scratch), 1, out=table[_NONZERO, chunk])
        amax = torch.amax(magnitude, (1, 2), out=self.amax[chunk])
        # Non-negative floats order as their bits do. Adding the largest integer wraps every
        # non-zero pattern to the bottom of the range, in order, and leaves zero at the top.
        bits = scratch.view(layout.integer)
        torch.add(magnitude.view(layout.integer), layout.largest_integer, out=bits)
        torch.amin(bits, (1, 2), out=self.smallest[chunk])
        inverse = _unit_inverse(amax, layout)[:, None, None]
        torch.mul(magnitude, inverse, out=scratch)
        torch.sum(scratch.mul_(scratch), 1, out=table[_SQUARES, chunk])
        torch.sum(scratch.mul_(scratch), 1, out=table[_FOURTHS, chunk])
        if self.scale is not None:
            self._measure_cast(chunk, magnitude, inverse)

    def _measure_cast(self, chunk: slice, magnitude: torch.Tensor, inverse: torch.Tensor) -> None:
        """The saturating cast; leaves sums of (q/s - x)^2 in units of the power of two."""
        scratch, scaled = (buffer[: len(magnitude)] for buffer in self.buffers[1:])
        table, number_format = self.table, self.format
        scale, threshold = self.piece_scale[chunk], self.threshold[chunk]
        torch.sum(torch.gt(magnitude, threshold, out=scratch), 1, out=table[_OVERFLOW, chunk])
        torch.mul(magnitude, scale, out=scaled).clamp_max_(number_format.largest)
        torch.ge(scaled, number_format.smallest_normal, out=scratch)
        torch.sum(scratch, 1, out=table[_NORMAL, chunk])
        torch.gt(scaled, number_format.flush_threshold, out=scratch)
        torch.sum(scratch, 1, out=table[_KEPT, chunk])
        _round_to(scaled, number_format, self.plan.layout, scratch)
        # Where the factor would pass 2^40 every q is zero, so the bound changes nothing.
        factor = (inverse.double() / scale.double()).clamp_max(2.0**40).to(scaled.dtype)
        scaled.mul_(factor).addcmul_(magnitude, inverse, value=-1.0)
        torch.sum(scaled.mul_(scaled), 1, out=table[_ERRORS, chunk])

    def _reduce(self) -> tuple[torch.Tensor, torch.Tensor]:
        plan, table = self.plan, self.table
        unit2 = _unit_inverse(self.amax, plan.layout).double().reciprocal().square()
        channels = (table[_SQUARES] * unit2[:, None]).view(plan.models, -1, plan.features).sum(1)
        pieces = table.sum(2, dtype=torch.float64)
        pieces[_SQUARES] *= unit2
        pieces[_FOURTHS] *= unit2.square()
        if self.scale is not None:
            pieces[_ERRORS] *= unit2
        sequences = pieces.view(len(table), plan.models, plan.sequences, plan.splits).sum(3)
        sums = sequences.sum(2)
        nothing = torch.zeros_like(sums[0])
        amax = self.amax.view(plan.models, -1).amax(1).double()
        fields = {
            "numel": sums[_FINITE],
            "observations": nothing + 1.0,
            "nonfinite": float(plan.pieces.numel() // plan.models) - sums[_FINITE],
            "zeros": sums[_FINITE] - sums[_NONZERO],
            "sum2": sums[_SQUARES],
            "sum4": sums[_FOURTHS],
            "amax": torch.where(sums[_FINITE] > 0, amax, -math.inf),
            "min_nonzero": self._min_nonzero(),
        }
        fields |= self._kurtosis(sequences, nothing) | self._cast_fields(sums, amax, nothing)
        return torch.stack([fields[name] for name in SUM_FIELDS]), channels

    def _min_nonzero(self) -> torch.Tensor:
        top = self.plan.layout.largest_integer
        smallest = self.smallest.view(self.plan.models, -1).amin(1)
        value = (smallest - top).view(self.plan.layout.floating).double()
        return torch.where(smallest == top, math.inf, value)

    def _kurtosis(self, sequences: torch.Tensor, nothing: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.plan.are_sequences:
            return {"sequence_kurtosis": nothing, "sequences": nothing}
        # A sequence of zeros gives 0/0, which nansum leaves out.
        each = sequences[_FINITE] * sequences[_FOURTHS] / sequences[_SQUARES].square()
        some = sequences[_SQUARES] > 0
        return {"sequence_kurtosis": each.nansum(1), "sequences": some.sum(1, dtype=torch.float64)}

    def _cast_fields(
        self, sums: torch.Tensor, amax: torch.Tensor, nothing: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self.scale is None:
            infinite = nothing + math.inf
            cast = dict.fromkeys(("flushed", "subnormal", "overflow", "error2"), nothing)
            logs = {"headroom_log2": infinite, "scale_log2": infinite, "scale_log2_max": -infinite}
            return cast | logs
        scale = self.scale.double()
        scale_log2 = scale.log2()
        return {
            "flushed": sums[_NONZERO] - sums[_KEPT],
            "subnormal": sums[_NONZERO] - sums[_NORMAL],
            "overflow": sums[_OVERFLOW],
            "error2": sums[_ERRORS],
            "headroom_log2": (self.format.largest / (amax * scale)).log2(),
            "scale_log2": scale_log2,
            "scale_log2_max": scale_log2,
        }


def _unit_inverse(amax: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """The power of two that brings amax (0 included) into [0, 4), [2, 4) unless subnormal."""
    exponent = amax.view(layout.integer) & layout.exponent_mask
    exponent = exponent.clamp_min_(1 << layout.mantissa_bits)
    return (layout.exponent_mask - exponent).view(layout.floating)


def _round_to(
    scaled: torch.Tensor, number_format: Format, layout: _Layout, scratch: torch.Tensor
) -> None:
    """Round magnitudes up to M to the format, in place, ties to even.

    Adding and taking away 1.5 x 2^k leaves a multiple of the format's spacing at each magnitude.
    Bit-identical to `.to()` of torch's FP8 types (tests/monitor/test_statistics.py).
    """
    steps = number_format.smallest_normal / number_format.smallest_subnormal
    spare = 2.0**layout.mantissa_bits / steps
    anchor = scratch.view(layout.integer)
    torch.bitwise_and(scaled.view(layout.integer), layout.exponent_mask, out=anchor)
    scratch.clamp_min_(number_format.smallest_normal).mul_(1.5 * spare)
    scaled.add_(scratch).sub_(scratch)
