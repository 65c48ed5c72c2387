"""A stack against its runs alone: the same numbers up to rounding."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foreshock.monitor.record import FIELD_REDUCTIONS, TensorSums
from foreshock.monitor.statistics import tensor_sums
from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.data import Corpus, batch
from foreshock.trainer.faults import BadBatch, Fault, LearningRateRamp, OutlierRamp, ScaleFault
from foreshock.trainer.loop import train
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear
from foreshock.trainer.stacked import StackStep, train_stack

ROLES = ("input", "weight", "grad_output")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """A text with something to learn: words from a short list."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, size)) for size in random.integers(2, 8, 40)]
    text = b" ".join(words[i] for i in random.integers(0, len(words), 20_000))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return Corpus(tokens=tokens, sha256="0" * 64, name="test text")


def configs_of(architecture: Architecture, steps: int, tensor_every: int = 25) -> list[RunConfig]:
    """Six runs that differ in everything that may differ."""
    faults: list[Fault | None] = [
        None,
        LearningRateRamp(start=10, factor=1.05),
        ScaleFault(start=10, growth=1.05, layers="mlp"),
        OutlierRamp(start=10, layer="blocks.1.mlp.up", channel=3, growth=1.2),
        BadBatch(start=10, duration=5, gain=2.0),
        None,
    ]
    precisions = [
        PrecisionConfig(),
        PrecisionConfig(scaling="current"),
        PrecisionConfig(history=4, margin=1),
        PrecisionConfig(history=8),
        PrecisionConfig(scaling="current"),
        PrecisionConfig(backend="bf16"),
    ]
    optimizers = [
        OptimizerConfig(learning_rate=2e-3),
        OptimizerConfig(learning_rate=1e-3, beta2=0.99, clip=None),
        OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        OptimizerConfig(learning_rate=2e-3, beta1=0.8, clip=0.3),
        OptimizerConfig(learning_rate=1e-3, eps=1e-6),
        OptimizerConfig(learning_rate=4e-3),
    ]
    return [
        RunConfig(
            name=f"run-{index}",
            model=ModelConfig(architecture=architecture, width=32, layers=2, heads=2),
            precision=precision,
            optimizer=optimizer,
            schedule=ScheduleConfig(warmup_steps=5 * index, decay_share=0.2),
            data=DataConfig(sequence_length=32, batch_size=4),
            steps=steps,
            seed=100 + index,
            fault=fault,
            tensor_every=tensor_every,
        )
        for index, (fault, precision, optimizer) in enumerate(
            zip(faults, precisions, optimizers, strict=True)
        )
    ]


def scalars_of(steps: list[StackStep], name: str) -> Any:
    """Shape (steps, E)."""
    return np.array([step.scalars[name] for step in steps])


@pytest.mark.parametrize(
    "architecture", [pytest.param("llama3", marks=pytest.mark.long), "fog_max"]
)
def test_stack_does_what_its_runs_do_alone(architecture: Architecture, corpus: Corpus) -> None:
    configs = configs_of(architecture, steps=50)
    steps = list(train_stack(configs, corpus=corpus))
    losses = scalars_of(steps, "loss")
    norms = scalars_of(steps, "grad_norm")
    rates = scalars_of(steps, "learning_rate")
    assert [step.step for step in steps] == list(range(50))
    for index, config in enumerate(configs):
        alone = train(config, corpus=corpus).steps
        loss = np.array([step.loss for step in alone])
        # The first loss shows equal weights and data. Afterwards rounding in the GEMMs (bfloat16
        # results) and casts that flip to the next FP8 number let two equal runs drift apart.
        assert losses[0, index] == pytest.approx(loss[0], abs=1e-3)
        assert np.abs(losses[:, index] - loss).max() < 0.05
        assert np.abs(losses[:10, index] - loss[:10]).max() < 0.01
        norm = np.array([step.grad_norm for step in alone])
        assert np.abs(np.log(norms[:10, index] / norm[:10])).max() < 0.05
        np.testing.assert_allclose(rates[:, index], [s.learning_rate for s in alone], rtol=1e-6)
        assert steps[-1].scalars["tokens"][index] == alone[-1].tokens
    # The runs do differ from each other, and learn.
    assert np.ptp(losses[0]) > 1e-3
    assert (losses[-10:].mean(0) < losses[0] - 0.5).all()


