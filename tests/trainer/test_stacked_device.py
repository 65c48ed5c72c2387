"""A stack by windows against the same runs alone: data bit for bit, losses up to rounding."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from foreshock.trainer.corpus_plan import RECIPES_OF_PLAN
from foreshock.trainer.data import batch, corpus_of
from foreshock.trainer.faults import BadBatch, LearningRateRamp
from foreshock.trainer.loop import train
from foreshock.trainer.stacked import train_stack
from foreshock.trainer.stacked_device import _Texts, train_windows
from foreshock.trainer.stacked_sums import STATISTICS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts with something to learn each."""
    root = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        words = [
            random.integers(97, 123, size, dtype=np.uint8).tobytes()
            for size in random.integers(2, 8, 40)
        ]
        (root / name).mkdir()
        text = b" ".join(words[i] for i in random.integers(0, len(words), 20_000))
        (root / name / "text.txt").write_bytes(text)
    return root


def run_of(folder: Path, seed: int, **changes: Any) -> RunConfig:
    made = RunConfig(
        name=f"run-{seed}",
        model=ModelConfig(width=32, layers=2, heads=2),
        data=DataConfig(folder=str(folder / "a"), sequence_length=32, batch_size=4),
        steps=24,
        seed=seed,
        schedule=ScheduleConfig(warmup_steps=3),
        tensor_every=2,
    )
    return replace(made, **changes)


def unusual(folder: Path) -> list[RunConfig]:
    """Runs with what only windows of steps can stack."""
    data = run_of(folder, 0).data
    switched = replace(data, alternate=f"text:{folder / 'b'}", switch_at=9)
    return [
        run_of(folder, 0, data=switched),
        run_of(folder, 1, data=replace(data, repeats=4, repeats_until=12)),
        run_of(folder, 2, forget_optimizer_at=10),
        run_of(folder, 3, schedule=ScheduleConfig(warmup_steps=3, drop_at=8, drop_to=0.1)),
        run_of(folder, 4, fault=LearningRateRamp(start=6, factor=4.0, limit=4.0, until=9)),
        run_of(folder, 5, fault=BadBatch(start=7, duration=3, kind="shuffled", gain=3.0)),
    ]


def first_number(identities: object) -> Any:
    return lambda statistics: statistics[:, :, 0]


def losses_of(configs: list[RunConfig], window: int = 7) -> np.ndarray[Any, Any]:
    windows = train_windows(
        configs, fold=first_number, folded=len(STATISTICS), device="cpu", window=window
    )
    return np.concatenate([w.scalars[:, 0] for w in windows])


def test_every_run_reads_what_it_reads_alone(folder: Path) -> None:
    configs = unusual(folder)
    tokens = _Texts(configs, torch.device("cpu")).tokens(range(24))
    for index, config in enumerate(configs):
        corpus = corpus_of(config.data)
        for step in range(24):
            alone = batch(corpus, config.data, config.seed, step, config.fault)
            assert torch.equal(tokens[step, index].long(), alone), (config.name, step)


def test_unusual_runs_do_what_they_do_alone(folder: Path) -> None:
    configs = unusual(folder)
    stacked = losses_of(configs)
    for index, config in enumerate(configs):
        loss = np.array([step.loss for step in train(config).steps])
        assert stacked[0, index] == pytest.approx(loss[0], abs=1e-3)
        assert np.abs(stacked[:, index] - loss).max() < 0.05, config.name


def test_what_is_unusual_changes_the_run(folder: Path) -> None:
    plain = losses_of([run_of(folder, seed) for seed in range(6)])
    changed = losses_of(unusual(folder))
    # Of each: the first step that differs is the one at which something happens, or the next.
    different = [int(np.flatnonzero(row)[0]) for row in (plain != changed).T]
    assert different == [9, 0, 11, 9, 7, 7]


def test_windows_are_whole_and_of_any_length(folder: Path) -> None:
    configs = [run_of(folder, seed, tensor_every=3) for seed in range(2)]
    seen = list(
        train_windows(configs, fold=first_number, folded=len(STATISTICS), device="cpu", window=7)
    )
    assert [window.first for window in seen] == [0, 9, 18]
    measured = np.isfinite(np.concatenate([w.folded for w in seen])).any((1, 2))
    assert np.flatnonzero(measured).tolist() == list(range(0, 24, 3))
    # What was handed out stays as it was when the next window is trained.
    np.testing.assert_array_equal(
        np.concatenate([w.scalars[:, 0] for w in seen]), losses_of(configs)
    )


