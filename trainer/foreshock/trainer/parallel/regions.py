"""Where the stream of a model enters what is cut over processes, and where it leaves it.

With the sequence cut too (sequence parallel) tokens are gathered at the entrance and summed to
their owners at the way out; backward does the reverse. Else the stream is whole everywhere: sums
at the way out and, of gradients, at the entrance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreshock.trainer.parallel.wire import Cast, Wire
from foreshock.trainer.precision import Fp8Linear, GemmLinear, tensor_amax

__all__ = ["Region", "SharedCast", "entered", "left", "loss_of_all", "tokens_of_all"]


class SharedCast:
    """The cast of an operand that several layers or processes read alike.

    Its scale is the one that a lone process would cast with: the largest magnitude of all parts
    comes first. The layers are then told this magnitude instead of that of the values which the
    codes stand for, which can be off by a last bit.

    Args:
        layers: Who reads the operand; the first one's scale counts.
        role: input or grad_output.
        wire: Between the processes.
    """

    def __init__(self, layers: Sequence[GemmLinear], role: str, wire: Wire) -> None:
        self._layers, self._role, self._wire = tuple(layers), role, wire
        self._amax: Tensor | None = None
        for layer in self._layers:
            if isinstance(layer, Fp8Linear):
                layer.scaling_of(role).agree = self._known

    def of(self, x: Tensor) -> Cast | None:
        """The cast of a whole of which x is this process's part; None where somebody reads more."""
        self._amax = None
        first = self._layers[0]
        if not all(isinstance(layer, Fp8Linear) and not layer.in_bf16 for layer in self._layers):
            return None
        assert isinstance(first, Fp8Linear)
        scaling = first.scaling_of(self._role)
        self._amax = self._wire.maximum(tensor_amax(x, 0))
        return Cast(scaling.scale_for(self._amax), scaling.fp8_format)

    def _known(self, amax: Tensor) -> Tensor:
        return amax if self._amax is None else self._amax


class Region:
    """One attention or feed-forward, cut over processes.

    Args:
        wire: Between them.
        sequence: Whether the stream outside is cut along the tokens.
        readers: The column-parallel layers that read the stream.
        writer: The row-parallel layer whose results are summed.
    """

    def __init__(
        self, wire: Wire, *, sequence: bool, readers: Sequence[GemmLinear], writer: GemmLinear
    ) -> None:
        self.wire, self.sequence = wire, sequence
        in_codes = sequence and wire.form == "fp8"
        self._inputs = SharedCast(readers, "input", wire) if in_codes else None
        self._gradients = SharedCast([writer], "grad_output", wire) if in_codes else None

    def gathered_input(self, x: Tensor) -> Tensor:
        """At the entrance, forward."""
        cast = None if self._inputs is None else self._inputs.of(x)
        return self.wire.gather(x, cast) if self.sequence else x.view_as(x)

    def gathered_gradient(self, gradient: Tensor) -> Tensor:
        """At the way out, backward."""
        cast = None if self._gradients is None else self._gradients.of(gradient)
        return self.wire.gather(gradient, cast) if self.sequence else gradient

    def summed(self, x: Tensor) -> Tensor:
        """At the way out forward, and at the entrance backward."""
        return self.wire.scatter_sum(x) if self.sequence else self.wire.sum(x)


def entered(x: Tensor, region: Region) -> Tensor:
    """The stream as column-parallel layers read it, (B, T, D)."""
    y: Tensor = _Enter.apply(x, region)  # type: ignore[no-untyped-call]
    return y


def left(x: Tensor, region: Region) -> Tensor:
    """Partial results (B, T, D) of all processes as the stream takes them."""
    y: Tensor = _Leave.apply(x, region)  # type: ignore[no-untyped-call]
    return y


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return region.gathered_input(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.region.summed(gradient), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region) -> Tensor:
        ctx.region = region
        return region.summed(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.region.gathered_gradient(gradient), None


def loss_of_all(loss: Tensor, wire: Wire) -> Tensor:
    """The mean of all processes' losses, each over as many tokens; 0-dim, the same everywhere.

    Gradients are those of this process's share: they add up over processes.
    """
    mean: Tensor = _MeanLoss.apply(loss, wire)  # type: ignore[no-untyped-call]
    return mean


def tokens_of_all(x: Tensor, wire: Wire) -> Tensor:
    """All processes' tokens, (B, T / N, V) to (B, T, V), of which everybody computes the same loss.

    Backward takes this process's tokens of the gradient: it is the same on all of them.
    """
    whole: Tensor = _AllTokens.apply(x, wire)  # type: ignore[no-untyped-call]
    return whole


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, wire: Wire) -> Tensor:
        ctx.ranks = wire.ranks
        return wire.transport.total(loss.detach().clone()) / wire.ranks

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


class _AllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        parts = wire.transport.gather(x.contiguous().view(-1))
        return torch.cat([part.view(x.shape) for part in parts], -2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.wire.own(gradient, -2), None
