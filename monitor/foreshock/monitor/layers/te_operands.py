"""What a Transformer Engine layer kept of its GEMM operands, and how it cast them.

Reads what the layer saved for its backward pass and what its quantizers hold; changes nothing,
launches nothing, and imports nothing of Transformer Engine: its classes are known by name, so that
this file loads where the library does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import nn

from foreshock.monitor.layers.adapter import tensors_in
from foreshock.monitor.operands import Operand
from foreshock.monitor.placement import local_of

__all__ = [
    "Cast",
    "Codes",
    "GemmPlace",
    "Saved",
    "as_codes",
    "autocast_is_on",
    "format_of",
    "plain",
    "positions_in",
    "saved_by",
    "saving_node",
]

# A bias that is added apart, or a view, stands between a layer's output and what saved for it.
_STEPS_TO_NODE: Final = 4
# Where versions of Transformer Engine keep what is global.
_MANAGERS: Final = ("transformer_engine.pytorch.quantization", "transformer_engine.pytorch.fp8")

# The types of the quantizers whose one scale covers a tensor, and those of blocks.
_DELAYED: Final = "Float8Quantizer"
_BLOCKS: Final = {
    "Float8BlockQuantizer": "block128_e4m3",
    "MXFP8Quantizer": "mxfp8_e4m3",
    "NVFP4Quantizer": "nvfp4",
}


# As classes of storages whose tensors are saved as data, transpose and inverse scale.
_STORAGES: Final = ("Float8TensorStorage", "Float8Tensor")


@dataclass(frozen=True, slots=True)
class GemmPlace:
    """Where the operands of one GEMM of a layer are found.

    Attributes:
        suffix: What the GEMM is called behind the layer's name.
        input, weight: Positions of their quantizers (Transformer Engine's FP8FwdTensors).
        gradient: Position of the output gradient's quantizer (FP8BwdTensors).
        saved_input, saved_weight: Positions among the tensors that the layer saves.
        takes_input: Whether the operand is the module's own input.
        gives_output: Whether the GEMM's output is the module's, so that its gradient passes by.
    """

    suffix: str
    input: int
    weight: int
    gradient: int
    saved_input: int
    saved_weight: int
    takes_input: bool = False
    gives_output: bool = True


@dataclass(frozen=True, slots=True)
class Codes:
    """A tensor of which only FP8 codes are left; transposed or not, they are the same codes.

    Attributes:
        data: uint8, one an element.
        scale_inv: What a decoded code is multiplied by; one element.
    """

    data: torch.Tensor
    scale_inv: torch.Tensor


Saved = torch.Tensor | Codes | None


def as_codes(x: object) -> Codes | None:
    """The codes of a quantized tensor with one scale, or None for anything else."""
    if type(x) in (torch.Tensor, nn.Parameter):
        return None
    scale_inv = getattr(x, "_scale_inv", None)
    data = getattr(x, "_data", None)
    if data is None:
        data = getattr(x, "_transpose", None)
    return _codes(data, scale_inv)


def _codes(data: object, scale_inv: object) -> Codes | None:
    if not isinstance(data, torch.Tensor) or not isinstance(scale_inv, torch.Tensor):
        return None
    if data.element_size() != 1 or scale_inv.numel() != 1 or data.numel() == 0:
        return None
    return Codes(data, scale_inv)


def saving_node(output: object, name: str) -> Any | None:
    """The node of the graph with which a layer's autograd function saved its tensors.

    Args:
        output: What the layer returned.
        name: Name of the node's type.
    """
    result = next(tensors_in(output), None)
    node = None if result is None else result.grad_fn
    for _ in range(_STEPS_TO_NODE):
        if node is None or type(node).__name__ == name:
            return node
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return None


def saved_by(node: Any) -> list[Saved]:
    """The tensors that a node saved, in the order in which the layer lists them.

    Empty where looking would cost something: hooks on saved tensors (checkpointing, offloading)
    may compute them anew.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return []
    objects = getattr(node, "tensor_objects", None)
    if not objects:
        return []
    return list(_restored(objects, node.saved_tensors))


def _restored(objects: Sequence[object], tensors: Sequence[torch.Tensor | None]) -> Iterator[Saved]:
    position = 0
    for item in objects:
        if item is None:
            yield _codes_or_self(tensors[position])
            position += 1
        elif type(item).__name__ in _STORAGES:
            # Either of the first two may be missing.
            data, transpose, scale_inv = tensors[position : position + 3]
            yield _codes(transpose if data is None else data, scale_inv)
            position += 3
        else:
            # How many tensors another kind of storage saved is its own business.
            return


def positions_in(objects: Sequence[object]) -> list[int]:
    """At which of a node's saved tensors each object's own begin, as far as that is known."""
    found, position = [], 0
    for item in objects:
        found.append(position)
        if item is None:
            position += 1
        elif type(item).__name__ in _STORAGES:
            position += 3
        else:
            return found[:-1]
    return found


def _codes_or_self(x: torch.Tensor | None) -> Saved:
    # Most are plain, and asking a plain tensor for what it does not have is slow.
    return x if x is None or type(x) in (torch.Tensor, nn.Parameter) else as_codes(x) or x


def format_of(quantizer: object) -> tuple[str, str]:
    """Format and granularity in which a quantizer casts."""
    blocks = _BLOCKS.get(type(quantizer).__name__)
    if blocks is not None:
        return blocks, "block"
    return ("e5m2" if "E5M2" in str(getattr(quantizer, "dtype", "")) else "e4m3"), "tensor"


@dataclass(frozen=True, slots=True)
class Cast:
    """How one quantizer casts, worked out once for as long as it keeps its tensors.

    Attributes:
        quantizer: Of whom this is said.
        held: Its own scale and largest magnitude.
        amax, scale: The same, 0-dim; None where it does not keep one of each.
        kept: Both, one element each; None where one is missing.
        delayed: Whether the scale in force was made before.
        before, after: The operand before and after it has been cast. Current scaling makes its
            scale with the cast; before, the monitor takes M / amax, as the quantizer will.
    """

    quantizer: Any
    held: tuple[object, object]
    amax: torch.Tensor | None
    scale: torch.Tensor | None
    kept: tuple[torch.Tensor, torch.Tensor] | None
    delayed: bool
    before: Operand
    after: Operand

    @classmethod
    def of(cls, module: nn.Module, quantizer: Any) -> Self:
        """Ask a quantizer of a layer."""
        format, granularity = format_of(quantizer)
        delayed = type(quantizer).__name__ == _DELAYED
        held = getattr(quantizer, "amax", None), getattr(quantizer, "scale", None)
        amax, scale = (_one(value) if granularity == "tensor" else None for value in held)
        agreed = delayed and _reduces(module)
        after = Operand(format, scale, granularity, agreed=agreed)
        before = after if delayed else Operand(format, None, granularity)
        kept = None
        if amax is not None and scale is not None:
            kept = amax.reshape(1), scale.reshape(1)
        return cls(quantizer, held, amax, scale, kept, delayed, before, after)

    @property
    def current(self) -> bool:
        """Whether it still holds; a quantizer may be given other tensors."""
        amax, scale = self.held
        quantizer = self.quantizer
        return (
            getattr(quantizer, "amax", None) is amax and getattr(quantizer, "scale", None) is scale
        )


def _one(value: object) -> torch.Tensor | None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        return None
    return value.detach().reshape(())


def _reduces(module: nn.Module) -> bool:
    recipe = getattr(module, "fp8_meta", {}).get("recipe")
    return bool(getattr(recipe, "reduce_amax", False))


def autocast_is_on() -> bool:
    """Whether a context of Transformer Engine's low-precision recipes is open.

    Scales of forward passes are made anew where the outermost one ends, and nowhere else.
    """
    for name in _MANAGERS:
        module = sys.modules.get(name)
        manager = getattr(module, "FP8GlobalStateManager", None)
        if manager is not None:
            return bool(getattr(manager, "FP8_ENABLED", False))
    return False


def plain(x: object) -> torch.Tensor | None:
    """The tensor if it holds values of a floating type, and not codes."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return None
    if type(x) in (torch.Tensor, nn.Parameter):
        return x
    return None if as_codes(x) is not None else local_of(x)
