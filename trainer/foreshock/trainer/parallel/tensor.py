"""Cuts a model's blocks over tensor-parallel processes, in place.

The model is made whole first, so that its weights are those of a lone process, and blocks stay as
they are written: what processes tell each other happens in hooks around attention and feed-forward.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.monitor.operands import Part, held_by
from foreshock.trainer.blocks import Attention, Block
from foreshock.trainer.config import Architecture, ModelConfig, WireName
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.model import Decoder, TokenSplit
from foreshock.trainer.parallel.cut import Cut
from foreshock.trainer.parallel.regions import (
    Region,
    entered,
    left,
    loss_of_all,
    tokens_of_all,
)
from foreshock.trainer.parallel.wire import Wire
from foreshock.trainer.precision import Fp8Linear, GemmLinear, Scaling

__all__ = ["TensorParallel", "cut_model"]

_WHOLE_ONLY: dict[Architecture, str] = {
    "olmo2": "its norm of queries and keys is over all heads",
    "fog_moe": "its experts are not cut",
    "llama3_smooth_swiglu_token": "its scale of a token is over all hidden features",
}


class TensorParallel:
    """What a cut model's gradients and states need.

    Attributes:
        wire: Between the processes.
        cuts: By parameter name.
        partial: Names of whole parameters whose gradients are sums over processes.
    """

    def __init__(self, model: Decoder, wire: Wire, cuts: Mapping[str, Cut], sequence: bool) -> None:
        self._model, self.wire, self.cuts = model, wire, dict(cuts)
        whole = [name for name, _ in model.named_parameters() if name not in cuts]
        # With the sequence cut everything outside sees this process's tokens alone.
        self.partial = tuple(n for n in whole if sequence or _is_inside(n))

    def reduce_gradients(self) -> None:
        """Add up the gradients of whole parameters that every process has a summand of."""
        named = dict(self._model.named_parameters())
        found = [g for n in self.partial if (g := named[n].grad) is not None]
        if not found:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in found])
        self.wire.transport.total(flat)
        parts = torch.split(flat, [gradient.numel() for gradient in found])
        for gradient, part in zip(found, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def gradient_norm(self) -> Tensor:
        """L2 norm over all parameters, pieces of other processes included; 0-dim."""
        pieces: list[Tensor] = []
        whole: list[Tensor] = []
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                (pieces if name in self.cuts else whole).append(_wide(parameter.grad))
        square = nn.utils.get_total_norm(pieces).square()
        self.wire.transport.total(square)
        return (square + nn.utils.get_total_norm(whole).square()).sqrt()

    def whole(self, x: Tensor, cut: Cut) -> Tensor:
        """A tensor of which x is this process's piece; every process has to call it."""
        parts = self.wire.transport.gather(x.detach().contiguous().view(-1))
        return cut.joined([part.view(x.shape) for part in parts])


def cut_model(
    model: Decoder, transport: Transport, *, sequence: bool, form: WireName, copies: int = 1
) -> TensorParallel:
    """Keep this process's part of every block, in place; before wrappers, optimizer and watch.

    Args:
        model: Whole and alike on all processes.
        transport: Over the tensor-parallel processes.
        sequence: Cut the residual stream along its tokens, too.
        form: Of activations on the wire.
        copies: Data-parallel processes that hold the same pieces.

    Raises:
        ValueError: It cannot be cut like that.
    """
    config, wire = model.config, Wire(transport, form)
    _check(model)
    cuts: dict[str, Cut] = {}
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        found = _cut_block(block, config, wire, sequence=sequence)
        for name, cut in found.items():
            cuts[f"blocks.{number}.{name}.weight"] = cut
    named = dict(model.named_parameters())
    for name in cuts:
        held_by(named[name], copies)
    if sequence:
        model.split = _Tokens(wire)
    return TensorParallel(model, wire, cuts, sequence)


