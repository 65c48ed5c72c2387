"""Casts by rows and blocks and FP8 attention, against what they are defined by."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from foreshock.monitor.blocks import block_sums
from foreshock.monitor.record import FIELD_REDUCTIONS
from foreshock.trainer.config import PrecisionConfig, ScalingName
from foreshock.trainer.loop import StepResult, train
from foreshock.trainer.precision import BlockLinear, attention_core, gemm_linear
from foreshock.trainer.precision.attention import Fp8Attention
from foreshock.trainer.precision.block_cast import (
    BlockFormat,
    block_cast,
    hadamard,
    round_e2m1,
)
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.stacked import train_stack

BLOCKS: tuple[ScalingName, ...] = ("rowwise", "block128", "mxfp8", "nvfp4")
LONG: tuple[ScalingName, ...] = ("rowwise", "block128", "nvfp4")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def sqnr(exact: Tensor, got: Tensor) -> float:
    exact, got = exact.double(), got.double()
    return float(10 * torch.log10(exact.square().sum() / (got - exact).square().sum()))


@pytest.mark.parametrize("scaling", BLOCKS)
@pytest.mark.parametrize("role", ["input", "weight"])
@pytest.mark.parametrize("shape", [(64, 256), (5, 200), (1, 1)])
def test_casts_lose_what_the_monitor_says(
    scaling: ScalingName, role: str, shape: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape) * torch.exp(3 * torch.randn(shape))
    x[0, : shape[1] // 2] = 0
    to = BlockFormat.of(PrecisionConfig(scaling=scaling), role)
    left = block_cast(x, to).values()
    row, _ = block_sums(x, format=to.name, granularity=to.granularity, weight=role == "weight")
    error = float(row[list(FIELD_REDUCTIONS).index("error2")])
    ours = float((left.double() - x.double()).square().sum())
    assert ours == pytest.approx(error, rel=1e-4, abs=1e-12 * float(x.square().sum()))


def test_e2m1_rounds_to_the_nearest_number_and_ties_to_even() -> None:
    x = torch.linspace(0, 7, 2801)
    rounded = round_e2m1(x)
    distance = (x[:, None] - E2M1).abs()
    assert torch.equal((x - rounded).abs(), distance.amin(1))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_e2m1(-ties).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]
    assert round_e2m1(torch.tensor(math.nan)).isnan()


def test_stochastic_rounding_is_right_on_average_and_follows_its_seed() -> None:
    x = torch.full((40_000,), 2.3)
    drawn = [round_e2m1(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].tolist()) == {2.0, 3.0}
    assert float(drawn[0].mean()) == pytest.approx(2.3, abs=0.02)


def test_hadamard_leaves_the_product_of_two_mixed_operands() -> None:
    torch.manual_seed(2)
    a, b = torch.randn(37, 8), torch.randn(37, 5)
    product = hadamard(a, 3).T @ hadamard(b, 3)
    torch.testing.assert_close(product, a.T @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scaling", "least"), [*((s, 18.0) for s in BLOCKS[:3]), ("nvfp4", 13.0)])
def test_all_three_gemms_are_near_float64(scaling: ScalingName, least: float) -> None:
    torch.manual_seed(3)
    layer = gemm_linear(72, 48, precision=[PrecisionConfig(scaling=scaling)])
    assert isinstance(layer, BlockLinear)
    nn.init.normal_(layer.weight, std=0.1)
    x = torch.randn(2, 40, 72, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    w, xd, gd = layer.weight.detach().double(), x.detach().double(), grad.double()
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert sqnr(xd @ w.T, y.detach()) > least
    assert sqnr(gd @ w, x.grad) > least
    assert sqnr(torch.einsum("bto,bti->oi", gd, xd), layer.weight.grad) > least
    assert layer.operand("input").granularity in ("row", "block")


@pytest.mark.parametrize("scaling", ["rowwise", "nvfp4"])
def test_stack_equals_single(scaling: ScalingName) -> None:
    torch.manual_seed(4)
    recipe = PrecisionConfig(scaling=scaling)
    stack = gemm_linear(24, 40, precision=[recipe] * 2, lead=(2,))
    nn.init.normal_(stack.weight)
    x = torch.randn(2, 1, 8, 24)
    for index in range(2):
        single = gemm_linear(24, 40, precision=[recipe])
        single.weight.data.copy_(stack.weight.data[index])
        torch.testing.assert_close(stack(x)[index], single(x[index]), rtol=2.0**-7, atol=1e-3)


def heads(lead: int, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    q, k, v = torch.randn(lead, 4, 9, 16), *torch.randn(2, lead, kv_heads, 9, 16)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("scaling", ["delayed", "current", "mxfp8"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fp8_attention_is_near_float64(scaling: ScalingName, kv_heads: int) -> None:
    recipe = PrecisionConfig(attention="fp8", scaling=scaling)
    core = attention_core(scale=0.3, precision=[recipe])
    plain = attention_core(scale=0.3, precision=[PrecisionConfig()])
    assert isinstance(core, Fp8Attention)
    q, k, v = heads(3, kv_heads)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    grad = torch.randn(q.shape)
    for _ in range(2):  # Delayed scales know the tensors from the second pass on.
        for t in (q, k, v):
            t.grad = None
        mixed = core(q, k, v)
        mixed.backward(grad)
    expected = plain(*exact)
    expected.backward(grad.double())
    assert 18 < sqnr(expected.detach(), mixed.detach()) < 60
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert sqnr(theirs.grad, ours.grad) > 15


def test_no_query_sees_the_future() -> None:
    core = attention_core(scale=0.3, precision=[PrecisionConfig(attention="fp8")]).eval()
    q, k, v = heads(1)
    before = core(q, k, v)
    k.data[..., -1, :] += 1
    v.data[..., -1, :] *= 2
    assert torch.equal(core(q, k, v)[..., :-1, :], before[..., :-1, :])


def test_fp8_attention_of_a_stack_equals_single_and_resumes() -> None:
    recipe = PrecisionConfig(attention="fp8", history=2)
    stack = attention_core(scale=0.3, precision=[recipe] * 2, lead=(2,))
    singles = [attention_core(scale=0.3, precision=[recipe]) for _ in range(2)]
    for step in range(3):
        parts = [t.detach() * (1 + step) for t in heads(4)]
        mixed = stack(*parts)
        for index, single in enumerate(singles):
            own = single(*(t[2 * index : 2 * index + 2] for t in parts))
            torch.testing.assert_close(mixed[2 * index : 2 * index + 2], own)
    resumed = attention_core(scale=0.3, precision=[recipe] * 2, lead=(2,))
    resumed.load_state_dict(stack.state_dict())
    assert torch.equal(resumed(*parts), stack(*parts))


def test_one_stack_has_one_kind_of_attention() -> None:
    with pytest.raises(ValueError, match="one kind of attention"):
        attention_core(
            scale=1.0, precision=[PrecisionConfig(), PrecisionConfig(attention="fp8")], lead=(2,)
        )


@pytest.fixture(scope="module")
def plain() -> tuple[StepResult, ...]:
    """A run of the same seed in bfloat16."""
    return train(replace(debug_cpu(), precision=PrecisionConfig(backend="bf16"))).steps


@pytest.mark.parametrize(
    "scaling", ["delayed", "mxfp8", *(pytest.param(s, marks=pytest.mark.long) for s in LONG)]
)
def test_a_run_with_every_product_in_low_precision_learns(
    scaling: ScalingName, plain: tuple[StepResult, ...]
) -> None:
    recipe = PrecisionConfig(scaling=scaling, attention="fp8")
    steps = train(replace(debug_cpu(), precision=recipe)).steps
    assert steps[-1].loss < steps[0].loss - 0.3
    assert steps[-1].loss != plain[-1].loss
    assert steps[-1].loss == pytest.approx(plain[-1].loss, abs=0.1)


def test_a_stack_of_runs_refuses_scales_per_block() -> None:
    run = replace(debug_cpu(), precision=PrecisionConfig(scaling="mxfp8"))
    with pytest.raises(ValueError, match="scales per block"):
        train_stack([run, run])


def test_printed_model_shows_how_blocks_are_scaled() -> None:
    text = str(gemm_linear(8, 8, precision=[PrecisionConfig(scaling="block128")]))
    assert "input: block128_e4m3, per 1 x 128, powers of two" in text
    assert "weight: block128_e4m3, per 128 x 128" in text
