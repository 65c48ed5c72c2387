"""Every architecture against plain float64 equations, and what each of them promises."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer import reference
from torch import Tensor

from foreshock.monitor.operands import Operand
from foreshock.trainer.blocks import ARCHITECTURES, Experts, Parts, bounded_scale, parts
from foreshock.trainer.blocks.heads import FrozenHeadNorm, HeadTanh
from foreshock.trainer.blocks.layers import PostNormBlock
from foreshock.trainer.blocks.mlp import ChannelSmoothSwiGLU, SwiGLU, TokenSmoothSwiGLU
from foreshock.trainer.config import Architecture, ModelConfig, PrecisionConfig
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear, GemmLinear
from foreshock.trainer.sizes import parameter_count, published

BF16 = PrecisionConfig(backend="bf16")
NAMES: tuple[Architecture, ...] = get_args(Architecture)
FOG = tuple(name for name in NAMES if name.startswith("fog"))
STACKABLE = tuple(name for name in NAMES if name != "fog_moe")
SMOOTH: tuple[Architecture, ...] = ("llama3_smooth_swiglu", "llama3_smooth_swiglu_token")


class ExactLinear(GemmLinear):
    """A GEMM that rounds nothing."""

    def operand(self, role: str) -> Operand:
        return Operand("fp32", None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...btd,...od->...bto", x, self.gemm_weight())


def exact_linear(
    in_features: int, out_features: int, *, precision: object, lead: tuple[int, ...]
) -> GemmLinear:
    return ExactLinear(in_features, out_features, lead=lead)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models made inside run without any rounding to low precision."""
    monkeypatch.setattr(parts, "gemm_linear", exact_linear)


def small(architecture: Architecture, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        width=24,
        layers=2,
        heads=4,
        kv_heads=2,
        ffn_width=16,
        vocabulary=17,
        tied=tied,
        experts=3 if architecture == "fog_moe" else 0,
    )


def made(config: ModelConfig, lead: tuple[int, ...] = ()) -> Decoder:
    """A float64 model with every parameter moved away from where it starts."""
    torch.manual_seed(5)
    model = Decoder(config, [BF16] * math.prod(lead), lead=lead).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def text(*shape: int, vocabulary: int = 17) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", NAMES)
def test_an_architecture_is_its_equations(architecture: Architecture, tied: bool) -> None:
    config = small(architecture, tied=tied)
    model, tokens = made(config), text(2, 7)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    expected, extra = reference.loss(config, weights, tokens[:, :-1], tokens[:, 1:])
    gradients = torch.autograd.grad(expected + extra, list(weights.values()))
    # The model's rotary angles are float32: 1e-7 of a turn, some 1e-6 in what follows from it.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert parameter.grad is not None, name
        error = (parameter.grad - gradient).abs().max()
        assert error <= 2e-6 * gradient.abs().max() + 1e-9, name
        assert gradient.abs().max() > 0, name


def test_every_architecture_has_an_anatomy() -> None:
    assert tuple(ARCHITECTURES) == NAMES
    with pytest.raises(ValueError, match=r"'fog_maxx'; allowed: llama3, .*fog_moe"):
        ModelConfig(architecture="fog_maxx")  # type: ignore[arg-type]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", NAMES)
def test_no_logits_depend_on_a_later_token(architecture: Architecture) -> None:
    model, tokens = made(small(architecture)), text(2, 9)
    before = model(tokens)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 17
    after = model(changed)
    # Scales of smoothed channels move with all tokens, and cancel but for float64's rounding.
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-12, atol=1e-12)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-3).all()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("architecture", STACKABLE)
def test_a_stack_is_its_models(architecture: Architecture) -> None:
    config = small(architecture)
    stack, single = made(config, (3,)), made(config)
    tokens = text(3, 2, 7)
    together = stack(tokens[..., :-1], tokens[..., 1:])
    for index in range(3):
        for name, parameter in single.named_parameters():
            parameter.data.copy_(stack.get_parameter(name)[index])
        alone = single(tokens[index, :, :-1], tokens[index, :, 1:])
        torch.testing.assert_close(alone, together[index], rtol=1e-10, atol=0)


