"""The faults of the released MS-AMP (0.4.0), one test each; they were found by reading its code."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock.trainer.fp8lm import Fp8AdamW, StatesConfig, fp8_optimizer
from foreshock.trainer.fp8lm.scaled import Scaled, encode, power_of_two_scale
from foreshock.trainer.fp8lm.sums import running_sum

O2 = StatesConfig(level="O2")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_infinite_amax_inverts_the_scale(bad: float) -> None:
    assert power_of_two_scale(torch.tensor(bad), "e4m3", torch.tensor(8.0)) == 8.0
    x = torch.tensor([1.0, bad])
    assert encode(x, "e4m3", torch.tensor(8.0)).scale == 8.0


def test_fp8_gradients_are_not_clipped() -> None:
    model = two_layers()
    optimizer = fp8_optimizer(model, O2)
    (100 * model(torch.randn(16, 8)).square().sum()).backward()
    norm = float(optimizer.clip_gradients(1.0))
    assert norm > 100
    gradients = [optimizer.exchange.gradient(p) for p in model.parameters()]
    assert any(isinstance(g, Scaled) for g in gradients)
    values = [g.values() if isinstance(g, Scaled) else g for g in gradients if g is not None]
    total = math.sqrt(sum(float(v.square().sum()) for v in values))
    assert total == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_gains_and_biases_of_a_bf16_model_are_frozen(level: str) -> None:
    model = two_layers().to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = fp8_optimizer(model, StatesConfig(level=level), lr=0.1)  # type: ignore[arg-type]
    x = torch.randn(16, 8)
    y = functional.linear(x, model[0].weight, model[0].bias.float())  # type: ignore[arg-type]
    y = functional.layer_norm(y, (8,), model[1].weight.float(), model[1].bias.float())  # type: ignore[arg-type]
    functional.linear(y, model[2].weight).square().sum().backward()  # type: ignore[arg-type, no-untyped-call]
    optimizer.step()
    for name in ("0.bias", "1.weight", "1.bias"):
        after = dict(model.named_parameters())[name]
        assert not torch.equal(after.detach(), before[name]), name


def test_weight_decay_enters_the_update_but_not_the_moments() -> None:
    """Decoupled decay enters neither moment; what is stored is what the update came from."""
    weight = nn.Parameter(torch.full((4, 4), 2.0))
    optimizer = Fp8AdamW([weight], 0.1, (0.9, 0.95), 1e-8, 0.5, states=O2)
    for _ in range(3):
        (weight * 1.0).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[weight]
    m = state["exp_avg"].float() / state["exp_avg_scale"]
    v = state["exp_avg_sq"].float() / state["exp_avg_sq_scale"]
    torch.testing.assert_close(m, torch.full((4, 4), 1 - 0.9**3), rtol=0.05, atol=0)
    torch.testing.assert_close(v, torch.full((4, 4), 1 - 0.95**3), rtol=2e-3, atol=0)


def test_no_sync_is_ignored() -> None:
    """Nothing is sent by backward, however many micro-batches there are: only by the step."""
    model = two_layers()
    optimizer = fp8_optimizer(model, O2)
    calls = []
    optimizer.exchange._reduction.reduce = lambda local: calls.append(local)  # type: ignore[assignment, return-value]
    for part in torch.randn(4, 4, 8):
        model(part).sum().backward()
    assert not calls
    assert optimizer.transport.bytes_sent == 0


def test_unused_parameters_are_an_error() -> None:
    model = two_layers()
    optimizer = fp8_optimizer(model, O2, lr=0.1, weight_decay=0.5)
    before = model[2].weight.plain().clone()  # type: ignore[operator, union-attr]
    model[:2](torch.randn(4, 8)).square().sum().backward()
    optimizer.clip_gradients(1.0)
    optimizer.step()
    assert torch.equal(model[2].weight.plain(), before)  # type: ignore[operator, union-attr]


def test_what_the_sum_breaks_is_invisible() -> None:
    codes = [torch.full((8,), 400.0).to(torch.float8_e4m3fn)] * 2
    total, over = running_sum(codes)
    assert over.all()
    assert (total.float() == 448).all(), "saturated, and not NaN"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_nonfinite_gradients_is_taken(bad: float) -> None:
    model = two_layers()
    optimizer = fp8_optimizer(model, O2, lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    states = {k: v.float().clone() for s in optimizer.state.values() for k, v in s.items()}
    (model(torch.randn(4, 8)).square().sum() * bad).backward()
    assert not math.isfinite(float(optimizer.clip_gradients(1.0)))
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.detach() + 0, old + 0)
    after = {k: v.float() for s in optimizer.state.values() for k, v in s.items()}
    assert all(torch.equal(after[k], states[k]) for k in states)


def test_importing_changes_torch() -> None:
    """It patches nothing: torch's functions are those of torch's own modules."""
    assert functional.linear.__module__ in (None, "torch._C._nn")
    assert torch.zeros_like.__module__ in (None, "torch")
    assert torch.is_floating_point.__module__ in (None, "torch")
    package = Path(sys.modules["foreshock.trainer.fp8lm"].__file__ or "").parent
    for path in package.glob("*.py"):
        assert "setattr(torch" not in path.read_text()


def test_activations_are_kept_on_the_context_and_escape_the_hooks_of_saved_tensors() -> None:
    """Every saved tensor passes by saved-tensor hooks, so offloading and checkpoints see it."""
    from foreshock.trainer.config import PrecisionConfig
    from foreshock.trainer.precision import gemm_linear

    layer = gemm_linear(8, 8, precision=[PrecisionConfig(backend="emulated")])
    seen: list[torch.Size] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(torch.randn(2, 3, 8)).sum()
    assert torch.Size([6, 8]) in seen
