"""Linear layers whose operands have a scale per row or per block.

Each operand is cast twice, once along the axis that each of its two GEMMs contracts, as hardware
has to: fprop contracts the inputs, dgrad the outputs, wgrad the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foreshock.monitor.operands import Operand
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.block_cast import BlockFormat, BlockTensor, block_cast, hadamard
from foreshock.trainer.precision.linear import ROLES, GemmLinear, check_role

__all__ = ["BlockLinear", "BlockProduct", "emulated_product"]

BlockProduct = Callable[[BlockTensor, BlockTensor], Tensor]
"""Of (*lead, M, K) and (*lead, N, K), contracting K: float32 (*lead, M, N)."""


def emulated_product(a: BlockTensor, b: BlockTensor) -> Tensor:
    """Product of what the casts left, summed in float32 and rounded to bfloat16 at the end."""
    return (a.values() @ b.values().transpose(-1, -2)).bfloat16().float()


class BlockLinear(GemmLinear):
    """Operands in rowwise, block128, mxfp8 or nvfp4.

    Attributes:
        draws: How often stochastic rounding has drawn, int64: the state that a resume needs.
    """

    draws: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        precision: Sequence[PrecisionConfig],
        lead: tuple[int, ...] = (),
        product: BlockProduct = emulated_product,
    ) -> None:
        super().__init__(in_features, out_features, lead=lead)
        if len(set(precision)) != 1:
            raise ValueError("one stack of block or row scales holds one recipe")
        self.recipe = precision[0]
        self.product = product
        self.formats = {role: BlockFormat.of(self.recipe, role) for role in ROLES}
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def operand(self, role: str) -> Operand:
        """Format; each block's scale follows from its own elements."""
        check_role(role)
        to = self.formats[role]
        return Operand(to.name, None, granularity=to.granularity)

    def cast(self, x: Tensor, role: str, *, mixed: bool = False) -> BlockTensor:
        """Cast a matrix (*lead, R, C) whose axis C is contracted, as the operand `role`."""
        recipe = self.recipe
        if mixed and recipe.hadamard:
            x = hadamard(x.transpose(-1, -2), recipe.rounding_seed).transpose(-1, -2)
        chance = None
        if role == "grad_output" and recipe.stochastic_rounding:
            chance = torch.Generator().manual_seed(recipe.rounding_seed * 2**32 + int(self.draws))
            if self.training:
                self.draws += 1
        return block_cast(x, self.formats[role], chance=chance)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, in_features) to (*lead, B, T, out_features), x's type."""
        flat = x.reshape(*self.lead, -1, self.in_features)
        y: Tensor = _BlockMatmul.apply(flat, self.gemm_weight(), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and the recipe of every operand, for the audit that `print(model)` is."""
        recipes = ", ".join(f"{role}: {self._recipe_of(role)}" for role in ROLES)
        return f"{super().extra_repr()}, emulated, {recipes}"

    def _recipe_of(self, role: str) -> str:
        to = self.formats[role]
        size = "row" if to.size is None else f"{to.rows} x {to.size}"
        scales = "powers of two" if to.power_of_two else "exact scales"
        if to.element == "e2m1":
            scales = "e4m3 scales under one float32"
        return f"{to.name}, per {size}, {scales}"


class _BlockMatmul(torch.autograd.Function):
    """x (*lead, N, in), weight (*lead, out, in) -> float32 (*lead, N, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: BlockLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return layer.product(layer.cast(x, "input"), layer.cast(weight, "weight"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        layer: BlockLinear = ctx.layer
        by_output = layer.cast(weight.transpose(-1, -2), "weight")
        grad_x = layer.product(layer.cast(grad_output, "grad_output"), by_output)
        by_token = layer.cast(grad_output.transpose(-1, -2), "grad_output", mixed=True)
        inputs = layer.cast(x.transpose(-1, -2), "input", mixed=True)
        return grad_x, layer.product(by_token, inputs), None
