"""AdamW with few bits against torch's, and what its states cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from foreshock.trainer.fp8lm import Fp8AdamW, ScaledWeight, StatesConfig, fp8_optimizer
from foreshock.trainer.fp8lm.states import StateCodec, stochastic_fp16

O2 = StatesConfig(level="O2")
FULL = StatesConfig(level="O1", master="fp32")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return functional.mse_loss(model(x), x[:, :4].cumsum(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def plain(model: nn.Module) -> list[torch.Tensor]:
    return [(p.plain() if isinstance(p, ScaledWeight) else p).detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "states",
    [
        StatesConfig(level="O1"),
        O2,
        StatesConfig(level="O2", exp_avg="fp16"),
        StatesConfig(level="O2", exp_avg_sq="e4m3", block=128, range_expansion=True),
        StatesConfig(level="O2", exp_avg="bf16", exp_avg_sq="bf16", master="fp32"),
        StatesConfig(level="O3", accumulate="fp32"),
    ],
    ids=lambda s: f"{s.level}-{s.exp_avg_format}-{s.exp_avg_sq_format}-{s.block}",
)
def test_four_steps_stay_near_torchs(states: StatesConfig) -> None:
    """MS-AMP's tolerance: max |dw| 3e-4 after 4 steps with the same gradients."""
    ours, theirs = network(), network()
    optimizer = fp8_optimizer(ours, states, lr=1e-4, weight_decay=0.1)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    for step in range(4):
        # One direction of gradients for both: the comparison is of updates.
        loss_of(theirs, step).backward()  # type: ignore[no-untyped-call]
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert other.grad is not None
            (mine * other.grad.clone()).sum().backward()  # type: ignore[no-untyped-call]
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    masters = [optimizer._weight(p, p, optimizer.state[p]) for p in ours.parameters()]
    for mine, other in zip(masters, theirs.parameters(), strict=True):  # type: ignore[assignment]
        assert float((mine.view(other.shape) - other).detach().abs().max()) <= 3e-4


def test_in_float32_it_is_torchs_adamw() -> None:
    ours, theirs = network(), network()
    states = StatesConfig(level="O1", master="fp32", accumulate="fp32")
    optimizer = fp8_optimizer(ours, states, lr=1e-2, weight_decay=0.3)
    # Gradients that FP8 holds exactly, so that nothing but arithmetic differs.
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            exact = torch.randint(-8, 9, other.shape, generator=generator).float()
            (mine * exact).sum().backward()  # type: ignore[no-untyped-call]
            other.grad = exact
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    for mine, other in zip(plain(ours), theirs.parameters(), strict=True):  # type: ignore[assignment]
        torch.testing.assert_close(mine, other.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "states",
    [
        StatesConfig(level="O1"),
        O2,
        StatesConfig(level="O2", stochastic_rounding=True),
        StatesConfig(level="O2", exp_avg_sq="e4m3", block=16, range_expansion=True),
        StatesConfig(level="O3"),
        StatesConfig(level="O3", block=32),
    ],
    ids=lambda s: f"{s.level}-{s.block}-{s.stochastic_rounding}",
)
def test_a_resumed_run_is_the_same_bit_for_bit(states: StatesConfig, tmp_path: object) -> None:
    straight = network()
    expected = train(straight, one := fp8_optimizer(straight, states, lr=1e-2), range(8))
    assert one.states_config is states
    first = network()
    optimizer = fp8_optimizer(first, states, lr=1e-2)
    train(first, optimizer, range(4))
    path = f"{tmp_path}/saved.pt"
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, path)
    saved = torch.load(path, weights_only=True)
    second = network(seed=9)
    resumed = fp8_optimizer(second, states, lr=1e-2)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert train(second, resumed, range(4, 8)) == expected[4:]
    assert all(map(torch.equal, plain(second), plain(straight)))