def test_a_stack_by_steps_refuses_what_only_windows_stack(folder: Path) -> None:
    with pytest.raises(ValueError, match="train_windows"):
        train_stack([run_of(folder, 0, forget_optimizer_at=3)])
    with pytest.raises(ValueError, match="share data"):
        train_stack(unusual(folder)[:2])


CASES: list[tuple[Architecture, str]] = [
    (architecture, recipe)
    for architecture in (
        "llama3",
        "llama3_smooth_swiglu",
        "olmo2",
        "op",
        "fog_max",
        "fog_opt",
        "fog_flash",
    )
    for recipe in RECIPES_OF_PLAN
]
FEW = [("llama3", "fp8_delayed1024"), ("fog_flash", "fp8_dpa"), ("olmo2", "mxfp8")]


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.long, id="-".join(case))
        for case in CASES
    ],
)
def test_architectures_and_recipes_do_what_they_do_alone(
    architecture: Architecture, recipe: str, folder: Path
) -> None:
    steps = 12 if (architecture, recipe) in FEW else 50
    configs = [
        run_of(
            folder,
            seed,
            model=ModelConfig(architecture=architecture, width=32, layers=2, heads=2),
            precision=RECIPES_OF_PLAN[recipe],
            optimizer=OptimizerConfig(learning_rate=rate),
            steps=steps,
            tensor_every=10,
        )
        for seed, rate in enumerate((1e-3, 3e-3))
    ]
    stacked = losses_of(configs)
    assert np.isfinite(stacked).all()
    for index, config in enumerate(configs):
        loss = np.array([step.loss for step in train(config).steps])
        assert np.abs(stacked[:, index] - loss).max() < 0.05


def test_scales_of_a_stack_advance_as_each_alone(folder: Path) -> None:
    """Delayed and current scaling mixed: no rounding comes between, so losses are equal bits."""
    recipes = (PrecisionConfig(history=3), PrecisionConfig(scaling="current"))
    configs = [
        run_of(folder, seed, precision=recipe, steps=10) for seed, recipe in enumerate(recipes)
    ]
    by_steps = np.array([step.scalars["loss"] for step in train_stack(configs)])
    np.testing.assert_allclose(losses_of(configs), by_steps, rtol=1e-6)


CHECK_KERNELS = """
import torch
from foreshock.monitor.statistics import tensor_sums
from foreshock.trainer.precision.cast import quantize
from foreshock.trainer.precision.scaling import tensor_amax
from foreshock.trainer.precision.stack_kernels import (
    SUMS, amax_per_model, cast_per_model, rescaled_per_model, sums_per_model,
)
torch.manual_seed(0)
whole = torch.randn(3, 3, 3, 20) * torch.tensor([1e-8, 1.0, 1e6])[:, None, None, None]
whole[1, 0, 2, 4], whole[2, 1, 0, 0], whole[0, 1] = torch.nan, torch.inf, 0
scale = torch.tensor([3e9, 300.0, 1e-4])
# Whole, and with a gap between the models' parts, as parameters of a stack have one.
for x in (whole, whole[:, :2]):
    torch.testing.assert_close(amax_per_model(x), tensor_amax(x, 1), equal_nan=True, rtol=0, atol=0)
    for name in ("e4m3", "e5m2"):
        torch.testing.assert_close(
            cast_per_model(x, scale, name), quantize(x, scale, name), equal_nan=True, rtol=0, atol=0
        )
        out = torch.empty(len(SUMS), 3, dtype=torch.float64)
        sums_per_model(x, out, format=name, scale=scale)
        r = tensor_sums(x, format=name, scale=scale, lead=1)
        some, c = r["numel"] - r["zeros"], r["channel_sum2"]
        expected = torch.stack([
            r["nonfinite"], some, r["sum2"], r["sum4"], r["amax"], some - r["flushed"],
            some - r["subnormal"], r["overflow"], r["error2"], c.sum(-1), c.square().sum(-1),
        ])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=0)
bf16 = torch.randn(3, 7, 5).bfloat16()
factor = torch.tensor([2.0, 0.1, 3.0])
assert torch.equal(rescaled_per_model(bf16, factor), bf16.float() * factor[:, None, None])
"""


def test_kernels_of_a_stack_give_what_torch_gives() -> None:
    """Through Triton's interpreter, in a process of its own as it is chosen at import."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", CHECK_KERNELS],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
