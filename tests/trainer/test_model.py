"""The decoder: sizes, names, first losses, and faults on its layers; no optimizer here."""

import math
from typing import get_args

import pytest
import torch

from foreshock.trainer.config import Architecture, ModelConfig, PrecisionConfig
from foreshock.trainer.faults import BadBatch, LearningRateRamp, OutlierRamp, ScaleFault
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear, GemmLinear

BF16 = PrecisionConfig(backend="bf16")
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


def decoder(architecture: Architecture, precision: PrecisionConfig | None = None) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(architecture=architecture, width=32, layers=2, heads=2)
    return Decoder(config, precision or PrecisionConfig())


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1))


def count(model: Decoder, kind: str) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if kind in n)


@pytest.mark.parametrize("width", [32, 48])
def test_parameter_counts(width: int) -> None:
    d, ffn, layers = width, -(-8 * width // 3 // 16) * 16, 3
    models = {}
    for architecture in (*ARCHITECTURES[:1], "fog_max"):
        config = ModelConfig(architecture=architecture, width=d, layers=layers, heads=2)
        models[architecture] = Decoder(config, BF16)
    llama, fog = models["llama3"], models["fog_max"]
    matrices = layers * (4 * d * d + 3 * d * ffn)
    assert count(llama, "weight") == count(fog, "weight") == matrices
    assert count(llama, "") == matrices + 2 * 256 * d + (2 * layers + 1) * d
    # No final norm, two scalars of xIELU per layer.
    assert count(fog, "") == matrices + 2 * 256 * d + 2 * layers * d + 2 * layers


def test_names_of_the_linears() -> None:
    names = ["attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down"]
    assert list(decoder("llama3").linears()) == [f"blocks.{n}.{x}" for n in (0, 1) for x in names]
    experts = [f"mlp.experts.{e}.{x}" for e in range(4) for x in ("up", "down")]
    moe = [f"blocks.{n}.{x}" for n in (0, 1) for x in (*names[:2], *experts)]
    assert list(decoder("fog_moe").linears()) == moe
    names.remove("mlp.gate")
    assert list(decoder("fog_max").linears()) == [f"blocks.{n}.{x}" for n in (0, 1) for x in names]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", [BF16, PrecisionConfig(), PrecisionConfig(scaling="current")])
def test_an_untrained_model_knows_nothing(
    architecture: Architecture, precision: PrecisionConfig
) -> None:
    model, tokens = decoder(architecture, precision), tokens_of(2, 17)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log(256), abs=0.2)
    logits = model.eval()(tokens[:, :-1])
    assert logits.shape == (2, 16, 256)
    assert logits.dtype == torch.float32


def test_fog_embeddings_have_unit_variance() -> None:
    x = decoder("fog_max")._embed(tokens_of(8, 64))
    assert x.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_learns(architecture: Architecture) -> None:
    # The first scale of delayed scaling is 1: what is smaller than the format knows learns later.
    model, tokens = decoder(architecture, PrecisionConfig(scaling="current")), tokens_of(2, 17)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or ".experts." in name, name


def trained_scales(model: Decoder, name: str, role: str) -> torch.Tensor:
    layer = model.linears()[name]
    assert isinstance(layer, Fp8Linear)
    return layer.scaling_of(role).used


def advance(model: Decoder, step: int, fault: ScaleFault | OutlierRamp) -> None:
    model.begin_step(step, fault)
    tokens = tokens_of(2, 17)
    model(tokens[:, :-1], tokens[:, 1:]).backward()


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_scale_fault_hits_what_it_names(scaling: str) -> None:
    precision = PrecisionConfig(scaling="current") if scaling == "current" else PrecisionConfig()
    model = decoder("llama3", precision)
    fault = ScaleFault(start=2, growth=2.0, roles=("input", "grad_output"), layers="mlp.down")
    used = []
    for step in range(5):
        advance(model, step, fault)
        used.append(trained_scales(model, "blocks.1.mlp.down", "grad_output").item())
    assert used[3] / used[2] == used[4] / used[3] == 2.0
    whole = trained_scales(model, "blocks.1.mlp.down", "weight")
    amax = model.linears()["blocks.1.mlp.down"].weight.abs().amax()
    torch.testing.assert_close(whole, 448 / amax)


def test_outlier_ramp_grows_one_channel_under_a_short_history() -> None:
    model = decoder("llama3")
    name = "blocks.0.mlp.up"
    fault = OutlierRamp(start=1, layer=name, channel=5, growth=4.0, history=1, period=2)
    seen: list[torch.Tensor] = []
    layer = model.linears()[name]
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for step in range(4):
        advance(model, step, fault)
    shares = [(x[..., 5].square().sum() / x.square().sum()).item() for x in seen]
    assert shares[0] == pytest.approx(shares[2], rel=0.05)  # The scales moved.
    # Factor 4 at step 1, 64 at step 3.
    assert shares[3] > 0.9 > shares[1] > 3 * shares[0]
    assert isinstance(layer, Fp8Linear)
    assert layer.scaling_of("input").valid.sum() == 1


@pytest.mark.parametrize(
    ("fault", "precision", "message"),
    [
        (ScaleFault(start=0, layers="mlp.middle"), PrecisionConfig(), "blocks.0.attention.qkv"),
        (ScaleFault(start=0), BF16, "emulated"),
        (OutlierRamp(start=0, layer="mlp.middle"), PrecisionConfig(), "not there"),
        (OutlierRamp(start=0, layer="blocks.0.mlp.up", channel=32), PrecisionConfig(), "features"),
    ],
)
def test_a_fault_that_cannot_act_is_refused(
    fault: ScaleFault | OutlierRamp, precision: PrecisionConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder("llama3", precision).begin_step(0, fault)


@pytest.mark.parametrize("fault", [None, LearningRateRamp(start=0), BadBatch(start=0)])
def test_other_faults_leave_the_layers(fault: LearningRateRamp | BadBatch | None) -> None:
    model, tokens = decoder("llama3"), tokens_of(2, 17)
    expected = decoder("llama3")(tokens)
    model.begin_step(0, fault)
    assert torch.equal(model(tokens), expected)


def test_number_of_recipes_must_fit_the_stack() -> None:
    with pytest.raises(ValueError, match="2 recipes for 3 models"):
        Decoder(ModelConfig(), [BF16, BF16], lead=(3,))


def test_linears_are_all_of_the_blocks_matrices() -> None:
    model = decoder("fog_max")
    inside = {n for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2}
    assert inside == {f"{name}.weight" for name in model.linears()}
    assert all(isinstance(layer, GemmLinear) for layer in model.linears().values())
