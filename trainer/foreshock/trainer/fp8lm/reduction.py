"""The mean of FP8 gradients over data-parallel processes.

FP8-LM section 2.1 with its faults mended: one all-reduce makes all shared scales, NaN and infinity
are flags of their own and cannot change a scale, and what the sum itself breaks is seen after it.
Nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.trainer.fp8lm.mu import GradientFactor
from foreshock.trainer.fp8lm.partition import Piece, whole_tensors
from foreshock.trainer.fp8lm.scaled import (
    Scaled,
    amax_of,
    cast,
    encode,
    power_of_two_scale,
    saturated,
)
from foreshock.trainer.fp8lm.sums import add_codes, cut
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.states_config import CommunicationConfig

__all__ = ["GradientReduction", "Reduced"]


@dataclass(frozen=True, slots=True)
class Reduced:
    """Mean gradients, alike on every process; counts are vectors of one number per tensor.

    Attributes:
        gradients: One per tensor; in a sharded reduction None for what others own.
        present: Whether any process had a gradient for the tensor, bool vector.
        finite: Whether all is finite before and after the sum, 0-dim bool.
        overflow: Elements of this process above the largest value when they were cast.
        saturation: Elements whose sum was above it.
        at_largest: Elements that have its code, honestly or not.
        mu: The factor in force.
    """

    gradients: tuple[Tensor | Scaled | None, ...]
    present: Tensor
    finite: Tensor
    overflow: Tensor
    saturation: Tensor
    at_largest: Tensor
    mu: Tensor


class GradientReduction:
    """Reduces one list of gradients, the same tensors at every step.

    Args:
        shapes: Of the tensors, on every process the same.
        config: How.
        transport: Over which processes.
        device: Of the tensors.

    Attributes:
        mu: The factors.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        config: CommunicationConfig,
        transport: Transport,
        device: torch.device | None = None,
    ) -> None:
        self._shapes = tuple(shapes)
        self._sizes = [shape.numel() for shape in shapes]
        self._config = config
        self._transport = transport
        self._device = device
        self.mu = GradientFactor(self._sizes, transport.ranks, config, device)

    def reduce(self, local: Sequence[Tensor | Scaled | None]) -> Reduced:
        """The mean over all processes; None counts as zero.

        Args:
            local: float tensors or E4M3, in the order of the shapes.
        """
        if self._config.reduction == "fp32_sum":
            return self._reduce_wide(local)
        return self._reduce_narrow(local)

    def reduce_to_owners(
        self, local: Sequence[Tensor | Scaled | None], parts: Sequence[Sequence[Piece]]
    ) -> Reduced:
        """The same, but each sum is made in float32 by the process that needs it.

        Args:
            local: As for `reduce`.
            parts: What each process gets; at most one piece of a tensor.

        Returns:
            With flat float32 gradients of this process's pieces, None for other tensors.
        """
        summed, counts = self._sums_of_owned(local, parts)
        finite = self._all_finite(counts, [s for s in summed if s is not None])
        return self._result(summed, counts, finite)

    def _reduce_narrow(self, local: Sequence[Tensor | Scaled | None]) -> Reduced:
        counts = self._agree(local)
        mu = self.mu.in_force()
        shared = power_of_two_scale(counts.amax, "e4m3", torch.ones_like(counts.amax))
        factor = shared * mu
        codes, overflow = self._common_codes(local, factor)
        total, over = self._transport.sum_codes(torch.cat(codes))
        sums = cut(total, self._sizes)
        counted = [saturated(each).sum() for each in sums]
        at_largest = torch.stack(counted) if counted else counts.amax.new_zeros(0)
        saturation = torch.stack([each.sum() for each in cut(over, self._sizes)])
        finite = counts.finite & ~torch.isnan(total.float()).any()
        self.mu.update(at_largest, finite)
        inverse = (factor * self._transport.ranks).reciprocal()
        gradients = tuple(
            Scaled(each.view(shape), factor[i].clone(), inverse[i].clone(), "e4m3")
            for i, (each, shape) in enumerate(zip(sums, self._shapes, strict=True))
        )
        return Reduced(gradients, counts.present, finite, overflow, saturation, at_largest, mu)

    def _common_codes(
        self, local: Sequence[Tensor | Scaled | None], factor: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Codes under the shared scale, flat, and how many values were above the largest."""
        codes, overflow = [], []
        for index, gradient in enumerate(local):
            if gradient is None:
                zeros = torch.zeros(self._sizes[index], device=self._device)
                codes.append(cast(zeros, "e4m3"))
                overflow.append(torch.zeros((), dtype=torch.int64, device=self._device))
                continue
            scaled = _moved(gradient, factor[index]).reshape(-1)
            overflow.append((scaled.abs() > 448.0).sum())
            codes.append(cast(scaled, "e4m3"))
        return codes, torch.stack(overflow)

    def _reduce_wide(self, local: Sequence[Tensor | Scaled | None]) -> Reduced:
        """FP8 there, float32 sums, FP8 back; each tensor is summed whole by one process."""
        transport = self._transport
        parts = whole_tensors(self._sizes, transport.ranks)
        summed, counts = self._sums_of_owned(local, parts)
        own = [piece.tensor for piece in parts[transport.rank]]
        mine = [encode(s, "e4m3") for i in own if isinstance(s := summed[i], Tensor)]
        flat = torch.cat([_no_bytes(self._device), *(_bytes(each.codes) for each in mine)])
        inverses = torch.stack([each.scale_inv for each in mine]) if mine else None
        lengths = [sum(piece.numel for piece in part) for part in parts]
        gathered = transport.gather(flat, lengths)
        empty = torch.zeros(0, device=self._device)
        scales = transport.gather(
            empty if inverses is None else inverses, [len(part) for part in parts]
        )
        gradients: list[Tensor | Scaled | None] = [None] * len(self._sizes)
        finite = counts.finite
        for part, codes, inverse in zip(parts, gathered, scales, strict=True):
            finite = finite & ~torch.isnan(codes.view(torch.float8_e4m3fn).float()).any()
            pieces = cut(codes, [piece.numel for piece in part])
            for piece, code, one in zip(part, pieces, inverse.unbind(0), strict=True):
                shaped = code.view(torch.float8_e4m3fn).view(self._shapes[piece.tensor])
                gradients[piece.tensor] = Scaled(shaped, one.reciprocal(), one.clone(), "e4m3")
        return self._result(gradients, counts, finite)

    def _sums_of_owned(
        self, local: Sequence[Tensor | Scaled | None], parts: Sequence[Sequence[Piece]]
    ) -> tuple[list[Tensor | Scaled | None], _Counts]:
        """float32 means of what this process owns, each process's codes under its own scale."""
        transport = self._transport
        counts = self._agree(local)
        coded = [self._own_codes(index, gradient) for index, gradient in enumerate(local)]
        flat = [_bytes(each.codes) for each in coded]
        sent = [flat[p.tensor][p.start : p.stop] for part in parts for p in part]
        splits = [sum(piece.numel for piece in part) for part in parts]
        received = transport.exchange(torch.cat([_no_bytes(self._device), *sent]), splits)
        inverses = transport.gather(torch.stack([each.scale_inv for each in coded]))
        own = parts[transport.rank]
        pieces = [cut(each, [p.numel for p in own]) for each in received]
        summed: list[Tensor | Scaled | None] = [None] * len(self._sizes)
        for at, piece in enumerate(own):
            codes = [of_rank[at].view(torch.float8_e4m3fn) for of_rank in pieces]
            total = add_codes(codes, [inverse[piece.tensor] for inverse in inverses])
            summed[piece.tensor] = total.div_(transport.ranks)
        return summed, counts

    def _own_codes(self, index: int, gradient: Tensor | Scaled | None) -> Scaled:
        if gradient is None:
            return encode(torch.zeros(self._shapes[index], device=self._device), "e4m3")
        if isinstance(gradient, Scaled) and gradient.format == "e4m3":
            return gradient
        values = gradient.values() if isinstance(gradient, Scaled) else gradient
        return encode(values, "e4m3")

    def _agree(self, local: Sequence[Tensor | Scaled | None]) -> _Counts:
        """What all processes must know, by one all-reduce for all tensors.

        Largest magnitudes, which tensors have a gradient at all, whether anything is not finite.
        """
        zero = torch.zeros((), device=self._device)
        amax = torch.stack(
            [
                zero if g is None else (g.amax() if isinstance(g, Scaled) else amax_of(g))
                for g in local
            ]
        )
        broken = ~torch.isfinite(amax)
        present = torch.tensor(
            [g is not None for g in local], dtype=torch.float32, device=amax.device
        )
        message = torch.cat([amax.masked_fill(broken, 0.0), present, broken.any()[None].float()])
        agreed = self._transport.maximum(message)
        count = len(local)
        return _Counts(agreed[:count], agreed[count : 2 * count] > 0, agreed[-1] == 0)

    def _all_finite(self, counts: _Counts, summed: Sequence[Tensor | Scaled]) -> Tensor:
        broken = torch.zeros((), dtype=torch.bool, device=counts.finite.device)
        for each in summed:
            values = each.codes.float() if isinstance(each, Scaled) else each
            broken = broken | ~torch.isfinite(values).all()
        return counts.finite & (self._transport.maximum(broken.float()[None])[0] == 0)

    def _result(
        self,
        gradients: Sequence[Tensor | Scaled | None],
        counts: _Counts,
        finite: Tensor,
        at_largest: Tensor | None = None,
    ) -> Reduced:
        none = torch.zeros(len(self._sizes), dtype=torch.int64, device=counts.amax.device)
        return Reduced(
            tuple(gradients),
            counts.present,
            finite,
            none,
            none,
            none if at_largest is None else at_largest,
            torch.ones_like(counts.amax),
        )


@dataclass(frozen=True, slots=True)
class _Counts:
    amax: Tensor
    present: Tensor
    finite: Tensor


def _moved(gradient: Tensor | Scaled, factor: Tensor) -> Tensor:
    """Values times factor; codes times one number, so that a power of two rounds nothing."""
    if isinstance(gradient, Scaled):
        return gradient.codes.float() * (gradient.scale_inv * factor)
    return gradient.detach().float() * factor


def _bytes(codes: Tensor) -> Tensor:
    return codes.reshape(-1).view(torch.uint8)


def _no_bytes(device: torch.device | None) -> Tensor:
    return torch.zeros(0, dtype=torch.uint8, device=device)
