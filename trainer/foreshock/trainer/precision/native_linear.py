"""The native backend: torch's scaled products of FP8 matrices, in fprop, dgrad and wgrad.

Scales, histories and faults are those of the emulated layers, and so are the codes, bit for bit.
Only the product differs: summed by the device, with both scales applied before it is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.block_cast import BlockTensor
from foreshock.trainer.precision.block_linear import BlockLinear
from foreshock.trainer.precision.cast import GEMM_DTYPE
from foreshock.trainer.precision.linear import Fp8Linear, bf16_product
from foreshock.trainer.precision.native_cast import Codes, cast_both, scaled_product
from foreshock.trainer.precision.scaling import tensor_amax
from foreshock.trainer.precision.support import require_block_products

__all__ = ["NativeBlockLinear", "NativeLinear", "native_block_product"]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A weight's codes, and which state of the weight they are of."""

    codes: Codes
    version: tuple[int, int]


class NativeLinear(Fp8Linear):
    """One FP8 scale per tensor, delayed or current, and torch._scaled_mm.

    Between `begin_step` and the weight's next change its codes are kept, for all micro-batches of a
    step; an amax history sees the weight once a step then.
    """

    product_name = "torch._scaled_mm"

    def __init__(
        self, in_features: int, out_features: int, *, precision: Sequence[PrecisionConfig]
    ) -> None:
        super().__init__(in_features, out_features, precision=precision)
        self._keeps, self._kept = False, None  # type: bool, _Kept | None

    def begin_step(self) -> None:
        """As `GemmLinear.begin_step`."""
        self._keeps, self._kept = True, None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, in_features) to (B, T, out_features), x's type."""
        flat, weight = x.reshape(-1, self.in_features), self.gemm_weight()
        y = bf16_product(flat, weight) if self.in_bf16 else self._product(flat, weight)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = _NativeMatmul.apply(x, weight, self)  # type: ignore[no-untyped-call]
        return y

    def codes(self, role: str, x: Tensor) -> Codes:
        """Cast a matrix as the operand `role`, and let the scale state see it while training."""
        scaling = self.scaling_of(role)
        scale = scaling.in_force()
        amax = None
        if scale is None:
            amax = scaling.agreed(tensor_amax(x, 0))
            scale = scaling.scale_for(amax)
        rows, columns, found = cast_both(x, scale, scaling.fp8_format)
        scaling.saw(scaling.agreed(found) if amax is None else amax, scale, update=self.training)
        return Codes(rows, columns, scaling.inverse(scale))

    def weight_codes(self, weight: Tensor) -> Codes:
        """As `codes`, or what this step's first micro-batch left."""
        version = (weight.data_ptr(), weight._version)
        if self._kept is not None and self._kept.version == version and self.training:
            return self._kept.codes
        codes = self.codes("weight", weight)
        if self._keeps and self.training and weight is self.weight:
            self._kept = _Kept(codes, version)
        return codes

    def extra_repr(self) -> str:
        """Sizes and recipe; formats and scaling stand on the lines of the children."""
        return super().extra_repr().replace("emulated fp8", "native fp8")


class _NativeMatmul(torch.autograd.Function):
    """x (N, in), weight (out, in) -> (N, out), rounded to bfloat16, in x's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: NativeLinear) -> Tensor:
        inputs, weights = layer.codes("input", x), layer.weight_codes(weight)
        ctx.save_for_backward(inputs.columns, weights.columns, inputs.inverse, weights.inverse)
        ctx.layer, ctx.dtype = layer, x.dtype
        y = scaled_product(
            inputs.rows, weights.rows, inputs.inverse, weights.inverse, out=GEMM_DTYPE, fast=True
        )
        # In here, so that the gradient comes back in the type of x.
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        by_input, by_weight, input_inverse, weight_inverse = ctx.saved_tensors
        grads = ctx.layer.codes("grad_output", grad_output)
        grad_x = scaled_product(
            grads.rows, by_weight, grads.inverse, weight_inverse, out=GEMM_DTYPE, fast=False
        )
        grad_weight = scaled_product(
            grads.columns, by_input, grads.inverse, input_inverse, out=torch.float32, fast=False
        )
        return grad_x.to(ctx.dtype), grad_weight, None


def native_block_product(a: BlockTensor, b: BlockTensor) -> Tensor:
    """Product of rows with one scale each, or of blocks of 128: float32 (M, N)."""
    if a.format.size is None:
        return scaled_product(
            a.codes.contiguous(),
            b.codes.contiguous(),
            a.inverse,
            b.inverse.t().contiguous(),
            out=GEMM_DTYPE,
            fast=True,
        ).float()
    return _block_product(a, b).float()


def _block_product(a: BlockTensor, b: BlockTensor) -> Tensor:
    rows, columns = len(a.codes), len(b.codes)
    left, right = _whole_blocks(a), _whole_blocks(b)
    y = functional.scaled_mm(
        left,
        right.t(),
        scale_a=_laid_out(a, left),
        scale_recipe_a=_recipe(a),
        scale_b=_laid_out(b, right),
        scale_recipe_b=_recipe(b),
        output_dtype=GEMM_DTYPE,
    )
    return y[:rows, :columns]


def _recipe(x: BlockTensor) -> functional.ScalingType:
    kinds = functional.ScalingType
    return kinds.BlockWise1x128 if x.format.rows == 1 else kinds.BlockWise128x128


def _whole_blocks(x: BlockTensor) -> Tensor:
    """Codes with zeros to the end of the last block, and to a multiple of 16 rows."""
    rows, columns = x.codes.shape
    short = -columns % 128, -rows % (16 if x.format.rows == 1 else 128)
    bits = functional.pad(x.codes.contiguous().view(torch.uint8), (0, short[0], 0, short[1]))
    return bits.view(x.codes.dtype)


def _laid_out(x: BlockTensor, codes: Tensor) -> Tensor:
    """Scales as cuBLAS reads them (torch's checks name the layout; tests/gpu pins it).

    A scale per row and block: (R, blocks), rows next to each other. A scale per 128 x 128: (blocks,
    row blocks), the blocks of a row next to each other, with space for a multiple of 4.
    """
    if x.format.rows == 1:
        padded = functional.pad(x.inverse, (0, 0, 0, len(codes) - len(x.inverse)), value=1.0)
        return padded.t().contiguous().t()
    return functional.pad(x.inverse, (0, -x.inverse.shape[1] % 4)).t()


class NativeBlockLinear(BlockLinear):
    """A scale per row, or per block of 128, and torch._scaled_mm."""

    product_name = "torch._scaled_mm"

    def __init__(
        self, in_features: int, out_features: int, *, precision: Sequence[PrecisionConfig]
    ) -> None:
        if precision[0].scaling == "block128":
            require_block_products(in_features, out_features)
        super().__init__(
            in_features, out_features, precision=precision, product=native_block_product
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, in_features) to (B, T, out_features), x's type."""
        return super().forward(x)

    def extra_repr(self) -> str:
        """Sizes and recipe."""
        return super().extra_repr().replace("emulated", "native")