def test_experts_cannot_be_stacked() -> None:
    with pytest.raises(ValueError, match="fog_moe cannot be stacked"):
        Decoder(small("fog_moe"), [BF16, BF16], lead=(2,))


def largest_logit(model: Decoder, config: ModelConfig, tokens: Tensor) -> float:
    """Over all heads and layers, from what the attention cores are called with."""
    largest: list[float] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        q, k = args[0], args[1].repeat_interleave(config.heads // config.key_heads, 1)
        scale = bounded_scale(config.head_width)
        largest.append((scale * q @ k.transpose(-1, -2)).abs().max().item())

    for block in model.blocks:
        block.attention.core.register_forward_pre_hook(look)  # type: ignore[union-attr]
    model(tokens)
    return max(largest)


@settings(max_examples=10, deadline=None)
@given(
    architecture=st.sampled_from(FOG),
    head_width=st.sampled_from([4, 128, 256]),
    log_gain=st.floats(-3, 8),
    seed=st.integers(0, 99),
)
def test_logits_of_fog_stay_within_sixteen_whatever_the_weights(
    architecture: Architecture, head_width: int, log_gain: float, seed: int
) -> None:
    torch.manual_seed(seed)
    config = ModelConfig(architecture=architecture, width=2 * head_width, layers=1, heads=2)
    model = Decoder(replace(config, ffn_width=16), BF16).eval()
    for parameter in model.parameters():
        parameter.data *= math.exp(log_gain)
    assert largest_logit(model, config, text(1, 6)) <= 16 * (1 + 1e-5)


def test_the_bound_of_fogs_logits_is_reached_at_128() -> None:
    assert bounded_scale(128) == pytest.approx(0.125)
    config = ModelConfig(architecture="fog_max", width=128, layers=1, heads=1, ffn_width=16)
    qk = torch.ones(1, 1, 2, 128)
    q, k = FrozenHeadNorm(Parts((BF16,)), config)(qk)[0, 0]
    assert (bounded_scale(128) * q @ k).item() == pytest.approx(16, rel=1e-4)


@given(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30))
def test_tanh_bounds_queries_and_keys(alpha: float, value: float) -> None:
    config = ModelConfig(architecture="fog_flash", width=8, heads=2, kv_heads=1)
    tanh = HeadTanh(Parts((BF16,)), config)
    assert tanh.query_alpha.item() == tanh.key_alpha.item() == 1.0
    tanh.query_alpha.data.fill_(alpha)
    bounded = tanh(torch.full((2, 3, 3, 4), value))
    assert bounded.abs().max() <= 1.0
    torch.testing.assert_close(bounded[:, :, 2:], torch.full((2, 3, 1, 4), value).tanh())


@pytest.mark.parametrize("architecture", FOG)
def test_fog_starts_as_its_paper_does(architecture: Architecture) -> None:
    torch.manual_seed(0)
    config = ModelConfig(architecture=architecture, width=64, layers=8, heads=4)
    model = Decoder(config, BF16)
    variances: list[float] = []
    first = model.blocks[0]
    assert isinstance(first, PostNormBlock)
    for norm in (first.attention_norm, first.mlp_norm):
        assert torch.equal(norm.gain, torch.full((64,), 8**-0.5))
    model.blocks[0].register_forward_pre_hook(
        lambda _, args: variances.append(args[0].var().item())
    )
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, output: variances.append(output.var().item()))
    model(text(4, 64, vocabulary=256))
    # Each of a layer's two branches adds 1/L, as long as branches point anywhere.
    assert variances[0] == pytest.approx(1.0, abs=0.1)
    assert variances[1] == pytest.approx(1 + 2 / 8, abs=0.15)
    assert 2.0 < variances[-1] < 4.0
    assert model.norm is None


