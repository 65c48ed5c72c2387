"""FP8 on the wire of sequence parallelism: gather before a tensor-parallel region, sum after it.

FP8-LM section 2.3 gathers activations in FP8 and leaves the backward sum in 16 bits; here both
directions are FP8, the sum with a scale per block of tokens' features and added in float32.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from foreshock.trainer.fp8lm.scaled import BlockScaled, encode, encode_blocks
from foreshock.trainer.fp8lm.transport import Transport

__all__ = ["gather_sequence", "scatter_sequence"]

_BLOCK: Final = 128


def gather_sequence(x: Tensor, transport: Transport) -> Tensor:
    """All processes' parts of a sequence, in rank order, on every one of them.

    Args:
        x: Shape (B, T / N, d), floating, on each process its tokens.
        transport: Over the tensor-parallel processes.

    Returns:
        Shape (B, T, d), x's type: E4M3 on the wire, each part under its own power-of-two scale.
        Backward sums the gradients of all processes for each part, as `scatter_sequence` does.
    """
    gathered: Tensor = _Gather.apply(x, transport)  # type: ignore[no-untyped-call]
    return gathered


def scatter_sequence(x: Tensor, transport: Transport) -> Tensor:
    """The sum over processes of partial results; each keeps its part of the sequence.

    Args:
        x: Shape (B, T, d), a summand on every process; T divides by the number of processes.
        transport: Over the tensor-parallel processes.

    Returns:
        Shape (B, T / N, d), x's type: E5M2 on the wire with a scale per block, added in float32.
        Backward gathers the gradient's parts.
    """
    scattered: Tensor = _Scatter.apply(x, transport)  # type: ignore[no-untyped-call]
    return scattered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return _gathered(x, transport)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradient, ctx.transport), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return _scattered(x, transport)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.transport), None


def _gathered(x: Tensor, transport: Transport) -> Tensor:
    scaled = encode(x, "e4m3")
    parts = transport.gather(scaled.codes.reshape(-1).view(torch.uint8))
    inverses = transport.gather(scaled.scale_inv.reshape(1))
    pairs = zip(parts, inverses, strict=True)
    values = [p.view(torch.float8_e4m3fn).float().view(x.shape) * i for p, i in pairs]
    return torch.cat(values, 1).to(x.dtype)


def _scattered(x: Tensor, transport: Transport) -> Tensor:
    if x.shape[1] % transport.ranks:
        raise ValueError(
            f"{x.shape[1]} tokens do not split over {transport.ranks} processes; pad the sequence"
        )
    parts = [encode_blocks(part, "e5m2", _BLOCK) for part in x.chunk(transport.ranks, 1)]
    like = parts[0]
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
    scales = torch.cat([part.scale_inv for part in parts])
    of_ranks = transport.exchange(codes, [like.codes.numel()] * transport.ranks)
    inverses = transport.exchange(scales, [like.scale_inv.numel()] * transport.ranks)
    total = torch.zeros(like.shape, device=x.device)
    for code, inverse in zip(of_ranks, inverses, strict=True):
        view = code.view(torch.float8_e5m2)
        total += BlockScaled(view, inverse, _BLOCK, like.shape, "e5m2").values()
    return total.to(x.dtype)
