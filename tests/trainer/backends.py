"""What every FP8 backend must fulfil, on whatever device: shared by tests/trainer and tests/gpu."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision import Fp8Linear, GemmLinear, gemm_linear
from foreshock.trainer.precision.cast import saturating_cast
from foreshock.trainer.precision.native_cast import cast_both

__all__ = [
    "Pass",
    "check_casts",
    "check_products",
    "layer_of",
    "one_pass",
    "sqnr",
]

PRODUCT_SQNR = 45.0
"""dB: two roundings to bfloat16 of the same sum, at 52 dB each, and the sums' own order."""
FAST_SQNR = 38.0
"""dB: where tensor cores keep 14 bits of a sum between promotions (use_fast_accum)."""


def sqnr(exact: Tensor, got: Tensor) -> float:
    """Of `got` in dB, power of `exact` over that of the difference."""
    exact, got = exact.detach().double().cpu(), got.detach().double().cpu()
    return float(10 * torch.log10(exact.square().sum() / (got - exact).square().sum()))


def layer_of(recipe: PrecisionConfig, sizes: tuple[int, int], device: str) -> GemmLinear:
    """A linear layer with the same weights for every recipe."""
    layer = gemm_linear(*sizes, precision=[recipe])
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(sizes[1], sizes[0], generator=generator) * 0.1
    layer.weight.data = weight
    return layer.to(device)


class Pass:
    """What a forward and backward gave: result, gradients of input and weight."""

    def __init__(self, y: Tensor, grad_x: Tensor, grad_weight: Tensor) -> None:
        self.parts = {"fprop": y, "dgrad": grad_x, "wgrad": grad_weight}


def one_pass(
    layer: GemmLinear, seed: int, dtype: torch.dtype = torch.float32, tokens: int = 48
) -> Pass:
    """One step on tokens and gradients that follow from the seed."""
    device = layer.weight.device
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens // 2, layer.in_features, generator=generator)
    grad = torch.randn(2, tokens // 2, layer.out_features, generator=generator) * 1e-3
    x = x.to(device, dtype).requires_grad_()
    layer.weight.grad = None
    layer.begin_step()
    y = layer(x)
    torch.autograd.backward(y, grad.to(device, dtype))
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert y.dtype == x.dtype
    assert layer.weight.grad.dtype == torch.float32
    return Pass(y.detach(), x.grad, layer.weight.grad.clone())


def check_casts(fp8_format: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """Both layouts hold the emulated cast's codes bit for bit, and the amax is right."""
    generator = torch.Generator().manual_seed(2)
    spread = torch.exp(5 * torch.randn(shape, generator=generator))
    x = (torch.randn(shape, generator=generator) * spread).to(dtype)
    scale = torch.tensor(37.3)
    rows, columns, amax = cast_both(x.to(device), scale.to(device), fp8_format)
    expected = saturating_cast(x.float(), scale, fp8_format).view(torch.uint8)
    assert torch.equal(rows.view(torch.uint8).cpu(), expected)
    assert torch.equal(columns.view(torch.uint8).cpu(), expected.t())
    assert amax.item() == x.abs().max().item()
    x[0, 0], x[-1, -1] = float("inf"), float("nan")
    rows, columns, amax = cast_both(x.to(device), scale.to(device), fp8_format)
    largest = torch.finfo(rows.dtype).max
    assert rows[0, 0].item() == columns[0, 0].item() == largest
    assert rows.float().isnan().sum() == columns.float().isnan().sum() == 1
    assert amax.isnan()


def check_products(
    recipe: PrecisionConfig,
    sizes: tuple[int, int],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    least: float = PRODUCT_SQNR,
    fast: float = PRODUCT_SQNR,
) -> None:
    """A backend and the emulated one, over three steps: same scales, products within the SQNR."""
    ours = layer_of(recipe, sizes, device)
    emulated = layer_of(replace(recipe, backend="emulated"), sizes, device)
    for seed in range(3):
        here, there = one_pass(ours, seed, dtype), one_pass(emulated, seed, dtype)
        for gemm, got in here.parts.items():
            assert sqnr(there.parts[gemm], got) > (fast if gemm == "fprop" else least), gemm
        if isinstance(ours, Fp8Linear) and isinstance(emulated, Fp8Linear):
            for role in ("input", "weight"):
                # The gradient's amax follows from what the products gave.
                mine, theirs = ours.scaling_of(role), emulated.scaling_of(role)
                assert torch.equal(mine.used, theirs.used), role
                assert torch.equal(mine.history, theirs.history), role
            assert torch.equal(
                ours.scaling_of("grad_output").history, emulated.scaling_of("grad_output").history
            )