def heavy_tailed(states: StatesConfig, steps: int = 60) -> float:
    """Largest |update| / lr of steps whose gradients span many octaves."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = Fp8AdamW([weight], 1.0, (0.9, 0.95), 1e-8, 0.0, states=states)
    magnitude = torch.exp(1.5 * torch.randn(64, 64))
    largest = 0.0
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        (weight * torch.randn(64, 64, generator=generator) * magnitude).sum().backward()  # type: ignore[no-untyped-call]
        before = weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        largest = max(largest, float((weight - before).detach().abs().max()))
    return largest


def test_an_e4m3_second_moment_explodes_and_range_expansion_mends_it() -> None:
    """FP8-LM's ablation number 4, and COAT's remedy."""
    wide = {"exp_avg": "fp32", "accumulate": "fp32", "master": "fp32"}
    broken = StatesConfig(level="O2", exp_avg_sq="e4m3", **wide)  # type: ignore[arg-type]
    mended = StatesConfig(
        level="O2",
        exp_avg_sq="e4m3",
        block=128,
        range_expansion=True,
        **wide,  # type: ignore[arg-type]
    )
    sound = StatesConfig(level="O2", exp_avg_sq="fp16", **wide)  # type: ignore[arg-type]
    reference = heavy_tailed(StatesConfig(level="O2", exp_avg_sq="fp32", **wide))  # type: ignore[arg-type]
    assert heavy_tailed(broken) > 100 * reference
    assert heavy_tailed(mended) < 1.5 * reference
    assert heavy_tailed(sound) < 2 * reference


def test_formats_of_the_master_stand_in_their_published_order() -> None:
    """A weight that small steps are added to: FP16 with a scale follows, BF16 less, FP8 stands."""

    def error(master: str) -> float:
        states = StatesConfig(level="O3", master=master, exp_avg="fp32", exp_avg_sq="fp32")  # type: ignore[arg-type]
        model = nn.Linear(32, 32, bias=False)
        torch.manual_seed(1)
        start = torch.randn(32, 32)
        model.weight.data.copy_(start)
        optimizer = fp8_optimizer(model, states, lr=1e-3, weight_decay=0.0)
        for _ in range(50):
            model.weight.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        weight = model.weight
        master_value = optimizer._weight(weight, weight, optimizer.state[weight])  # type: ignore[arg-type]
        return float((master_value.view(32, 32) - (start - 0.05)).abs().mean())

    fp32, fp16, bf16, e4m3 = (error(m) for m in ("fp32", "fp16", "bf16", "e4m3"))
    assert fp32 <= fp16 < bf16 < e4m3
    assert fp16 < 5e-3


def test_bytes_per_parameter() -> None:
    """6 at O2 for weight, gradient and moments, 7 at O3 alone, 11 at O1; scales are counted."""
    expected = {"O1": (2, 1, 8), "O2": (2, 1, 3), "O3": (1, 1, 5)}
    for level, (weight, gradient, state) in expected.items():
        model = nn.Linear(256, 256, bias=False)
        optimizer = fp8_optimizer(model, StatesConfig(level=level))  # type: ignore[arg-type]
        model(torch.randn(4, 256)).square().sum().backward()
        optimizer.clip_gradients(None)
        held = optimizer.bytes
        optimizer.step()
        found = (held["weights"], held["gradients"], optimizer.bytes["states"])
        assert [round(n / 256**2, 3) for n in found] == [weight, gradient, state]


def test_settings_and_groups_are_torchs() -> None:
    model = network()
    optimizer = fp8_optimizer(model, O2, lr=0.5, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(plain(model))
    train(model, optimizer, range(1))
    scheduler.step()
    assert all(map(torch.equal, plain(model), before)), "a rate of zero moves nothing"


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"lr": -1.0}, "lr is"), ({"betas": (1.0, 0.9)}, "beta1 is"), ({"eps": -1.0}, "eps is")],
)
def test_what_is_not_allowed(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8AdamW([nn.Parameter(torch.ones(2, 2))], states=O2, **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="O1, O2 or O3"):
        Fp8AdamW([nn.Parameter(torch.ones(2, 2))], states=StatesConfig())
    with pytest.raises(ValueError, match="needs block"):
        StatesConfig(level="O2", range_expansion=True)


def test_stochastic_rounding_is_right_on_average() -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.full((20_000,), 1.0 + 2.0**-12)
    found = stochastic_fp16(x, noise).float()
    assert set(found.tolist()) == {1.0, 1.0 + 2.0**-10}
    assert float(found.mean()) == pytest.approx(1 + 2.0**-12, abs=1e-5)
    whole = StateCodec("bf16").encode(torch.tensor([1.0, -2.0]), noise=noise)
    assert whole["codes"].tolist() == [1.0, -2.0]


def test_small_steps_are_not_lost_by_stochastic_rounding() -> None:
    """Updates below half a step of FP16: rounding to the nearest never moves, chance does."""

    def moved(stochastic: bool) -> float:
        model = nn.Linear(64, 64, bias=False)
        nn.init.constant_(model.weight, 1.5)
        states = StatesConfig(level="O2", stochastic_rounding=stochastic)
        optimizer = fp8_optimizer(model, states, lr=1e-4, weight_decay=0.0)
        for _ in range(20):
            model.weight.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return 1.5 - float(plain(model)[0].mean())

    assert moved(False) == 0
    assert moved(True) == pytest.approx(20e-4, rel=0.15)
