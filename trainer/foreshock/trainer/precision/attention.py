"""The two products of causal attention, q k^T and P v, behind one kind of module.

Projections, head norms and rotary positions stay with the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from foreshock.monitor.operands import Operand
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.cast import quantize
from foreshock.trainer.precision.scaling import Scaling
from foreshock.trainer.precision.support import check_alone, require_transformer_engine

__all__ = ["AttentionCore", "Fp8Attention", "HeadSizes", "PlainAttention", "attention_core"]

_SHOWN: Final = ("query", "key", "value", "attention_probs")
"""Operands that a monitor sees; the gradients it does not."""
_FORMATS: Final = {
    "query": "e4m3",
    "key": "e4m3",
    "value": "e4m3",
    "attention_probs": "e4m3",
    "grad_output": "e5m2",
    "grad_logits": "e5m2",
}


def te_attention(
    scale: float, precision: Sequence[PrecisionConfig], heads: HeadSizes | None
) -> AttentionCore:
    """Transformer Engine's."""
    check_alone(precision)
    require_transformer_engine()
    from foreshock.trainer.precision.transformer_engine import TeAttention

    if heads is None:
        raise ValueError("Transformer Engine's attention needs the sizes of the heads")
    return TeAttention(scale=scale, heads=heads)


def attention_core(
    *,
    scale: float,
    precision: Sequence[PrecisionConfig],
    lead: tuple[int, ...] = (),
    heads: HeadSizes | None = None,
) -> AttentionCore:
    """Make the attention that the recipes ask for.

    Args:
        scale: Factor of q k^T before the softmax.
        precision: The recipe, or one per model of a stack.
        lead: () for one model, (E,) for a stack.
        heads: Their numbers and width; only Transformer Engine wants to know.

    Raises:
        ValueError: The stack's recipes differ in `attention`, or the backend cannot do it.
    """
    names = {p.attention for p in precision}
    if len(names) > 1:
        raise ValueError(f"one stack holds one kind of attention, not {sorted(names)}")
    if names == {"fp8"} and precision[0].backend == "transformer_engine":
        return te_attention(scale, precision, heads)
    if names == {"fp8"}:
        return Fp8Attention(scale=scale, precision=precision, lead=lead)
    if names != {"plain"}:
        # It stands on this module.
        from foreshock.trainer.precision.biased_attention import BiasedAttention

        return BiasedAttention(precision[0].attention, scale=scale, lead=lead)
    return PlainAttention(scale=scale, lead=lead)


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """Of an attention.

    Attributes:
        query: Number of query heads.
        key: Number of key heads, and of value heads.
        width: Features of each.
    """

    query: int
    key: int
    width: int


class AttentionCore(nn.Module, ABC):
    """softmax(scale q k^T + causal mask) v, per head.

    Args:
        scale: Factor of q k^T before the softmax.
        lead: () for one model, (E,) for a stack whose E models are folded into the batch.
    """

    product_name = "torch, scaled_dot_product_attention"

    def __init__(self, *, scale: float, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.scale, self.lead = scale, lead

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the values.

        Args:
            q: Shape (prod(lead) B, H, T, K).
            k: The same, or with fewer heads that divide H: grouped queries, query head h attends
                to key head h // (H / key heads).
            v: Shape of k.

        Returns:
            Shape of q.
        """

    def extra_repr(self) -> str:
        """Scale, for the audit that `print(model)` is."""
        return f"scale={self.scale:.6g}"


class PlainAttention(AttentionCore):
    """torch's own, in the type of its inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `AttentionCore.forward`."""
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=k.shape[1] != q.shape[1]
        )


class _ShownOperand(nn.Module):
    """Where a monitor sees an operand: called with the tensor once its scale is known."""

    def __init__(self, role: str, scaling: Scaling) -> None:
        super().__init__()
        self.tapped_role = role
        # In a tuple, so that it stays the core's own submodule and no second one.
        self._scaling = (scaling,)

    def tapped_operand(self) -> Operand:
        """The cast that the latest tensor went through."""
        scaling = self._scaling[0]
        return Operand(scaling.fp8_format, scaling.used)

    def forward(self, x: Tensor) -> Tensor:
        """X as it is."""
        return x