@pytest.mark.parametrize("architecture", NAMES)
def test_all_matrices_start_with_the_standard_deviation_of_the_config(
    architecture: Architecture,
) -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(architecture=architecture, width=64, layers=1, heads=4), BF16)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    assert len(matrices) >= 6
    for name, matrix in matrices.items():
        spread = 4 * 0.02 / math.sqrt(2 * matrix.numel())
        assert matrix.std().item() == pytest.approx(0.02, abs=spread), name


@pytest.mark.parametrize("smooth", [ChannelSmoothSwiGLU, TokenSmoothSwiGLU])
@settings(max_examples=20, deadline=None)
@given(log_size=st.floats(-30, 30), seed=st.integers(0, 99), zero=st.booleans())
def test_smooth_swiglu_is_swiglu_where_nothing_is_rounded(
    smooth: type[SwiGLU], log_size: float, seed: int, zero: bool
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    x[0, 1] *= 0.0 if zero else math.exp(log_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "gemm_linear", exact_linear)
        models = [kind(Parts((BF16,)), small("llama3")) for kind in (smooth, SwiGLU)]
    results = []
    for model in models:
        torch.manual_seed(seed)
        model.double()
        for parameter in model.parameters():
            parameter.data.normal_()
        model.gate.weight.data[3] = 0.0 if zero else math.exp(log_size)
        given_x = x.clone().requires_grad_()
        y = model(given_x)
        gradients = torch.autograd.grad(y.sum(), [given_x, *model.parameters()])
        results.append((y, *gradients))
    for mine, theirs in zip(*results, strict=True):
        limit = 1e-12 * theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=limit)


def down_input(architecture: Architecture, hot: float) -> Tensor:
    """What the last GEMM of the feed-forward casts, one channel of it being hot times as large."""
    torch.manual_seed(1)
    model = Decoder(ModelConfig(architecture=architecture, width=32, layers=1, heads=2), BF16)
    mlp = model.blocks[0].mlp
    mlp.up.weight.data[3] *= hot  # type: ignore[union-attr, index, operator]
    seen: list[Tensor] = []
    mlp.down.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: seen.append(args[0].detach())
    )
    model(text(2, 16, vocabulary=256))
    return seen[0]


def test_smoothing_per_channel_takes_a_hot_channel_away() -> None:
    hot = 1000.0
    others: tuple[Architecture, ...] = ("llama3", "llama3_smooth_swiglu_token")
    for architecture in others:
        channels = down_input(architecture, hot).abs().amax((0, 1))
        assert channels[3] > 100 * channels.median()
    channels = down_input("llama3_smooth_swiglu", hot).abs().amax((0, 1))
    torch.testing.assert_close(channels, torch.ones_like(channels))


def test_smoothing_keeps_the_gain_of_a_fault() -> None:
    layer = ExactLinear(4, 3, lead=())
    layer.weight.data.normal_()
    fault, gain = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.full((4,), 0.5)
    layer.set_input_gain(fault)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    x = torch.randn(1, 5, 4)
    torch.testing.assert_close(layer.smoothed(x, gain), x @ layer.weight.T)
    layer(x)
    assert torch.equal(seen[0], x * fault * gain)
    assert torch.equal(seen[1], x * fault)


def routed(precision: PrecisionConfig) -> tuple[Decoder, Experts]:
    torch.manual_seed(0)
    config = ModelConfig(architecture="fog_moe", width=32, layers=1, heads=2, experts=3)
    model = Decoder(config, precision)
    experts = model.blocks[0].mlp
    assert isinstance(experts, Experts)
    return model, experts


