"""Sums of a tensor under a cast with many scales: one per block, per row, or both levels of NVFP4.

The scales are those that current scaling at that granularity would take, so the same functions say
what a layer in such a format did and what another one would do. As in `statistics`, nothing here
waits for the device or depends on data for a shape, and the passes are plain float arithmetic.

How each format finds its scale s from a block's largest finite magnitude a:

- mxfp8_e4m3 and block128_e4m3: the largest power of two with a s <= 448. For MX this rounds the
  shared exponent up, as Transformer Engine and cuBLAS do. The floor of OCP MX 1.0's example
  conversion puts a s into [256, 512) and so saturates the top of one block in five; what a user
  asks is what the recipe that trains on hardware would do. s is at most 2^127: E8M0's end, and the
  end of float32 for the scales of 128 values.
- e4m3 and e5m2 by rows: M / a rounded to float32.
- nvfp4: an E4M3 number per block under one float32 factor per tensor, 2688 / amax. Where that
  number rounds to zero, the block has no scale and every element of it is flushed.

A block without a non-zero element has no scale. float64 is measured as float32, where these formats
start from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from foreshock.monitor.formats import Format, format_named
from foreshock.monitor.record import FIELD_REDUCTIONS
from foreshock.monitor.record.sums import EXPONENTS
from foreshock.monitor.statistics import packed_sums

__all__ = ["block_sums", "histogram", "independent_sums"]

_FIELDS: Final = tuple(FIELD_REDUCTIONS)
_BLOCK_SIZES: Final = {"mxfp8_e4m3": 32, "block128_e4m3": 128, "nvfp4": 16}
_ROW_FORMATS: Final = ("e4m3", "e5m2")
_FORMATS: Final = {"block": tuple(_BLOCK_SIZES), "row": _ROW_FORMATS, "tensor": _ROW_FORMATS}

_E4M3: Final = format_named("e4m3")
_LARGEST_SCALE: Final = torch.finfo(torch.float32).max
_EXPONENT: Final = 0xFF << 23
_MANTISSA: Final = (1 << 23) - 1
_MANTISSA_OF_448: Final = 3 << 21  # 448 = 1.75 x 2^8
_EXPONENT_OF_448: Final = 8
_BIAS: Final = 127

# On a CPU the passes go over pieces of this many elements, so that they stay in the cache.
_CACHED_ELEMENTS: Final = 131072

# Two roundings lie between a tensor's amax and the scale of an NVFP4 block.
_NVFP4_SLACK: Final = 1 + 2.0**-22

_NORMAL, _KEPT, _OVERFLOW, _ERRORS = range(4)


def block_sums(
    x: torch.Tensor,
    *,
    format: str,
    granularity: str = "block",
    weight: bool = False,
    independent: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over x and over its cast at a granularity.

    Args:
        x: Any floating tensor; blocks lie along the last axis, and the last one may be short.
        format: mxfp8_e4m3, block128_e4m3 or nvfp4 by blocks; e4m3 or e5m2 by rows (one scale per
            row of the last axis) or by tensor.
        granularity: block, row or tensor.
        weight: Whether block128_e4m3 takes 128 x 128 blocks, as it does for weights; else 1 x 128.
        independent: `independent_sums(x)`, where they are known.

    Returns:
        The fields of `record.FIELD_REDUCTIONS`, float64; and how many blocks have a scale of each
        biased float32 exponent, float64 of 256 entries. Both on x's device.

    Raises:
        ValueError: The format does not go with the granularity, or x is not floating.
    """
    number_format = format_named(format)
    if format not in _FORMATS.get(granularity, ()):
        raise ValueError(
            f"{format} by {granularity} is not measured; by block: {', '.join(_BLOCK_SIZES)}; "
            f"by row or tensor: {', '.join(_ROW_FORMATS)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"statistics need a floating tensor, got {x.dtype}")
    with torch.no_grad():
        x = x.detach().float() if x.dtype == torch.float64 else x.detach()
        row = independent_sums(x) if independent is None else independent
        if x.numel() == 0:
            return row.clone(), torch.zeros(EXPONENTS, dtype=torch.float64, device=x.device)
        square = weight and format == "block128_e4m3" and x.ndim > 1
        plan = _Blocks.of(x, _BLOCK_SIZES.get(format), square=square)
        return _Cast(plan, number_format, row, single=granularity == "tensor").result()


def independent_sums(x: torch.Tensor) -> torch.Tensor:
    """The fields that no format enters; those of the cast are neutral."""
    return packed_sums(x, format="fp32", scale=None)[0]


def histogram(x: torch.Tensor) -> torch.Tensor:
    """256 counts by the biased float32 exponent of abs(x), finite non-zero elements only.

    Subnormal numbers stand in entry 0; entry 255 is always 0. float64 on x's device.
    """
    with torch.no_grad():
        values = x.detach().float().reshape(-1)
        bits = values.view(torch.int32) & 0x7FFFFFFF
        counts = _bincount(bits >> 23)
        # In place on views: assigning a number to an entry copies it from the host and waits.
        counts[0].sub_((bits == 0).sum())
        counts[EXPONENTS - 1].zero_()
        return counts


def _bincount(index: torch.Tensor) -> torch.Tensor:
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=EXPONENTS).double()
    # bincount reads the largest index on the host.
    counts = torch.zeros(EXPONENTS, dtype=torch.float64, device=index.device)
    return counts.scatter_add_(0, index.long(), torch.ones_like(index, dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A tensor as (groups, rows, blocks, elements); a scale covers rows x elements."""

    values: torch.Tensor
    rows: int
    blocks: int
    elements: int
    chunk: int

    @classmethod
    def of(cls, x: torch.Tensor, size: int | None, *, square: bool) -> _Blocks:
        features = x.shape[-1] if x.ndim else 1
        size = features if size is None else size
        rows = size if square else 1
        matrices = x.reshape(-1, x.shape[-2], features) if square else x.reshape(-1, 1, features)
        # Zeros at the end of a short block change no sum: all counts here are of non-zero elements.
        padding = (0, -features % size, 0, -matrices.shape[1] % rows)
        if any(padding):
            matrices = torch.nn.functional.pad(matrices, padding)
        blocks = matrices.shape[2] // size
        values = matrices.reshape(-1, rows, blocks, size)
        group = rows * blocks * size
        cpu = x.device.type == "cpu"
        chunk = max(_CACHED_ELEMENTS // group, 1) if cpu else len(values)
        return cls(values, rows, blocks, size, chunk)

    def chunks(self) -> Iterator[slice]:
        """Ranges of groups that are worked on together."""
        for first in range(0, len(self.values), self.chunk):
            yield slice(first, first + self.chunk)


class _Cast:
    """One tensor on its way through the cast of one format."""

    def __init__(
        self, plan: _Blocks, number_format: Format, row: torch.Tensor, *, single: bool
    ) -> None:
        self.plan = plan
        self.single = single
        self.format = number_format
        self.row = row
        groups, device = len(plan.values), plan.values.device
        self.amax = torch.empty(groups, plan.blocks, dtype=torch.float32, device=device)
        self.scale = torch.empty_like(self.amax)
        pieces = math.ceil(groups / plan.chunk)
        width = plan.blocks * plan.elements
        self.table = torch.zeros(4, pieces, width, dtype=torch.float32, device=device)
        shape = (min(plan.chunk, groups), *plan.values.shape[1:])
        self.buffers = tuple(
            torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3)
        )
        self.whole = row[_FIELDS.index("amax")].clamp_min(0.0).float()
        self.inverse = _unit_inverse(self.whole)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the passes and reduce over blocks."""
        for piece, chunk in enumerate(self.plan.chunks()):
            self._measure(piece, chunk)
        sums = self.table.sum((1, 2), dtype=torch.float64)
        unit = self.inverse.double().reciprocal()
        scales = slice(1 if self.single else None)
        scale, amax = self.scale.reshape(-1)[scales], self.amax.reshape(-1)[scales]
        some = scale > 0
        logs = scale.double().log2()
        room = (self.format.largest / (amax.double() * scale.double())).log2()
        nonzero = self.row[_FIELDS.index("numel")] - self.row[_FIELDS.index("zeros")]
        fields = {
            "flushed": nonzero - sums[_KEPT],
            "subnormal": nonzero - sums[_NORMAL],
            "overflow": sums[_OVERFLOW],
            "error2": sums[_ERRORS] * unit.square(),
            "headroom_log2": torch.where(some, room, math.inf).amin(),
            "scale_log2": torch.where(some, logs, math.inf).amin(),
            "scale_log2_max": torch.where(some, logs, -math.inf).amax(),
        }
        row = torch.stack([fields.get(name, self.row[at]) for at, name in enumerate(_FIELDS)])
        # A zero scale has exponent 0, where no scale in force stands: all of them are normal.
        counts = _bincount(scale.view(torch.int32) >> 23)
        counts[0].zero_()
        return row, counts

    def _measure(self, piece: int, chunk: slice) -> None:
        source = self.plan.values[chunk]
        magnitude, scratch, scaled = (buffer[: len(source)] for buffer in self.buffers)
        if source.dtype == torch.float32:
            torch.abs(source, out=magnitude)
        else:
            magnitude.copy_(source).abs_()
        magnitude.nan_to_num_(0.0, 0.0, 0.0)
        amax = self.amax[chunk]
        if self.single:
            amax.copy_(self.whole.expand_as(amax))
        else:
            torch.amax(magnitude, (1, 3), out=amax)
        scale = self._scale(amax)
        self.scale[chunk] = scale
        over = scale[:, None, :, None]
        torch.mul(magnitude, over, out=scaled)
        if self.format.name == "nvfp4":
            # The other scales are rounded so that a block's largest magnitude stays within M.
            torch.gt(scaled, self.format.largest * _NVFP4_SLACK, out=scratch)
            self._add(_OVERFLOW, piece, scratch)
        scaled.clamp_max_(self.format.largest)
        torch.ge(scaled, self.format.smallest_normal, out=scratch)
        self._add(_NORMAL, piece, scratch)
        torch.gt(scaled, self.format.flush_threshold, out=scratch)
        self._add(_KEPT, piece, scratch)
        round_to(scaled, self.format, scratch)
        # (q/s - x)^2 in units of the tensor's power of two; a block without a scale gives x^2.
        factor = torch.where(over > 0, self.inverse.double() / over.double(), 0.0)
        scaled.mul_(factor.clamp_max_(2.0**40).float())
        scaled.sub_(magnitude.mul_(self.inverse))
        self._add(_ERRORS, piece, scaled.mul_(scaled))

    def _add(self, row: int, piece: int, values: torch.Tensor) -> None:
        width = self.table.shape[2]
        torch.sum(values.view(-1, width), 0, out=self.table[row, piece])

    def _scale(self, amax: torch.Tensor) -> torch.Tensor:
        """The scale of each block, 0 where it has none."""
        if self.format.name == "nvfp4":
            return _nvfp4_scale(amax, self.whole)
        if self.format.name in _ROW_FORMATS:
            scale = torch.full_like(amax, self.format.largest).div_(amax)
            scale.clamp_max_(_LARGEST_SCALE)
        else:
            scale = _power_of_two_scale(amax)
        return torch.where(amax > 0, scale, 0.0)


def _power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """The largest power of two, at most 2^127, that keeps amax within 448."""
    bits = amax.view(torch.int32)
    above = ((bits & _MANTISSA) > _MANTISSA_OF_448).int()
    exponent = 2 * _BIAS + _EXPONENT_OF_448 - (bits >> 23) - above
    return (exponent.clamp_max_(2 * _BIAS) << 23).view(torch.float32)


def _nvfp4_scale(amax: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """As Transformer Engine: block amax / 6 under the tensor's factor, rounded to E4M3."""
    largest = format_named("nvfp4").largest
    factor = torch.full_like(whole, largest * _E4M3.largest).div_(whole).clamp_max_(_LARGEST_SCALE)
    factor = torch.where(whole > 0, factor, 1.0)
    stored = amax.div(largest).mul_(factor).clamp_max_(_E4M3.largest)
    round_to(stored, _E4M3, torch.empty_like(stored))
    scale = stored.mul(factor.reciprocal()).reciprocal_().clamp_max_(_LARGEST_SCALE)
    return torch.where(stored > 0, scale, 0.0)


def _unit_inverse(amax: torch.Tensor) -> torch.Tensor:
    """The power of two that brings amax (0 included) into [0, 4)."""
    exponent = (amax.view(torch.int32) & _EXPONENT).clamp_min_(1 << 23)
    return (_EXPONENT - exponent).view(torch.float32)


def round_to(scaled: torch.Tensor, number_format: Format, scratch: torch.Tensor) -> None:
    """Round magnitudes up to M to the format, in place, ties to even, as `statistics` does."""
    steps = number_format.smallest_normal / number_format.smallest_subnormal
    anchor = scratch.view(torch.int32)
    torch.bitwise_and(scaled.view(torch.int32), _EXPONENT, out=anchor)
    scratch.clamp_min_(number_format.smallest_normal).mul_(1.5 * 2.0**23 / steps)
    scaled.add_(scratch).sub_(scratch)