class Fp8Attention(AttentionCore):
    """Both products in FP8, forward and backward, as cuDNN's FP8 attention under fp8_dpa.

    q, k, v and the probabilities P are E4M3; the output's gradient dO and dS, that of the logits,
    E5M2; one scale per tensor and model. Softmax, D = rowsum(dO O) and sums are float32, and the
    result is not cast: the projection that follows does that. Unlike the fused kernel, which casts
    the P that its running maximum gives, this casts the normalised P.

    Attributes:
        scaling: Scale state per operand: query, key, value, attention_probs, grad_output and
            grad_logits.
    """

    def __init__(
        self, *, scale: float, precision: Sequence[PrecisionConfig], lead: tuple[int, ...]
    ) -> None:
        super().__init__(scale=scale, lead=lead)
        # Rows and blocks are no granularity of the fused kernels: they take current scales.
        recipes = [p if p.scaling == "delayed" else _current(p) for p in precision]
        self.scaling = nn.ModuleDict(
            {role: Scaling(recipes, lead=lead, fp8_format=f) for role, f in _FORMATS.items()}
        )
        # A stack measures by itself.
        self.operands = nn.ModuleDict()
        for role in () if lead else _SHOWN:
            scaling = self.scaling[role]
            assert isinstance(scaling, Scaling)
            self.operands[role] = _ShownOperand(role, scaling)
        self._trains = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `AttentionCore.forward`."""
        self._trains = torch.is_grad_enabled()
        grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
        mixed: Tensor = _Fp8Attention.apply(  # type: ignore[no-untyped-call]
            grouped, k.unsqueeze(2), v.unsqueeze(2), self
        )
        return mixed.flatten(1, 2)

    def cast_operand(self, role: str, x: Tensor) -> Tensor:
        """What the cast of x (prod(lead) B, ...) as `role` leaves, float32."""
        scaling = self.scaling[role]
        assert isinstance(scaling, Scaling)
        stacked = x.reshape(*self.lead, -1, *x.shape[1:])
        scale = scaling.step(stacked, update=self.training)
        if role in self.operands and not torch.compiler.is_compiling():
            # Inside an autograd function gradients are off, which to a monitor is evaluation.
            with torch.set_grad_enabled(self._trains):
                self.operands[role](x)
        codes = quantize(stacked, scale, scaling.fp8_format).float()
        inverse = scaling.inverse(scale)
        inverse = inverse.view(inverse.shape + (1,) * (codes.dim() - inverse.dim()))
        return (codes * inverse).view(x.shape)


def _current(recipe: PrecisionConfig) -> PrecisionConfig:
    return replace(recipe, scaling="current", stochastic_rounding=False, hadamard=False)


class _Fp8Attention(torch.autograd.Function):
    """q (N, key heads, G, T, K), k and v (N, key heads, 1, T, K) -> shape of q."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, core: Fp8Attention) -> Tensor:
        q = core.cast_operand("query", q)
        k, v = core.cast_operand("key", k), core.cast_operand("value", v)
        tokens = q.shape[-2]
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        logits = (q @ k.transpose(-1, -2) * core.scale).masked_fill(future, -torch.inf)
        probabilities = torch.softmax(logits, -1)
        cast = core.cast_operand("attention_probs", probabilities)
        mixed = cast @ v
        ctx.save_for_backward(q, k, v, probabilities, cast, mixed)
        ctx.core = core
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, probabilities, cast, mixed = ctx.saved_tensors
        core: Fp8Attention = ctx.core
        grad = core.cast_operand("grad_output", grad_output)
        grad_v = (cast.transpose(-1, -2) @ grad).sum(2, keepdim=True)
        offset = (grad * mixed).sum(-1, keepdim=True)
        slope = probabilities * (grad @ v.transpose(-1, -2) - offset)
        slope = core.cast_operand("grad_logits", slope)
        grad_q = slope @ k * core.scale
        grad_k = (slope.transpose(-1, -2) @ q).sum(2, keepdim=True) * core.scale
        return grad_q, grad_k, grad_v, None
