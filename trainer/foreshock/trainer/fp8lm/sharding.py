"""ZeRO for FP8 weights: who owns what of each matrix, and the FP8 gather after a step.

With one scale per tensor, whole tensors are owned (FP8-LM, Algorithm 1); with a scale per block,
equal runs of blocks, and nothing is padded but the last block.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreshock.monitor.operands import Observer, Operand
from foreshock.trainer.fp8lm.partition import Piece, block_partition, whole_tensors
from foreshock.trainer.fp8lm.scaled import encode, encode_blocks
from foreshock.trainer.fp8lm.sums import cut
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.fp8lm.weights import ScaledWeight

__all__ = ["Sharding"]


class Sharding:
    """Ownership of matrices.

    Args:
        matrices: Weights, `ScaledWeight`s of E4M3.
        ranks, rank: Processes; one owns everything as it is.
        block: 0 = whole tensors.

    Attributes:
        parts: Pieces of each process.
        block: 0 unless sharded in blocks.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], ranks: int, rank: int, block: int) -> None:
        self._matrices = tuple(matrices)
        self._ranks, self._rank = ranks, rank
        self.block = block
        sizes = [p.numel() for p in matrices]
        self.parts: list[list[Piece]] = (
            block_partition(sizes, ranks, block) if block else whole_tensors(sizes, ranks)
        )
        self._index = {id(p): i for i, p in enumerate(self._matrices)}
        self._own = {piece.tensor: piece for piece in self.parts[rank]}

    @property
    def shards(self) -> bool:
        """Whether there is anybody to share with."""
        return self._ranks > 1 and bool(self._matrices)

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this process updates anything of a parameter."""
        index = self._index.get(id(parameter))
        return not self.shards or index is None or index in self._own

    def own(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """This process's piece of a parameter's values, flat; all of it, in shape, if alone."""
        index = self._index.get(id(parameter))
        if not self.shards or index is None:
            return values
        piece = self._own[index]
        return values.reshape(-1)[piece.start : piece.stop]

    def gather(
        self,
        transport: Transport,
        values: Callable[[nn.Parameter], Tensor],
        observer: Observer | None,
    ) -> None:
        """Cast what this process owns to E4M3, and bring all weights up to date everywhere.

        Args:
            transport: Over the processes that share.
            values: float32 values of an owned piece.
            observer: Is shown each gathered weight.
        """
        codes, scales = self._cast_own(values)
        device = self._matrices[0].device
        lengths = [sum(p.numel for p in part) for part in self.parts]
        counts = [sum(self._scales_of(p) for p in part) for part in self.parts]
        empty = torch.zeros(0, device=device)
        bytes_of = transport.gather(torch.cat([empty.to(torch.uint8), *codes]), lengths)
        inverses = transport.gather(torch.cat([empty, *scales]), counts)
        for part, flat, inverse in zip(self.parts, bytes_of, inverses, strict=True):
            pieces = cut(flat, [p.numel for p in part])
            of_pieces = cut(inverse, [self._scales_of(p) for p in part])
            for piece, code, one in zip(part, pieces, of_pieces, strict=True):
                self._place(piece, code, one)
        if observer is not None:
            for parameter in self._matrices:
                self._show(parameter, observer)

    def _scales_of(self, piece: Piece) -> int:
        return -(-piece.numel // self.block) if self.block else 1

    def _cast_own(
        self, values: Callable[[nn.Parameter], Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        codes, scales = [], []
        for piece in self.parts[self._rank]:
            flat = values(self._matrices[piece.tensor]).reshape(-1)
            if self.block:
                blocks = encode_blocks(flat, "e4m3", self.block)
                codes.append(blocks.codes.view(torch.uint8))
                scales.append(blocks.scale_inv)
            else:
                one = encode(flat, "e4m3")
                codes.append(one.codes.view(torch.uint8))
                scales.append(one.scale_inv.reshape(1))
        return codes, scales

    def _place(self, piece: Piece, codes: Tensor, scale_inv: Tensor) -> None:
        weight = self._matrices[piece.tensor]
        assert isinstance(weight, ScaledWeight)
        weight.codes.view(-1).view(torch.uint8)[piece.start : piece.stop].copy_(codes)
        if self.block:
            first = piece.start // self.block
            weight.scale_inv[first : first + scale_inv.numel()].copy_(scale_inv)
        else:
            weight.scale_inv.copy_(scale_inv[0])

    def _show(self, parameter: nn.Parameter, observer: Observer) -> None:
        assert isinstance(parameter, ScaledWeight)
        values = parameter.plain()
        if self.block == 128:
            observer(
                parameter, "weight_gathered", values, Operand("block128_e4m3", None, "block"), None
            )
        elif not self.block:
            operand = Operand("e4m3", parameter.scale_inv.reciprocal())
            observer(parameter, "weight_gathered", values, operand, None)

    def whole_states(
        self,
        states: Mapping[int, Mapping[str, Tensor]],
        every: Sequence[nn.Parameter],
        group: dist.ProcessGroup | None,
    ) -> dict[int, dict[str, Tensor]]:
        """States of all processes, pieces joined in the order of their ranks."""
        # As bytes of torch.save: the pickle that objects travel in knows no FP8.
        buffer = io.BytesIO()
        torch.save(dict(states), buffer)
        packed: list[Any] = [None] * self._ranks
        dist.all_gather_object(packed, buffer.getvalue(), group=group)
        gathered = [
            torch.load(io.BytesIO(one), weights_only=True, map_location="cpu") for one in packed
        ]
        whole: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(every):
            found = [states_of[number] for states_of in gathered if number in states_of]
            index = self._index.get(id(parameter))
            if index is None:
                if found:
                    whole[number] = dict(found[0])
                continue
            if found:
                whole[number] = {
                    name: found[0][name]
                    if not found[0][name].dim() or not self.block
                    else torch.cat([one[name].cpu() for one in found])
                    for name in found[0]
                }
        return whole

    def own_states(
        self, states: Mapping[int, Mapping[str, Tensor]], every: Sequence[nn.Parameter]
    ) -> dict[int, dict[str, Tensor]]:
        """This process's part of the states of all."""
        own: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(every):
            index = self._index.get(id(parameter))
            if number not in states:
                continue
            if index is None:
                own[number] = dict(states[number])
            elif index in self._own:
                own[number] = self._cut(states[number], self._own[index])
        return own

    def _cut(self, state: Mapping[str, Tensor], piece: Piece) -> dict[str, Tensor]:
        if not self.block:
            return {k: v.reshape(-1) if v.dim() else v for k, v in state.items()}
        elements = slice(piece.start, piece.stop)
        first = piece.start // self.block
        blocks = slice(first, first + self._scales_of(piece))
        size = self._matrices[piece.tensor].numel()
        return {
            name: value
            if not value.dim()
            else value.reshape(-1)[elements if value.numel() == size else blocks].clone()
            for name, value in state.items()
        }
