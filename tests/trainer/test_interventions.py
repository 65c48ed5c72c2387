"""What a guard may do to a layer in mid-run: margin, history, bfloat16 and back."""

import pytest
import torch
from torch import Tensor

from foreshock.monitor.operands import Operand
from foreshock.trainer.config import PrecisionConfig, ScalingName
from foreshock.trainer.faults import ScaleFault
from foreshock.trainer.precision import Fp8Linear, LayerFaults, gemm_linear

RECIPES = {
    "delayed": PrecisionConfig(history=3),
    "current": PrecisionConfig(scaling="current"),
}


def layer_of(recipe: str = "delayed") -> Fp8Linear:
    layer = gemm_linear(24, 40, precision=[RECIPES[recipe]])
    assert isinstance(layer, Fp8Linear)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight)
    return layer


def step(layer: Fp8Linear, amax: float = 2.0) -> Tensor:
    """A forward and backward whose input has this amax."""
    x = torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(1))
    x = (x * (amax / x.abs().max())).requires_grad_()
    y: Tensor = layer(x)
    torch.autograd.backward(y.sum())
    return y.detach()


def test_a_margin_lowers_the_next_scale_and_those_after_it() -> None:
    layer = layer_of()
    step(layer)
    layer.set_margin(2)
    for _ in range(2):
        step(layer)
        assert layer.scaling_of("input").used.item() == pytest.approx(448 / 2 / 4)
    layer.set_margin(0)
    step(layer)
    assert layer.scaling_of("input").used.item() == pytest.approx(448 / 2)


def test_current_scales_have_no_margin_and_no_history() -> None:
    layer = layer_of("current")
    layer.set_margin(2)
    layer.set_history(8)
    step(layer)
    assert layer.scaling_of("input").used.item() == pytest.approx(448 / 2)


def test_a_longer_history_remembers_longer_and_a_shorter_one_forgets() -> None:
    layer = layer_of()
    layer.set_history(5)
    for amax in (8.0, 1.0, 1.0, 1.0, 1.0):
        step(layer, amax)
    scaling = layer.scaling_of("input")
    assert scaling.scale.item() == pytest.approx(448 / 8)
    layer.set_history(2)
    step(layer, 1.0)
    assert scaling.scale.item() == pytest.approx(448)
    with pytest.raises(ValueError, match="history is 0; allowed: 1 or more"):
        layer.set_history(0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_to_bfloat16_and_back(recipe: str) -> None:
    layer = layer_of(recipe)
    plain = gemm_linear(24, 40, precision=[PrecisionConfig(backend="bf16")])
    plain.load_state_dict({"weight": layer.weight.data})
    low = step(layer), step(layer)
    layer.to_bf16()
    x = torch.randn(1, 6, 24)
    assert torch.equal(layer(x), plain(x))
    assert layer.operand("grad_output") == Operand("bf16", None)
    assert "now in bf16" in repr(layer)
    layer.to_fp8()
    assert torch.equal(step(layer), low[1])


def test_a_checkpoint_keeps_what_was_set() -> None:
    changed, fresh = layer_of(), layer_of()
    changed.set_margin(1)
    changed.set_history(7)
    step(changed)
    changed.to_bf16()
    fresh.load_state_dict(changed.state_dict())
    assert fresh.in_bf16
    for layer in (changed, fresh):
        layer.to_fp8()
    for amax in (4.0, 1.0, 1.0, 1.0):
        assert torch.equal(step(changed, amax), step(fresh, amax))
    assert fresh.scaling_of("input").scale.item() == pytest.approx(448 / 4 / 2)


def test_a_layer_that_nobody_touched_has_the_keys_of_before() -> None:
    names = {name.rsplit(".", 1)[-1] for name in layer_of().state_dict()}
    assert names == {"weight", "scale", "used", "history", "valid"}


def test_a_fresh_state_undoes_what_was_set() -> None:
    changed, fresh = layer_of(), layer_of()
    changed.set_margin(3)
    changed.to_bf16()
    changed.load_state_dict(fresh.state_dict())
    assert not changed.in_bf16
    for _ in range(2):
        assert torch.equal(step(changed), step(fresh))


@pytest.mark.parametrize(("scaling", "covers"), [("rowwise", "row"), ("block128", "block")])
def test_a_scale_fault_of_blocks_is_refused_for_the_right_reason(
    scaling: ScalingName, covers: str
) -> None:
    layer = gemm_linear(24, 40, precision=[PrecisionConfig(scaling=scaling)])
    with pytest.raises(ValueError, match=f"one scale per tensor.*has one per {covers}"):
        LayerFaults({"up": layer}, (ScaleFault(start=0),))