@pytest.mark.parametrize("precision", [BF16, PrecisionConfig(), PrecisionConfig(scaling="current")])
def test_an_expert_without_tokens_trains_on(precision: PrecisionConfig) -> None:
    model, experts = routed(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(2, 8, 32)
    for step in range(4):
        # No feature is below zero: nobody chooses expert 2 in two steps, everybody in two.
        experts.router.data[:] = torch.tensor([0.0, 0.0, -1.0 if step < 2 else 1.0])[:, None]
        y = experts(x.abs())
        y.square().sum().backward()
        for name, parameter in experts.experts[2].named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() == (step >= 2), name
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    layer = experts.experts[2].down
    if isinstance(layer, Fp8Linear):
        assert layer.scaling_of("input").used.isfinite().all()


def test_experts_that_are_used_alike_balance_at_one() -> None:
    _, experts = routed(BF16)
    experts(torch.randn(4, 64, 32))
    assert experts.balance is not None
    assert experts.balance.item() == pytest.approx(1.0, abs=0.01)
    experts.router.data[0], experts.router.data[1:] = 3.0, 0.0
    experts(torch.randn(4, 64, 32).abs())
    # All choose expert 0 first, with all probability: 3 times (1/2 of the choices).
    assert experts.balance.item() == pytest.approx(1.5, abs=0.01)


def test_balancing_is_in_the_gradient_and_not_in_the_loss() -> None:
    tokens = text(2, 17, vocabulary=256)
    losses, gradients = [], []
    for balance in (0.0, 0.5):
        torch.manual_seed(0)
        config = ModelConfig(architecture="fog_moe", width=32, layers=1, heads=2, balance=balance)
        model = Decoder(config, BF16)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.item())
        router = model.get_parameter("blocks.0.mlp.router").grad
        assert router is not None
        gradients.append(router)
    assert losses[0] == losses[1]
    assert not torch.equal(*gradients)


@pytest.mark.parametrize(
    ("size", "millions", "digits"), [("390m", 385.9, 1), ("1.5b", 1543.6, 1), ("8b", 8053, 0)]
)
def test_published_sizes_have_the_published_numbers_of_parameters(
    size: str, millions: float, digits: int
) -> None:
    fogs: tuple[Architecture, ...] = ("fog_max", "fog_opt", "fog_flash", "fog_swiglu")
    for architecture in ("llama3", *SMOOTH, *fogs):
        count = parameter_count(published(size, architecture))  # type: ignore[arg-type]
        assert round(count / 1e6, digits) == millions, architecture


def test_gated_and_plain_models_have_as_many_parameters() -> None:
    gated = parameter_count(published("1.5b", "fog_swiglu"))
    assert parameter_count(published("1.5b", "fog_opt")) == gated
    assert parameter_count(published("1.5b", "fog_max")) == gated + 2 * 16
    with pytest.raises(ValueError, match=r"allowed: 390m, 1\.5b, 8b"):
        published("2b")  # type: ignore[arg-type]


def test_softmax_scale_at_the_published_head_width() -> None:
    with torch.device("meta"):
        fog = Decoder(published("390m", "fog_max"), BF16)
        llama = Decoder(published("390m", "llama3"), BF16)
    assert fog.blocks[0].attention.core.scale == pytest.approx(0.125)  # type: ignore[union-attr]
    assert llama.blocks[0].attention.core.scale == pytest.approx(128**-0.5)  # type: ignore[union-attr]
    assert fog._multiplier == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "kv_heads is 3; allowed: divisors of heads 4"),
        ({"kv_heads": -1}, "kv_heads is -1"),
        ({"experts": 4}, "experts is 4 for llama3; allowed: 2 or more for fog_moe"),
        ({"architecture": "fog_moe", "experts": 1}, "experts is 1 for fog_moe"),
        ({"architecture": "fog_moe", "experts_per_token": 5}, "allowed: 1 to 4"),
        ({"balance": -1.0}, "balance is -1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", NAMES)
def test_printing_a_model_tells_what_it_is(architecture: Architecture) -> None:
    model = Decoder(ModelConfig(architecture=architecture, width=32, layers=3, heads=2), BF16)
    printed = str(model)
    assert printed.startswith(f"Decoder(\n  {architecture}, embedding and head 256 x 32 in float32")
    assert "(0-2): 3 x " in printed
    assert "Bf16Linear(32, 96, bf16)" in printed
    assert ("each token takes 2 of 4" in printed) == (architecture == "fog_moe")
