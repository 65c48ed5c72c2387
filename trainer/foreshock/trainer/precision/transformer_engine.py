"""The transformer_engine backend: NVIDIA's linear layer and its FP8 attention.

The one module that imports Transformer Engine, which needs a CUDA device. The library keeps the
state of scales per process and layer, and renews it when the outermost `autocast` ends: around the
blocks of a whole model, not around each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.attention import AttentionCore, HeadSizes
from foreshock.trainer.precision.linear import GemmLinear

__all__ = ["TeAttention", "TeLinear", "autocast_of", "recipe_of"]


def recipe_of(config: PrecisionConfig) -> Any:
    """Transformer Engine's recipe of the same name."""
    fp8_format = Format.HYBRID if config.gradient_format == "e5m2" else Format.E4M3
    attention = config.attention == "fp8"
    if config.scaling == "current":
        return Float8CurrentScaling(fp8_format=fp8_format, fp8_dpa=attention)
    return DelayedScaling(
        fp8_format=fp8_format,
        amax_history_len=config.history,
        amax_compute_algo="max",
        margin=config.margin,
        fp8_dpa=attention,
    )


def autocast_of(config: PrecisionConfig) -> Callable[[], AbstractContextManager[object]]:
    """Makes what stands around a model's blocks."""
    recipe = recipe_of(config)

    def around() -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = te.autocast(enabled=True, recipe=recipe)
        return found

    return around


class TeLinear(te.Linear):  # type: ignore[misc]
    """te.Linear with a float32 weight, initialised where and as our other layers are.

    Counts as a `GemmLinear`, so that loops find it by the same name; its faults are refused.
    """

    product_name = "Transformer Engine"

    def __init__(self, in_features: int, out_features: int, *, precision: PrecisionConfig) -> None:
        if in_features % 16 or out_features % 16:
            raise ValueError(
                f"Transformer Engine's FP8 layers take sizes that divide by 16, not {in_features} "
                f"x {out_features}: set model.ffn_width (fog_* take 3/2 of it), or take native"
            )
        super().__init__(in_features, out_features, bias=False, params_dtype=torch.float32)
        self.recipe = precision
        self.lead: tuple[int, ...] = ()
        self.in_bf16 = False
        # On the CPU first: a seed then means the same initial weights on every backend.
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self._first: bool | None = None

    def begin_step(self) -> None:
        """A step of training begins: its first micro-batch casts the weight, others reuse that."""
        self._first = True

    def to_bf16(self) -> None:
        """As `Fp8Linear.to_bf16`."""
        self.in_bf16 = True

    def to_fp8(self) -> None:
        """As `Fp8Linear.to_fp8`."""
        self.in_bf16 = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, in_features) to (B, T, out_features), x's type."""
        first = self._first if self.training else None
        if self._first is not None and self.training:
            self._first = False
        outside = te.autocast(enabled=False) if self.in_bf16 else nullcontext()
        # float32 weights beside bfloat16 activations is what it knows as autocast.
        with outside, torch.autocast("cuda", torch.bfloat16):
            y: Tensor = super().forward(x.to(torch.bfloat16), is_first_microbatch=first)
        return y.to(x.dtype)

    def set_input_gain(self, gain: Tensor | None) -> None:
        """Refused: Transformer Engine casts inside."""
        if gain is not None:
            raise ValueError("an OutlierRamp needs the emulated or the native backend")

    def smoothed(self, x: Tensor, gain: Tensor) -> Tensor:
        """Refused, for the same reason."""
        raise ValueError(
            "llama3_smooth_swiglu (per channel) needs the emulated or the native backend; "
            "llama3_smooth_swiglu_token runs on transformer_engine too"
        )

    def extra_repr(self) -> str:
        """Sizes and recipe, for the audit that `print(model)` is."""
        recipe = self.recipe
        scales = f"delayed, history={recipe.history}" if recipe.scaling == "delayed" else "current"
        formats = f"{recipe.forward_format} forward, {recipe.gradient_format} gradients"
        state = " (now in bf16)" if self.in_bf16 else ""
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, transformer_engine fp8, {formats}, {scales}{state}"


GemmLinear.register(TeLinear)


def _by_token(x: Tensor) -> Tensor:
    """Of shape (B, T, H, K) in bfloat16, with the strides of a new tensor.

    A compiler may give an axis of one head any stride; torch calls that contiguous, but Transformer
    Engine reads the layout from the strides.
    """
    return x.to(torch.bfloat16).contiguous().view(-1).view(x.shape)


class TeAttention(AttentionCore):
    """Both products in FP8, forward and backward, by cuDNN's fused kernel (fp8_dpa).

    Head width 128; and no attention in another precision may have run in the process before, since
    Transformer Engine keeps the backend that it chose.
    """

    def __init__(self, *, scale: float, heads: HeadSizes) -> None:
        super().__init__(scale=scale, lead=())
        if heads.width != 128:
            raise ValueError(
                f"head width is {heads.width}; Transformer Engine's FP8 attention takes 128: set "
                "model.heads to model.width / 128"
            )
        self.fused: nn.Module = te.DotProductAttention(
            heads.query,
            heads.width,
            num_gqa_groups=heads.key,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="causal",
            softmax_scale=scale,
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `AttentionCore.forward`."""
        mixed: Tensor = self.fused(*(_by_token(x.transpose(1, 2)) for x in (q, k, v)))
        # (B, T, H K)
        by_head = mixed.view(*mixed.shape[:2], q.shape[1], q.shape[3])
        return by_head.transpose(1, 2).to(q.dtype)

    def extra_repr(self) -> str:
        """Scale and recipe, for the audit that `print(model)` is."""
        return f"{super().extra_repr()}, transformer_engine fp8_dpa"
