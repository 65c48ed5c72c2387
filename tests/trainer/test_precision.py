"""GEMM layers: casts, scales and products against their definitions; no training here."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foreshock.monitor.formats import FORMATS
from foreshock.monitor.operands import QuantizedGemm
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision import (
    Fp8Linear,
    Scaling,
    attention_core,
    gemm_linear,
    quantize,
)
from foreshock.trainer.precision.gemm import gemm, gemm_in_float32

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
DELAYED = PrecisionConfig(scaling="delayed", history=3)
CURRENT = PrecisionConfig(scaling="current")
BF16 = PrecisionConfig(backend="bf16")


def layer_of(*precision: PrecisionConfig, sizes: tuple[int, int] = (24, 40)) -> Fp8Linear:
    lead = (len(precision),) if len(precision) > 1 else ()
    layer = gemm_linear(*sizes, precision=precision, lead=lead)
    assert isinstance(layer, Fp8Linear)
    torch.nn.init.normal_(layer.weight, std=0.1)
    return layer


def fp8_values(x: Tensor, scale: float, fp8_format: str) -> Tensor:
    """What is left of x in float64, by torch's own conversions."""
    largest = FORMATS[fp8_format].largest
    codes = (x * torch.tensor(scale)).clamp(-largest, largest).to(DTYPES[fp8_format])
    return codes.double() / scale


@pytest.mark.parametrize("fp8_format", ["e4m3", "e5m2"])
def test_cast_is_torchs_own_for_every_bfloat16_number(fp8_format: str) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x.float()
    ours = quantize(x, torch.tensor(1.0), fp8_format).float()
    largest = FORMATS[fp8_format].largest
    theirs = x.clamp(-largest, largest).to(DTYPES[fp8_format]).float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.nan_to_num(0).abs().max() == largest
    assert torch.equal(ours.isnan(), x.isnan())


@given(
    amaxes=st.lists(
        st.one_of(
            st.floats(2.0**-20, 2.0**20, width=32),
            st.sampled_from([0.0, math.inf, math.nan]),
        ),
        max_size=12,
    ),
    history=st.integers(1, 4),
    margin=st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_delayed_scale_follows_transformer_engines_rule(
    amaxes: list[float], history: int, margin: int
) -> None:
    config = PrecisionConfig(history=history, margin=margin)
    scaling = Scaling([config], lead=(), fp8_format="e4m3")
    expected, seen = 1.0, []
    for amax in amaxes:
        used = scaling.step(torch.tensor([0.0, -amax]), update=True)
        assert used.item() == pytest.approx(expected, rel=1e-6)
        seen.append(amax)
        latest = max(seen[-history:], key=lambda v: math.inf if math.isnan(v) else v)
        if 0 < latest < math.inf:
            expected = 448 / latest / 2**margin
    assert scaling.scale.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("amax", "scale"), [(2.0, 224.0), (0.0, 1.0), (math.nan, 1.0)])
def test_current_scale_is_the_tensors_own(amax: float, scale: float) -> None:
    scaling = Scaling([CURRENT], lead=(), fp8_format="e4m3")
    scaling.step(torch.tensor([100.0]), update=True)
    assert scaling.step(torch.tensor([-amax]), update=True).item() == scale
    assert scaling.in_force() is None