def test_update_ratio_and_parameter_norm_are_torchs(corpus: Corpus) -> None:
    config = configs_of("llama3", steps=3)[5]
    steps = list(train_stack([config, config], corpus=corpus))
    torch.manual_seed(config.seed)
    model = Decoder(config.model, config.precision)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(3):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        tokens = batch(corpus, config.data, config.seed, step)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = steps[step].scalars["learning_rate"][0]
            group["weight_decay"] = 0.1
        optimizer.step()
        optimizer.zero_grad()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        ratio = ((after - before).norm() / before.norm()).item()
        for model_index in (0, 1):
            scalars = {k: v[model_index] for k, v in steps[step].scalars.items()}
            assert scalars["param_norm"] == pytest.approx(after.norm().item(), rel=1e-3)
            assert scalars["update_ratio"] == pytest.approx(ratio, rel=0.02)


def operands_alone(config: RunConfig, corpus: Corpus) -> Iterator[dict[tuple[str, str], Any]]:
    """The statistics of a run's first forward and backward pass, tensor by tensor."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model, config.precision)
    seen: dict[tuple[str, str], Any] = {}

    def measure(name: str, layer: Any, role: str, x: Tensor) -> None:
        cast = layer.operand(role)
        sums = tensor_sums(x.detach(), format=cast.format, scale=cast.scale)
        fields = {field: sums[field].numpy() for field in FIELD_REDUCTIONS}
        seen[name, role] = TensorSums(
            **fields,
            amax_rank=np.zeros(()),
            quantized=np.array(isinstance(layer, Fp8Linear)),
            channel_sum2=sums["channel_sum2"].numpy(),
        ).statistics()

    for name, layer in model.linears().items():

        def forward(module: Any, args: Any, output: Tensor, name: str = name) -> None:
            measure(name, module, "input", args[0])
            measure(name, module, "weight", module.weight)
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: measure(name, module, "grad_output", gradient)
            )

        layer.register_forward_hook(forward)
    tokens = batch(corpus, config.data, config.seed, 0)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    yield seen


@pytest.mark.parametrize("architecture", ["llama3", "fog_max"])
def test_statistics_of_a_stack_are_those_of_its_tensors(
    architecture: Architecture, corpus: Corpus
) -> None:
    configs = configs_of(architecture, steps=1)
    [first] = train_stack(configs, corpus=corpus)
    assert first.statistics is not None
    layers = list(Decoder(configs[0].model, configs[0].precision).linears())
    assert [(i.layer, i.role) for i in first.identities] == [(n, r) for n in layers for r in ROLES]
    for index, config in enumerate(configs):
        [alone] = operands_alone(config, corpus)
        for row, identity in enumerate(first.identities):
            for name, value in alone[identity.layer, identity.role].items():
                stacked = first.statistics[name][index, row]
                assert np.ma.is_masked(stacked) == np.ma.is_masked(value), (name, identity)
                if np.ma.is_masked(value):
                    continue
                # Batched GEMMs round differently; the embedding of the first layer is equal.
                same = identity.layer == layers[0] and identity.role != "grad_output"
                expected = pytest.approx(float(value), rel=1e-5 if same else 0.1, abs=0.05)
                if name not in ("top_channel", "min_nonzero"):
                    assert float(stacked) == expected, (name, identity)


def test_statistics_come_at_their_cadence(corpus: Corpus) -> None:
    configs = configs_of("llama3", steps=7, tensor_every=3)
    measured = [s.step for s in train_stack(configs, corpus=corpus) if s.statistics is not None]
    assert measured == [0, 3, 6]


def test_a_broken_model_stays_in_its_slice(corpus: Corpus) -> None:
    healthy = configs_of("fog_max", steps=12)
    explosive = dataclasses.replace(
        healthy[1],
        optimizer=OptimizerConfig(learning_rate=1e30, clip=None),
        schedule=ScheduleConfig(warmup_steps=0),
    )
    apart = scalars_of(list(train_stack(healthy, corpus=corpus)), "loss")
    mixed = [healthy[0], explosive, *healthy[2:]]
    steps = list(train_stack(mixed, corpus=corpus))
    losses = scalars_of(steps, "loss")
    assert not np.isfinite(losses[2:, 1]).any()
    others = [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(losses[:, others], apart[:, others])


def test_runs_that_do_not_fit_are_refused(corpus: Corpus) -> None:
    configs = configs_of("llama3", steps=2)
    with pytest.raises(ValueError, match="at least one"):
        train_stack([], corpus=corpus)
    with pytest.raises(ValueError, match="share steps"):
        train_stack([configs[0], dataclasses.replace(configs[1], steps=3)], corpus=corpus)
    wide = dataclasses.replace(configs[1], model=ModelConfig(width=64))
    with pytest.raises(ValueError, match="share model"):
        train_stack([configs[0], wide], corpus=corpus)


def test_a_stack_leaves_torchs_generator(corpus: Corpus) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(train_stack(configs_of("llama3", steps=1), corpus=corpus))
    assert torch.equal(torch.rand(3), expected)
