"""Linear layers whose three GEMMs (fprop, dgrad, wgrad) run in low precision.

A layer holds one weight matrix or, with lead = (E,), those of E models that train as one. No
bias, and no GEMM outside linear layers: attention's two products stay with the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from foreshock.monitor.operands import Operand, Part
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.cast import GEMM_DTYPE, quantize
from foreshock.trainer.precision.fast_stack import stack_kernels_for
from foreshock.trainer.precision.gemm import gemm
from foreshock.trainer.precision.scaling import Scaling

__all__ = ["ROLES", "Bf16Linear", "Fp8Linear", "GemmLinear", "bf16_product", "check_role"]

ROLES: Final = ("input", "weight", "grad_output")


class GemmLinear(nn.Module, ABC):
    """y = x W^T with a high-precision master weight.

    Attributes:
        weight: float32 of shape (*lead, out_features, in_features).
        product: Which product it calls, for `precision.describe`.
    """

    product_name = "torch, bf16"

    def __init__(self, in_features: int, out_features: int, *, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.lead = in_features, out_features, lead
        self.weight = nn.Parameter(torch.zeros(*lead, out_features, in_features))
        self._input_gain: Tensor | None = None
        self._parts: Mapping[str, Part] = {}
        # A pre-hook, so that a monitor's hooks see the input as the GEMM does.
        self.register_forward_pre_hook(_apply_input_gain)

    @abstractmethod
    def operand(self, role: str) -> Operand:
        """How the operand `role` (input, weight, grad_output) is cast in the current call."""

    def begin_step(self) -> None:
        """A step of training begins: what is kept of weights' casts is out of date.

        Layers that keep any do so from the first call on, over all micro-batches of a step.
        """

    def keep_piece(self, weight: Tensor, parts: Mapping[str, Part]) -> None:
        """Hold a piece of the weight from now on; other processes hold the others.

        Args:
            weight: The piece, (out_features, in_features) of this process.
            parts: What this process's operands stand for, by role.
        """
        self.weight = nn.Parameter(weight)
        self.out_features, self.in_features = weight.shape
        self._parts = dict(parts)

    def part(self, role: str) -> Part | None:
        """What this process's operand stands for; None where it is whole."""
        return self._parts.get(role)

    def set_input_gain(self, gain: Tensor | None) -> None:
        """Multiply the input's features by it and the weight's columns by its inverse (a fault).

        In exact arithmetic nothing changes; a cast of input and weight is all that suffers.

        Args:
            gain: Shape (*lead, in_features); None stops it.
        """
        self._input_gain = None if gain is None else gain.to(self.weight.device)

    def smoothed(self, x: Tensor, gain: Tensor) -> Tensor:
        """The layer's result for x, with x * gain and weight / gain as the operands that are cast.

        Args:
            x: Shape (*lead, B, T, in_features).
            gain: Shape (*lead, in_features), not zero; no gradient goes through it.
        """
        held = self._input_gain
        self._input_gain = gain if held is None else gain * held
        try:
            y: Tensor = self(x)
        finally:
            self._input_gain = held
        return y

    def gemm_weight(self) -> Tensor:
        """The weight as its operand is cast: columns divided by the input's gain, if there is one.

        What a monitor measures (`foreshock.monitor.operands.ChangedWeight`).
        """
        gain = self._input_gain
        return self.weight if gain is None else self.weight / gain[..., None, :]

    def extra_repr(self) -> str:
        """Sizes, for the audit that `print(model)` is."""
        stack = f", stack={self.lead[0]}" if self.lead else ""
        return f"{self.in_features}, {self.out_features}{stack}"