@pytest.mark.parametrize("config", [DELAYED, CURRENT])
def test_all_three_gemms_use_the_operands_that_fp8_leaves(config: PrecisionConfig) -> None:
    torch.manual_seed(0)
    layer = layer_of(config)
    for _ in range(2):  # The second pass has scales from the history.
        x = torch.randn(2, 8, 24, requires_grad=True)
        y = layer(x)
        input_scale, weight_scale = layer.operand("input").scale, layer.operand("weight").scale
        ahead = layer.operand("grad_output").scale
        grad = torch.randn_like(y) * 1e-3
        layer.weight.grad = None
        y.backward(grad)
        grad_scale = layer.scaling_of("grad_output").used
        assert ahead is None or torch.equal(ahead, grad_scale)
    assert input_scale is not None
    assert weight_scale is not None
    xq = fp8_values(x.detach(), input_scale.item(), "e4m3")
    wq = fp8_values(layer.weight.detach(), weight_scale.item(), "e4m3")
    gq = fp8_values(grad, grad_scale.item(), "e5m2")
    assert (xq - x.detach()).abs().max() > 1e-4
    assert layer.weight.grad is not None
    assert x.grad is not None
    # One bfloat16 rounding of the result is all that may differ.
    for ours, exact in (
        (y, xq @ wq.T),
        (x.grad, gq @ wq),
        (layer.weight.grad, torch.einsum("bto,bti->oi", gq, xq)),
    ):
        error = (ours.double() - exact).abs()
        assert (error <= 2.0**-8 * exact.abs() + 1e-6 * exact.abs().max()).all()


