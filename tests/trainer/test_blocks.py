"""Blocks against plain float64 loops over their published equations."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foreshock.monitor.operands import Operand
from foreshock.trainer.blocks.fog import FogMaxBlock, softmax_scale
from foreshock.trainer.blocks.fused import cross_entropy, rms_norm, unit_rms, xielu
from foreshock.trainer.blocks.llama import LlamaBlock
from foreshock.trainer.blocks.parts import Parts, rotary_turns
from foreshock.trainer.config import ModelConfig, PrecisionConfig
from foreshock.trainer.precision import GemmLinear

Array = NDArray[np.float64]
Kind = type[LlamaBlock] | type[FogMaxBlock]
BATCH, TOKENS, WIDTH, HEADS, LAYERS = 2, 7, 24, 3, 5
MODEL = ModelConfig(width=WIDTH, heads=HEADS, layers=LAYERS)


class ExactLinear(GemmLinear):
    def operand(self, role: str) -> Operand:
        return Operand("fp32", None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...btd,...od->...bto", x, self.weight)


class ExactParts(Parts):
    def linear(self, in_features: int, out_features: int) -> GemmLinear:
        return ExactLinear(in_features, out_features, lead=self.lead)


def exact_block(
    kind: type[LlamaBlock] | type[FogMaxBlock], lead: tuple[int, ...] = ()
) -> nn.Module:
    torch.manual_seed(3)
    recipes = (PrecisionConfig(),) * math.prod(lead)
    block = kind(ExactParts(recipes, lead), MODEL).double()
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return block


def normed(x: Array, gain: Array | float = 1.0) -> Array:
    return np.asarray(gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5))


def rotated(x: Array) -> Array:
    """Pairs (2j, 2j + 1) as complex numbers, turned by position times base^(-2j/K)."""
    z = x[..., ::2] + 1j * x[..., 1::2]
    speeds = 500_000.0 ** (-2 * np.arange(z.shape[-1]) / x.shape[-1])
    z = z * np.exp(1j * np.arange(x.shape[-2])[:, None] * speeds)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def attention(x: Array, qkv: Array, out: Array, scale: float, *, normalise: bool) -> Array:
    q, k, v = np.split(x @ qkv.T, 3, axis=-1)
    heads = []
    for h in range(HEADS):
        part = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
        qh, kh, vh = q[..., part], k[..., part], v[..., part]
        if normalise:
            qh, kh = normed(qh), normed(kh)
        logits = scale * rotated(qh) @ rotated(kh).swapaxes(-1, -2)
        logits[..., np.triu(np.ones((TOKENS, TOKENS)), 1) > 0] = -np.inf
        p = np.exp(logits - logits.max(-1, keepdims=True))
        heads.append(p / p.sum(-1, keepdims=True) @ vh)
    return np.concatenate(heads, -1) @ out.T


def output(block: nn.Module, x: Tensor) -> Array:
    turns = rotary_turns(TOKENS, WIDTH // HEADS, x.device)
    return np.asarray(block(x, turns).detach().numpy())


def test_llama_block_is_its_equations() -> None:
    block, x = exact_block(LlamaBlock), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in block.named_parameters()}
    n = normed(x.numpy(), w["attention_norm.gain"])
    scale = 1 / math.sqrt(WIDTH / HEADS)
    mixed = attention(
        n, w["attention.qkv.weight"], w["attention.out.weight"], scale, normalise=False
    )
    h = x.numpy() + mixed
    n = normed(h, w["mlp_norm.gain"])
    gate = n @ w["mlp.gate.weight"].T
    hidden = gate / (1 + np.exp(-gate)) * (n @ w["mlp.up.weight"].T)
    np.testing.assert_allclose(output(block, x), h + hidden @ w["mlp.down.weight"].T, rtol=1e-5)


def xielu_of(x: Array, p: float, n: float) -> Array:
    a_p, a_n = math.log1p(math.exp(p)), 0.5 + math.log1p(math.exp(n))
    below = a_n * (np.expm1(np.minimum(x, -1e-6)) - x) + 0.5 * x
    return np.where(x > 0, a_p * x**2 + 0.5 * x, below)


def test_fog_block_is_its_equations() -> None:
    block, x = exact_block(FogMaxBlock), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    w = {name: p.detach().numpy() for name, p in block.named_parameters()}
    mixed = attention(
        x.numpy(),
        w["attention.qkv.weight"],
        w["attention.out.weight"],
        softmax_scale(WIDTH // HEADS),
        normalise=True,
    )
    h = x.numpy() + normed(mixed, w["attention_norm.gain"])
    p, n = w["mlp.activation.p"].item(), w["mlp.activation.n"].item()
    hidden = xielu_of(h @ w["mlp.up.weight"].T, p, n)
    expected = h + normed(hidden @ w["mlp.down.weight"].T, w["mlp_norm.gain"])
    np.testing.assert_allclose(output(block, x), expected, rtol=1e-5, atol=1e-6)


def test_fog_starts_where_the_paper_starts() -> None:
    block = FogMaxBlock(Parts((PrecisionConfig(),)), MODEL)
    torch.testing.assert_close(block.attention_norm.gain, torch.full((WIDTH,), LAYERS**-0.5))
    activation = block.mlp.activation
    # a_p = a_n = 0.8: 0.8 + 0.5 at 1, 0.8 (exp(-1) - 1 + 1) - 0.5 at -1.
    ones = activation(torch.tensor([1.0, -1.0]).view(1, 1, 2)).flatten().tolist()
    assert ones == pytest.approx([1.3, 0.8 * math.exp(-1) - 0.5])


@pytest.mark.parametrize("head_width", [8, 16, 128, 256])
def test_fog_logits_cannot_leave_their_bound(head_width: int) -> None:
    assert softmax_scale(128) == pytest.approx(0.125)
    # Normalised q and k are at most sqrt(K) long each.
    assert softmax_scale(head_width) * head_width <= 16 + 1e-12


def test_hand_written_gradients() -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(unit_rms, (random(2, 3, 4),))
    assert torch.autograd.gradcheck(rms_norm, (random(2, 1, 3, 4), random(2, 4)))
    alphas = random(2, 1, 1, 1), random(2, 1, 1, 1)
    assert torch.autograd.gradcheck(xielu, (random(2, 1, 3, 4), *alphas))
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (random(3, 5),))


def test_cross_entropy_is_torchs() -> None:
    logits, targets = 30 * torch.randn(7, 5), torch.arange(7) % 5
    logits[3, 0] = torch.inf
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, targets), expected, equal_nan=True)


@pytest.mark.parametrize("kind", [LlamaBlock, FogMaxBlock])
def test_no_token_sees_a_later_one(kind: Kind) -> None:
    block, x = exact_block(kind), torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    before = output(block, x)
    x[:, 4:] += 1.0
    after = output(block, x)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


@pytest.mark.parametrize("kind", [LlamaBlock, FogMaxBlock])
def test_a_stack_of_blocks_is_its_blocks(kind: Kind) -> None:
    stack, single = exact_block(kind, (3,)), exact_block(kind)
    x = torch.randn(3, BATCH, TOKENS, WIDTH, dtype=torch.float64)
    together = output(stack, x)
    for model in range(3):
        for name, parameter in single.named_parameters():
            parameter.data.copy_(stack.get_parameter(name)[model])
        np.testing.assert_allclose(output(single, x[model]), together[model], rtol=1e-9)
