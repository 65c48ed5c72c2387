"""The native backend against the emulated one; what a CPU cannot multiply is refused with a reason.

The same assertions on a GPU: tests/gpu/test_precision.py.
"""

from dataclasses import replace

import pytest
import torch
from tests.trainer.backends import check_casts, check_products, layer_of, one_pass, sqnr

from foreshock.monitor.operands import QuantizedGemm
from foreshock.trainer.config import (
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    ScalingName,
)
from foreshock.trainer.faults import ScaleFault
from foreshock.trainer.loop import train
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear, LayerFaults, describe, gemm_linear
from foreshock.trainer.precision.native_linear import NativeLinear

NATIVE = PrecisionConfig(backend="native", history=3)


@pytest.mark.parametrize("fp8_format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(64, 128), (70, 150), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_are_those_of_the_emulated_layers(
    fp8_format: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_casts(fp8_format, shape, dtype, "cpu")


@pytest.mark.parametrize("scaling", ["delayed", "current", "rowwise"])
@pytest.mark.parametrize("sizes", [(64, 48), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_near_those_of_the_emulated_layers(
    scaling: ScalingName, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    check_products(replace(NATIVE, scaling=scaling), sizes, "cpu", dtype=dtype)


def test_every_operand_and_product_is_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    product = torch._scaled_mm

    def spy(a: torch.Tensor, b: torch.Tensor, **settings: object) -> torch.Tensor:
        seen.append((a.dtype, b.dtype, settings["use_fast_accum"]))
        assert b.stride(0) == 1, "the second operand lies along the contracted axis"
        return product(a, b, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    one_pass(layer_of(NATIVE, (64, 48), "cpu"), 0)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert seen == [(e4m3, e4m3, True), (e5m2, e4m3, False), (e5m2, e4m3, False)]


def test_a_weight_is_cast_once_a_step_for_all_micro_batches() -> None:
    layer = layer_of(NATIVE, (32, 16), "cpu")
    assert isinstance(layer, NativeLinear)
    x = torch.randn(1, 16, 32)
    layer.begin_step()
    for _ in range(3):
        layer(x)
    weight, inputs = layer.scaling_of("weight"), layer.scaling_of("input")
    assert (weight.history > 0).sum() == 1
    assert (inputs.history > 0).sum() == 3
    with torch.no_grad():
        layer.weight.mul_(1)
    changed = layer(x)
    assert (weight.history > 0).sum() == 2
    layer.begin_step()
    layer(x)
    assert (weight.history > 0).sum() == 3
    # Outside of training nothing is kept and nothing is noted.
    layer.eval()
    assert sqnr(changed, layer(x)) > 20
    assert (weight.history > 0).sum() == 3


def test_faults_act_on_native_scales_as_on_emulated_ones() -> None:
    layers = {
        b: layer_of(replace(NATIVE, backend=b), (32, 16), "cpu") for b in ("native", "emulated")
    }
    fault = ScaleFault(start=0, growth=4.0, roles=("input",))
    results = {}
    for name, layer in layers.items():
        for seed in range(2):
            one_pass(layer, seed)
        LayerFaults({"up": layer}, (fault,)).begin_step(0)
        results[name] = one_pass(layer, 3).parts["fprop"]
    assert sqnr(results["emulated"], results["native"]) > 40
    whole = layer_of(replace(NATIVE, backend="bf16"), (32, 16), "cpu")
    assert sqnr(one_pass(whole, 3).parts["fprop"], results["native"]) < 20


def test_margin_history_and_bfloat16_work_on_native_layers() -> None:
    layer = layer_of(NATIVE, (32, 16), "cpu")
    assert isinstance(layer, Fp8Linear)
    one_pass(layer, 0)
    before = layer.scaling_of("input").scale.clone()
    layer.set_margin(1)
    assert torch.equal(layer.scaling_of("input").scale, before / 2)
    layer.to_bf16()
    plain = layer_of(replace(NATIVE, backend="bf16"), (32, 16), "cpu")
    assert torch.equal(one_pass(layer, 1).parts["fprop"], one_pass(plain, 1).parts["fprop"])


def test_a_monitor_is_told_formats_and_scales() -> None:
    layer = layer_of(NATIVE, (32, 16), "cpu")
    assert isinstance(layer, QuantizedGemm)
    one_pass(layer, 0)
    one_pass(layer, 1)
    assert layer.operand("input").format == "e4m3"
    assert layer.operand("grad_output").format == "e5m2"
    assert isinstance(layer, Fp8Linear)
    assert torch.equal(layer.operand("weight").scale, layer.scaling_of("weight").used)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_a_run_comes_near_the_emulated_one(scaling: ScalingName) -> None:
    losses = {}
    for backend in ("emulated", "native"):
        config = RunConfig(
            name="native",
            model=ModelConfig(architecture="fog_max", width=32, layers=2, heads=2),
            precision=PrecisionConfig(backend=backend, scaling=scaling),
            data=DataConfig(sequence_length=32, batch_size=2),
            steps=6,
        )
        losses[backend] = torch.tensor([step.loss for step in train(config).steps])
    assert (losses["native"] - losses["emulated"]).abs().max() < 0.02
    assert losses["native"][-1] < losses["native"][0]


def test_recomputed_blocks_leave_native_scales_alone() -> None:
    losses = []
    for recompute in (False, True):
        config = RunConfig(
            name="recomputed",
            model=ModelConfig(architecture="fog_max", width=32, layers=2, heads=2),
            precision=NATIVE,
            data=DataConfig(sequence_length=16, batch_size=4, micro_batches=2),
            execution=ExecutionConfig(recompute=recompute),
            steps=3,
        )
        losses.append([step.loss for step in train(config).steps])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling": "mxfp8"}, "'mxfp8' on the native backend; allowed there: delayed, current"),
        ({"forward_format": "e5m2"}, "no device multiplies two E5M2 matrices"),
        ({"attention": "fp8"}, "allowed there: plain"),
        (
            {"backend": "transformer_engine", "scaling": "rowwise"},
            "allowed there: delayed, current",
        ),
        ({"backend": "cutlass"}, "allowed: bf16, emulated, native, transformer_engine"),
        ({"bf16_first": -1}, "bf16_first is -1; allowed: 0 or more"),
        ({"activations": "fp8"}, "allowed: float32, bfloat16"),
    ],
)
def test_what_a_backend_cannot_do_is_said_when_the_config_is_made(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**({"backend": "native"} | fields))  # type: ignore[arg-type]


def test_what_a_machine_cannot_do_is_said_when_the_layer_is_made() -> None:
    with pytest.raises(ValueError, match="a stack trains with backend bf16 or emulated"):
        gemm_linear(32, 16, precision=[NATIVE] * 2, lead=(2,))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"needs a CUDA device.*allowed here: bf16"):
            gemm_linear(32, 16, precision=[PrecisionConfig(backend="transformer_engine")])
        with pytest.raises(ValueError, match=r"block128 on the native backend needs"):
            gemm_linear(128, 128, precision=[replace(NATIVE, scaling="block128")])


def model_of(**fields: object) -> Decoder:
    torch.manual_seed(0)
    sizes = ModelConfig(architecture="fog_max", width=32, layers=3, heads=2)
    return Decoder(sizes, PrecisionConfig(**fields))  # type: ignore[arg-type]


def test_layers_that_are_opted_out_stay_in_bfloat16() -> None:
    whole = model_of()
    model = model_of(bf16_layers="blocks.1.*, *.mlp.down", bf16_first=1)
    kinds = {name: type(layer).__name__ for name, layer in model.linears().items()}
    low = {name for name, kind in kinds.items() if kind == "Fp8Linear"}
    assert low == {f"blocks.2.{name}" for name in ("attention.qkv", "attention.out", "mlp.up")}
    for (name, a), (_, b) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not {*model_of(bf16_last=3).linears().values()} & {*whole.linears().values()}
    attention = model_of(attention="fp8", bf16_layers="blocks.0.attention.core")
    cores = [m for n, m in attention.named_modules() if n.endswith(".core")]
    assert [type(core).__name__ for core in cores] == [
        "PlainAttention",
        "Fp8Attention",
        "Fp8Attention",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bf16_layers": "blocks.9.*"}, r"'blocks.9.\*' matches no layer; layers: blocks.0"),
        ({"bf16_first": 4}, "bf16_first is 4 and bf16_last 0; the model has 3 blocks"),
    ],
)
def test_an_opt_out_that_hits_nothing_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**fields)


def test_every_gemm_tells_its_recipe() -> None:
    model = model_of(backend="native", history=7, bf16_first=1)
    printed, table = repr(model), describe(model)
    assert printed.count("native fp8") == 4
    assert printed.count(", bf16") == 4
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[2:]}
    assert len(lines) == 3 * 5
    assert "torch._scaled_mm" in lines["blocks.1.mlp.up"]
    assert "grad_output e5m2, delayed, history=7" in lines["blocks.1.mlp.up"]
    assert "bf16" in lines["blocks.0.mlp.up"]