def test_bf16_layer_rounds_its_operands_and_nothing_else() -> None:
    torch.manual_seed(0)
    layer = gemm_linear(24, 40, precision=[BF16])
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 8, 24, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    xr, wr, gr = (t.detach().bfloat16().double() for t in (x, layer.weight, grad))
    assert layer.operand("input").format == "bf16"
    assert layer.weight.grad is not None
    assert x.grad is not None
    for ours, exact in (
        (y, xr @ wr.T),
        (x.grad, gr @ wr),
        (layer.weight.grad, torch.einsum("bto,bti->oi", gr, xr)),
    ):
        error = (ours.double() - exact).abs()
        assert (error <= 2.0**-8 * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_both_ways_to_multiply_agree(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(*lead, 8, 16).bfloat16(), torch.randn(*lead, 16, 4).bfloat16()
    fast, portable = gemm(a, b).float(), gemm_in_float32(a, b).float()
    torch.testing.assert_close(fast, portable, rtol=2.0**-7, atol=1e-5)


def test_operand_after_forward_is_the_scale_it_used() -> None:
    layer = layer_of(DELAYED)
    layer(torch.full((1, 1, 24), 2.0))
    assert layer.operand("input").scale == torch.tensor(1.0)
    layer(torch.full((1, 1, 24), 8.0))
    assert layer.operand("input").scale == torch.tensor(224.0)
    assert isinstance(layer, QuantizedGemm)
    with pytest.raises(ValueError, match="grad_output"):
        layer.operand("gradient")


def test_evaluation_leaves_the_scales() -> None:
    layer = layer_of(DELAYED).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(1, 4, 24))
    changed = {k for k, v in layer.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= {"scaling.input.used", "scaling.weight.used"}


def run(layer: Fp8Linear, steps: range) -> list[Tensor]:
    outputs = []
    for step in steps:
        torch.manual_seed(step)
        y = layer(torch.randn(1, 8, 24) * (1 + step))
        y.square().sum().backward()
        outputs.append(y.detach())
    return outputs


def test_state_dict_resumes_exactly() -> None:
    whole, first = layer_of(DELAYED), layer_of(DELAYED)
    first.load_state_dict(whole.state_dict())
    expected = run(whole, range(6))[4:]
    run(first, range(4))
    second = layer_of(DELAYED)
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(run(second, range(4, 6)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [DELAYED, CURRENT])
def test_broken_scale_holds_the_one_of_before(config: PrecisionConfig) -> None:
    scaling = Scaling([config], lead=(), fp8_format="e4m3")
    for amax in (4.0, 2.0):
        scaling.step(torch.tensor([amax]), update=True)
    before = scaling.scale.item()
    for factor in (1.0, 3.0, 0.5):
        scaling.break_scale(torch.tensor(factor))
        assert scaling.in_force() == torch.tensor(before * factor)
        assert scaling.step(torch.tensor([100.0]), update=True).item() == before * factor
    scaling.break_scale(None)
    scaling.step(torch.tensor([100.0]), update=True)
    assert scaling.step(torch.tensor([100.0]), update=True).item() == pytest.approx(4.48)


def test_shortened_history_forgets() -> None:
    scaling = Scaling([DELAYED], lead=(), fp8_format="e4m3")
    for amax in (100.0, 1.0):
        scaling.step(torch.tensor([amax]), update=True)
    assert scaling.scale.item() == pytest.approx(4.48)
    scaling.limit_history(torch.tensor(1))
    scaling.step(torch.tensor([1.0]), update=True)
    assert scaling.scale.item() == 448.0


def test_a_hook_sees_the_input_gain_and_the_function_stays() -> None:
    layer = layer_of(CURRENT)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    gain = torch.ones(24)
    gain[3] = 64.0
    layer.set_input_gain(gain)
    y = layer(torch.ones(1, 2, 24))
    exact = torch.ones(1, 2, 24) @ layer.weight.T
    assert ((y - exact).abs() < 0.1 * layer.weight.abs().sum(1)).all()
    assert (seen[0][..., 3] == 64).all()
    assert seen[0].sum() == 2 * (23 + 64)
    layer.set_input_gain(None)
    layer(torch.ones(1, 2, 24))
    assert (seen[1] == 1).all()


def test_stack_of_mixed_recipes_equals_single_layers() -> None:
    recipes = (DELAYED, CURRENT, PrecisionConfig(history=1, margin=1), BF16)
    stack = layer_of(*recipes)
    singles = [gemm_linear(24, 40, precision=[r]) for r in recipes]
    for index, single in enumerate(singles):
        single.weight.data.copy_(stack.weight.data[index])
    for step in range(4):
        torch.manual_seed(step)
        x = torch.randn(4, 2, 8, 24) * torch.tensor([1.0, 3.0, 30.0, 1.0]).view(4, 1, 1, 1)
        x[0, 0, 0, 0] = math.nan if step == 2 else 1.0
        grad = torch.randn(4, 2, 8, 40)
        stack.weight.grad = None
        y = stack(x)
        y.backward(grad)
        for index, single in enumerate(singles):
            single.weight.grad = None
            single_y = single(x[index])
            single_y.backward(grad[index])
            torch.testing.assert_close(y[index], single_y, rtol=2.0**-7, atol=1e-3, equal_nan=True)
            assert stack.weight.grad is not None
            torch.testing.assert_close(
                stack.weight.grad[index],
                single.weight.grad,
                rtol=2.0**-7,
                atol=1e-1,
                equal_nan=True,
            )
            if isinstance(single, Fp8Linear):
                for role in ("input", "weight", "grad_output"):
                    ours, theirs = (
                        stack.scaling_of(role).scale[index],
                        single.scaling_of(role).scale,
                    )
                    assert torch.equal(ours, theirs)


def test_one_stack_refuses_two_pairs_of_formats() -> None:
    other = PrecisionConfig(gradient_format="e4m3")
    with pytest.raises(ValueError, match="one pair of FP8 formats"):
        gemm_linear(8, 8, precision=[CURRENT, other], lead=(2,))


def test_printed_model_shows_the_recipe() -> None:
    text = str(
        torch.nn.Sequential(
            layer_of(PrecisionConfig(history=7)), gemm_linear(8, 8, precision=[BF16])
        )
    )
    assert "e4m3, delayed, history=7" in text
    assert "e5m2" in text
    assert "8, 8, bf16" in text


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_plain_attention_is_torchs_own_with_each_key_head_repeated(key_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, 8, 16)
    k, v = torch.randn(2, 3, key_heads, 8, 16)
    core = attention_core(scale=0.3, precision=[DELAYED])
    keys, values = (t.repeat_interleave(4 // key_heads, 1) for t in (k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, is_causal=True, scale=0.3
    )
    ours = core(q, k, v)
    if key_heads == 4:
        assert torch.equal(ours, exact)
    torch.testing.assert_close(ours, exact)
