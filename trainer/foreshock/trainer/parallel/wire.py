"""Activations on the wire between tensor-parallel processes, and how they are rounded for it.

Sums add what every process sent in rank order, in float32 at least, so that they are the same on
all of them and repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from foreshock.trainer.config import WireName
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.precision import saturating_cast

__all__ = ["Cast", "Wire"]

_DTYPES: Final = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Cast:
    """An FP8 cast that all processes share.

    Attributes:
        scale: 0-dim float32, the same on every process.
        format: e4m3 or e5m2.
    """

    scale: Tensor
    format: str

    def codes(self, x: Tensor) -> Tensor:
        """X times scale, saturated and cast."""
        return saturating_cast(x, self.scale, self.format)

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for, float32."""
        return codes.float() * self.scale.reciprocal()


class Wire:
    """Gathers and sums of activations (B, T, D), parts of T in rank order.

    Args:
        transport: Over the tensor-parallel processes; counts the bytes.
        form: exact sends activations in their own type, bfloat16 rounds them, fp8 sends a gather's
            codes, one byte each, where a `Cast` is given, and else bfloat16.
    """

    def __init__(self, transport: Transport, form: WireName) -> None:
        self.transport, self.form = transport, form
        self.ranks, self.rank = transport.ranks, transport.rank

    def gather(self, x: Tensor, shared: Cast | None) -> Tensor:
        """Parts of all processes: (B, T / N, D) to (B, T, D), x's type.

        Args:
            x: This process's tokens.
            shared: The cast of who reads it; its second cast under the same scale changes nothing.
        """
        if shared is None:
            return torch.cat(self._moved(x), -2)
        codes = shared.codes(x).contiguous().view(torch.uint8)
        parts = self.transport.gather(codes.view(-1))
        dtype = _DTYPES[shared.format]
        values = [shared.values(part.view(dtype)).view(x.shape) for part in parts]
        return torch.cat(values, -2).to(x.dtype)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Sum over processes, of which each keeps its tokens: (B, T, D) to (B, T / N, D).

        Raises:
            ValueError: T does not split.
        """
        if x.shape[-2] % self.ranks:
            raise ValueError(
                f"{x.shape[-2]} tokens do not split over {self.ranks} processes; "
                "data.sequence_length must be a multiple of execution.tensor_parallel"
            )
        pieces = torch.stack(x.chunk(self.ranks, -2)).to(self._type(x))
        flat = pieces.view(-1)
        parts = self.transport.exchange(flat, [flat.numel() // self.ranks] * self.ranks)
        total = parts[0].to(_wide(x))
        for part in parts[1:]:
            total = total + part
        return total.view(pieces.shape[1:]).to(x.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over processes, whole on each of them; (B, T, D), kept."""
        return torch.cat(self._moved(self.scatter_sum(x)), -2)

    def own(self, x: Tensor, axis: int) -> Tensor:
        """This process's part of what all have."""
        if x.shape[axis] % self.ranks:
            raise ValueError(
                f"{x.shape[axis]} tokens do not split over {self.ranks} processes; "
                "data.sequence_length must be a multiple of execution.tensor_parallel"
            )
        return x.chunk(self.ranks, axis)[self.rank]

    def maximum(self, amax: Tensor) -> Tensor:
        """The largest over processes, 0-dim; NaN on any of them gives infinity on all."""
        # Not every backend's maximum keeps NaN; both stand for "no scale can be made of it".
        finite = amax.detach().nan_to_num(nan=torch.inf, posinf=torch.inf).clone()
        return self.transport.maximum(finite)

    def _moved(self, x: Tensor) -> list[Tensor]:
        narrow = x.to(self._type(x)).contiguous()
        parts = self.transport.gather(narrow.view(-1))
        return [part.view(x.shape).to(x.dtype) for part in parts]

    def _type(self, x: Tensor) -> torch.dtype:
        return x.dtype if self.form == "exact" else torch.bfloat16


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