def _apply_input_gain(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    assert isinstance(module, GemmLinear)
    gain = module._input_gain
    return None if gain is None else (args[0] * gain[..., None, None, :],)


class Bf16Linear(GemmLinear):
    """bfloat16 operands, float32 result: the reference that FP8 is compared with."""

    def operand(self, role: str) -> Operand:
        """Always bf16, unscaled."""
        check_role(role)
        return Operand("bf16", None, part=self.part(role))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, in_features) to (*lead, B, T, out_features), x's type."""
        if torch.compiler.is_compiling() and not self.lead:
            weight = self.gemm_weight().to(GEMM_DTYPE)
            return nn.functional.linear(x.to(GEMM_DTYPE), weight).to(x.dtype)
        flat = x.reshape(*self.lead, -1, self.in_features).to(GEMM_DTYPE)
        y = bf16_product(flat, self.gemm_weight())
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and recipe."""
        return f"{super().extra_repr()}, bf16"


class Fp8Linear(GemmLinear):
    """FP8 operands in all three GEMMs: real float8 casts, GEMM on the values that they leave.

    Input and weight are cast to the forward format, the output gradient to the gradient format,
    each once per step with one scale per tensor. The GEMM multiplies the FP8 numbers exactly as
    stored, and its bfloat16 result is divided by both scales, as FP8 hardware does it.

    Attributes:
        scaling: Scale state per role. In a stack of mixed recipes, models with the bf16 backend
            have entries too, which mean nothing.
    """

    bf16_models: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        precision: Sequence[PrecisionConfig],
        lead: tuple[int, ...] = (),
    ) -> None:
        super().__init__(in_features, out_features, lead=lead)
        quantized = [p for p in precision if p.backend != "bf16"]
        formats = {(p.forward_format, p.gradient_format) for p in quantized}
        if len(formats) != 1:
            raise ValueError(f"one stack holds one pair of FP8 formats, not {sorted(formats)}")
        forward, gradient = formats.pop()
        names = {"input": forward, "weight": forward, "grad_output": gradient}
        self.scaling = nn.ModuleDict(
            {role: Scaling(precision, lead=lead, fp8_format=names[role]) for role in ROLES}
        )
        unscaled = torch.tensor([p.backend == "bf16" for p in precision]).view(lead)
        mixed = len(quantized) < len(precision)
        self.register_buffer("bf16_models", unscaled if mixed else None, persistent=False)
        self.in_bf16 = False

    def set_margin(self, margin: int) -> None:
        """As `Scaling.set_margin`, for all three operands."""
        for role in ROLES:
            self.scaling_of(role).set_margin(margin)

    def set_history(self, length: int) -> None:
        """As `Scaling.set_history`, for all three operands."""
        for role in ROLES:
            self.scaling_of(role).set_history(length)

    def to_bf16(self) -> None:
        """Compute all three GEMMs in bfloat16 from the next forward on.

        Between a step's last backward and the next forward; scale state stays as it is. A
        checkpoint keeps it.
        """
        self.in_bf16 = True

    def to_fp8(self) -> None:
        """Undo `to_bf16`: from the next forward on operands are cast again.

        Delayed scales are those of before; where tensors grew since, follow it with a margin or
        let the history fill for some steps.
        """
        self.in_bf16 = False

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_bf16:
            destination[prefix + "in_bf16"] = torch.tensor(True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self.in_bf16 = bool(state_dict.pop(prefix + "in_bf16", False))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def scaling_of(self, role: str) -> Scaling:
        """Scale state of one operand: where scale faults act."""
        check_role(role)
        scaling = self.scaling[role]
        assert isinstance(scaling, Scaling)
        return scaling

    def operand(self, role: str) -> Operand:
        """Format and scale in force.

        After a forward: for input and weight the scales it used, for grad_output the one that the
        backward to come will use (None under current scaling, where that tensor decides).
        """
        scaling = self.scaling_of(role)
        if self.in_bf16:
            return Operand("bf16", None, part=self.part(role))
        scale = scaling.in_force() if role == "grad_output" else scaling.used
        return Operand(scaling.fp8_format, scale, part=self.part(role))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, in_features) to (*lead, B, T, out_features), x's type."""
        flat = x.reshape(*self.lead, -1, self.in_features)
        y: Tensor
        if self.in_bf16:
            y = bf16_product(flat, self.gemm_weight())
        else:
            y = _QuantizedMatmul.apply(flat, self.gemm_weight(), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def cast_operand(self, role: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cast x as the operand `role`, and let the scale state see it while training.

        Returns:
            x times scale, cast, in `GEMM_DTYPE`; and 1 / scale, shape (*lead, 1, 1).
        """
        scaling = self.scaling_of(role)
        scale = scaling.step(x, update=self.training)
        codes, inverse = quantize(x, scale, scaling.fp8_format), scaling.inverse(scale)
        if self.bf16_models is not None:
            codes = torch.where(self.bf16_models[..., None, None], x.to(GEMM_DTYPE), codes)
            inverse = inverse.masked_fill(self.bf16_models, 1.0)
        return codes, inverse[..., None, None]

    def extra_repr(self) -> str:
        """Sizes and recipe; formats and scaling stand on the lines of the children."""
        state = " (now in bf16)" if self.in_bf16 else ""
        return f"{super().extra_repr()}, emulated fp8{state}"


def bf16_product(x: Tensor, weight: Tensor) -> Tensor:
    """X W^T with all three GEMMs in bfloat16: x (*lead, N, in), weight (*lead, out, in)."""
    y: Tensor = _Bf16Matmul.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Bf16Matmul(torch.autograd.Function):
    """x (*lead, N, in), weight (*lead, out, in) -> float32 (*lead, N, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.to(GEMM_DTYPE), weight.to(GEMM_DTYPE)
        ctx.save_for_backward(x, weight)
        return gemm(x, weight.transpose(-1, -2)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad_output.to(GEMM_DTYPE)
        return gemm(grad, weight).float(), gemm(grad.transpose(-1, -2), x).float()


class _QuantizedMatmul(torch.autograd.Function):
    """x (*lead, N, in), weight (*lead, out, in) -> float32 (*lead, N, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Fp8Linear) -> Tensor:
        x_codes, x_inverse = layer.cast_operand("input", x)
        w_codes, w_inverse = layer.cast_operand("weight", weight)
        ctx.save_for_backward(x_codes, w_codes, x_inverse, w_inverse)
        ctx.layer = layer
        return _rescaled(gemm(x_codes, w_codes.transpose(-1, -2)), x_inverse, w_inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x_codes, w_codes, x_inverse, w_inverse = ctx.saved_tensors
        g_codes, g_inverse = ctx.layer.cast_operand("grad_output", grad_output)
        grad_x = _rescaled(gemm(g_codes, w_codes), g_inverse, w_inverse)
        product = gemm(g_codes.transpose(-1, -2), x_codes)
        grad_weight = _rescaled(product, g_inverse, x_inverse)
        return grad_x, grad_weight, None


def _rescaled(product: Tensor, inverse_a: Tensor, inverse_b: Tensor) -> Tensor:
    kernels = stack_kernels_for(product, 1) if inverse_a.dim() == 3 else None
    if kernels is not None and product.is_contiguous():
        factor = (inverse_a * inverse_b).reshape(-1)
        fast: Tensor = kernels.rescaled_per_model(product, factor)
        return fast
    # One after the other: the product of two inverse scales can leave float32's range.
    result = product.float()
    if inverse_a.dim() == 2:
        return result.mul_(inverse_a).mul_(inverse_b)
    return result.mul_(inverse_a * inverse_b)


def check_role(role: str) -> None:
    """Raise a ValueError unless a linear layer has this operand."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; a linear layer has {', '.join(ROLES)}")
