"""Activations in bfloat16, the head in pieces, and compiled blocks: the same training."""

import pytest
import torch
from tests.trainer.backends import sqnr
from torch import nn

from foreshock.trainer.compiled import compile_model
from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ExecutionConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
)
from foreshock.trainer.head_loss import HeadLoss
from foreshock.trainer.loop import train
from foreshock.trainer.model import Decoder

# torch.compile asks tensors at a graph break for their gradients and makes an instance of an
# autograd function that it traces; torch warns of both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def gradients(
    architecture: Architecture, precision: PrecisionConfig, *, compiled: bool
) -> tuple[float, torch.Tensor]:
    """Loss and gradients at the second of two passes over the same text."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = ModelConfig(architecture=architecture, width=64, layers=2, heads=2, kv_heads=1)
    model = Decoder(sizes, precision)
    if compiled:
        compile_model(model, backend="aot_eager")
    text = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(1))
    for step in range(2):
        model.begin_step(step, None)
        model.zero_grad()
        loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
    return loss.item(), nn.utils.parameters_to_vector(p.grad for p in model.parameters())  # type: ignore[misc]


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        ("fog_max", "bf16"),
        ("fog_max", "native"),
        ("llama3", "bf16"),
        pytest.param("fog_max", "emulated", marks=pytest.mark.long),
        pytest.param("llama3", "native", marks=pytest.mark.long),
    ],
)
def test_compiled_blocks_compute_what_eager_ones_do(
    architecture: Architecture, backend: str
) -> None:
    precision = PrecisionConfig(backend=backend, activations="bfloat16")  # type: ignore[arg-type]
    loss, eager = gradients(architecture, precision, compiled=False)
    compiled_loss, compiled = gradients(architecture, precision, compiled=True)
    assert compiled_loss == pytest.approx(loss, abs=1e-3)
    assert sqnr(eager, compiled) > 30


@pytest.mark.parametrize("architecture", ["fog_max", "fog_flash", "llama3", "olmo2", "op"])
def test_activations_in_bfloat16_are_near_those_in_float32(architecture: Architecture) -> None:
    loss, wide = gradients(architecture, PrecisionConfig(backend="bf16"), compiled=False)
    narrow = PrecisionConfig(backend="bf16", activations="bfloat16")
    other, gradient = gradients(architecture, narrow, compiled=False)
    assert other == pytest.approx(loss, abs=0.02)
    assert other != loss
    assert sqnr(wide, gradient) > 20


@pytest.mark.parametrize("at_once", [500 * 7, 500 * 300])
def test_a_head_in_pieces_has_the_gradients_of_a_whole_one(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(500, 64, generator=generator).requires_grad_()
    targets = torch.randint(500, (30,), generator=generator)
    monkeypatch.setattr("foreshock.trainer.head_loss._LOGITS_AT_ONCE", at_once)
    head = HeadLoss()
    loss = head(x, weight, targets)
    exact = nn.functional.cross_entropy(x.float() @ weight.bfloat16().float().t(), targets)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    found = torch.autograd.grad(3 * loss, (x, weight))
    for got, wanted in zip(found, torch.autograd.grad(3 * exact, (x, weight)), strict=True):
        assert sqnr(wanted, got) > 40
    with torch.no_grad():
        assert head(x, weight, targets).item() == pytest.approx(exact.item(), rel=1e-3)


def test_a_stack_keeps_float32_activations() -> None:
    narrow = PrecisionConfig(activations="bfloat16")
    with pytest.raises(ValueError, match="a stack keeps activations in float32"):
        Decoder(ModelConfig(width=32, heads=2), [narrow] * 2, lead=(2,))


def test_the_loop_compiles_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("foreshock.trainer.trainee.compile_model", told.append)
    config = RunConfig(
        name="compiled",
        model=ModelConfig(width=32, layers=1, heads=2),
        data=DataConfig(sequence_length=16, batch_size=2),
        execution=ExecutionConfig(compile=True),
        steps=1,
    )
    train(config)
    assert [type(model) for model in told] == [Decoder]