class _Tokens(TokenSplit):
    """Each process has its part of every sequence."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def own(self, tokens: Tensor) -> Tensor:
        return self._wire.own(tokens, -1)

    def loss(self, loss: Tensor) -> Tensor:
        return loss_of_all(loss, self._wire)

    def logits(self, logits: Tensor) -> Tensor:
        return tokens_of_all(logits, self._wire)


def _check(model: Decoder) -> None:
    architecture = model.config.architecture
    if architecture in _WHOLE_ONLY:
        raise ValueError(
            f"{architecture} is not cut over processes: {_WHOLE_ONLY[architecture]}; "
            "execution.tensor_parallel is 1 with it"
        )
    if model.lead:
        raise ValueError("a stack of models is not cut over processes")
    for name, layer in model.linears().items():
        if layer.operand("input").granularity != "tensor":
            raise ValueError(
                f"{name} has scales per row or block; tensor_parallel wants precision.scaling "
                "delayed or current"
            )


def _cut_block(block: Block, config: ModelConfig, wire: Wire, *, sequence: bool) -> dict[str, Cut]:
    """Cut one layer; the cuts of its weights by name."""
    attention, mlp, ranks = block.attention, block.mlp, wire.ranks
    assert isinstance(attention, Attention)
    for heads, name in ((config.heads, "heads"), (config.key_heads, "kv_heads")):
        if heads % ranks:
            raise ValueError(f"model.{name} is {heads}; {ranks} processes cannot share them")
    width = config.head_width
    queries, keys = config.heads * width, config.key_heads * width
    up = {n: m for n, m in mlp.named_children() if isinstance(m, GemmLinear) and n != "down"}
    layers: dict[str, tuple[GemmLinear, Cut]] = {
        "attention.qkv": (attention.qkv, Cut(0, (queries, keys, keys), ranks)),
        "attention.out": (attention.out, Cut(1, (queries,), ranks)),
    }
    for name, layer in up.items():
        layers[f"mlp.{name}"] = (layer, Cut(0, (layer.out_features,), ranks))
    down = mlp.get_submodule("down")
    assert isinstance(down, GemmLinear)
    layers["mlp.down"] = (down, Cut(1, (down.in_features,), ranks))
    for layer, cut in layers.values():
        _cut_layer(layer, cut, wire)
    attention.keep_heads(ranks)
    for module in attention.core.modules():
        if isinstance(module, Scaling):
            module.agree = wire.maximum
    for module, readers, writer in (
        (attention, [attention.qkv], attention.out),
        (mlp, list(up.values()), down),
    ):
        region = Region(wire, sequence=sequence, readers=readers, writer=writer)
        module.register_forward_pre_hook(functools.partial(_enter, region))
        writer.register_forward_hook(functools.partial(_leave, region))
    return {name: cut for name, (_, cut) in layers.items()}


def _cut_layer(layer: GemmLinear, cut: Cut, wire: Wire) -> None:
    """Let a layer keep this process's part of its weight, and share scales with the others."""
    features = {0: layer.out_features, 1: layer.in_features}[cut.axis]
    first = wire.rank * (features // wire.ranks)
    piece = Part(offset=first, features=features, sharded=True)
    copy = Part(counted=wire.rank == 0)
    # By columns of the weight the input is cut, by its rows the result and so its gradient.
    parts = {
        0: {"input": copy, "weight": Part(sharded=True), "grad_output": piece},
        1: {"input": piece, "weight": piece, "grad_output": copy},
    }[cut.axis]
    layer.keep_piece(cut.piece(layer.weight.detach(), wire.rank), parts)
    if isinstance(layer, Fp8Linear):
        for role, part in parts.items():
            if part.sharded:
                layer.scaling_of(role).agree = wire.maximum


def _enter(region: Region, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (entered(inputs[0], region), *inputs[1:])


def _leave(region: Region, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return left(output, region)


def _is_inside(name: str) -> bool:
    """Whether a whole parameter works on this process's heads or hidden features."""
    return ".attention.regulariser." in name or ".mlp.activation." in name


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
