"""Weights kept as codes: FP16 with a scale (O1, O2) or E4M3 (O3), and their FP8 all-gather.

A tensor subclass, because that is what FSDP2 asks of a parameter with an all-gather of its own.
To every operation but those that move it, it is the float32 tensor that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from foreshock.trainer.fp8lm.scaled import DTYPES, encode, encode_blocks

__all__ = ["ScaledWeight", "scale_weights"]

_ATEN: Final = torch.ops.aten
_FORMAT_OF: Final = {dtype: name for name, dtype in DTYPES.items()}
# What moves or cuts a tensor without reading it, and can be done to its codes.
_MOVES: Final = (
    _ATEN.detach.default,
    _ATEN.alias.default,
    _ATEN.view.default,
    _ATEN.as_strided.default,
    _ATEN.slice.Tensor,
    _ATEN.split.Tensor,
    _ATEN.new_zeros.default,
    _ATEN.empty_like.default,
    _ATEN.clone.default,
)


class ScaledWeight(Tensor):
    """float32 to the outside; codes x scale_inv within.

    Attributes:
        codes: In the format's type, the tensor's shape.
        scale_inv: float32; 0-dim, or one per run of equally many elements of the flat tensor (the
            processes' parts of a gathered one, or blocks).
        run: Elements per scale; 0 = one for all.
    """

    codes: Tensor
    scale_inv: Tensor
    run: int

    @staticmethod
    def __new__(cls, codes: Tensor, scale_inv: Tensor, run: int = 0) -> ScaledWeight:
        """A tensor of the codes' shape that says it is float32."""
        weight: ScaledWeight = Tensor._make_wrapper_subclass(
            cls,
            codes.shape,
            strides=codes.stride(),
            storage_offset=codes.storage_offset(),
            dtype=torch.float32,
            device=codes.device,
        )
        weight.codes, weight.scale_inv, weight.run = codes, scale_inv, run
        return weight

    def __init__(self, codes: Tensor, scale_inv: Tensor, run: int = 0) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"ScaledWeight({tuple(self.shape)}, {self.format})"

    @classmethod
    def of(cls, x: Tensor, fp_format: str, block: int = 0) -> Self:
        """Encode a float tensor; block 0 = one scale."""
        if block:
            blocks = encode_blocks(x, fp_format, block)
            return cls(blocks.codes.view(x.shape), blocks.scale_inv, block)
        scaled = encode(x, fp_format)
        return cls(scaled.codes, scaled.scale_inv)

    @property
    def format(self) -> str:
        """Name of the format of the codes."""
        return _FORMAT_OF[self.codes.dtype]

    @property
    def bytes(self) -> int:
        """Memory of codes and scales."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale_inv))

    def plain(self) -> Tensor:
        """The plain float32 tensor that it stands for."""
        values = self.codes.float()
        if not self.run:
            return values.mul_(self.scale_inv)
        of_each = self.scale_inv.repeat_interleave(self.run)[: values.numel()]
        return values.mul_(of_each.view(values.shape))

    @torch.no_grad()
    def store_(self, x: Tensor) -> None:
        """Take the values of a float tensor, or the very codes of another such weight."""
        if isinstance(x, ScaledWeight) and (x.format, x.run) == (self.format, self.run):
            other = x
        else:
            plain = x.plain() if isinstance(x, ScaledWeight) else x
            other = type(self).of(plain, self.format, self.run)
        self.codes.copy_(other.codes)
        self.scale_inv.copy_(other.scale_inv)

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["codes", "scale_inv"], self.run

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, Tensor], run: int, size: object, stride: object
    ) -> ScaledWeight:
        return cls(inner["codes"], inner["scale_inv"], run)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Codes for what moves; the plain tensor for everything else."""
        kwargs = dict(kwargs or {})
        if func is _ATEN.copy_.default and isinstance(args[0], ScaledWeight):
            args[0].store_(args[1])
            return args[0]
        if func is _ATEN._to_copy.default and _only_device(kwargs):
            return _mapped(args[0], lambda x: func(x, **kwargs))
        if func in _MOVES and isinstance(args[0], ScaledWeight):
            return _moved(func, args, kwargs)
        plain, named = tree_map_only(ScaledWeight, ScaledWeight.plain, (args, kwargs))
        return func(*plain, **named)

    def fsdp_pre_all_gather(self, mesh: object) -> tuple[tuple[Tensor, ...], object]:
        """FSDP2 gathers the codes as bytes, and each shard's scale."""
        if self.run:
            raise ValueError("a weight with a scale per block is not sharded by FSDP2; use block=0")
        return (self.codes.view(torch.uint8), self.scale_inv.reshape(1)), None

    def fsdp_post_all_gather(
        self,
        gathered: tuple[Tensor, ...],
        metadata: object,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight, each shard's rows under its own scale.

        Nothing is copied: the weight's codes are the buffer that FSDP2 gathered into.
        """
        codes, scales = gathered
        if out is not None:
            return None
        whole = codes.view(self.codes.dtype).view(-1, *self.shape[1:])
        return type(self)(whole, scales, whole.numel() // scales.numel()), (codes, scales)


def _only_device(kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("dtype") in (None, torch.float32)


def _mapped(weight: ScaledWeight, function: Any) -> ScaledWeight:
    return ScaledWeight(
        function(weight.codes).to(weight.codes.dtype), function(weight.scale_inv), weight.run
    )


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    weight, *rest = args
    kwargs.pop("dtype", None)
    if func is _ATEN.clone.default:
        return _mapped(weight, torch.clone)
    if weight.run and func not in (_ATEN.detach.default, _ATEN.alias.default):
        whole = func is not _ATEN.slice.Tensor and func is not _ATEN.split.Tensor
        if not whole:
            return func(weight.plain(), *rest, **kwargs)
    moved = func(weight.codes, *rest, **kwargs)
    if isinstance(moved, Tensor):
        return ScaledWeight(moved, weight.scale_inv, weight.run)
    return [ScaledWeight(part, weight.scale_inv, weight.run) for part in moved]


def scale_weights(model: nn.Module, fp_format: str, *, block: int = 0) -> dict[str, Tensor]:
    """Replace every trained matrix of a model by its codes; shared ones stay shared.

    Returns:
        The values of before, by the names of `model.named_parameters()`.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.dim() < 2 or not parameter.requires_grad:
                continue
            if isinstance(parameter, ScaledWeight):
                continue
            if parameter not in made:
                weight = ScaledWeight.of(parameter.detach(), fp_format, block)
                made[parameter] = nn.Parameter(weight)
            module._parameters[name] = made[parameter]
    before = {id(new): old.detach() for old, new in made.items()}
    return {name: before[id(p)] for name, p in model.named_parameters() if id(p) in before}


# So that checkpoints of such weights load with weights_only=True.
torch.serialization.add_safe_globals([ScaledWeight])
