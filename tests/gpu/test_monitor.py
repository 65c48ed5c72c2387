"""The monitor on a CUDA device: same numbers as the CPU, no wait for the device, same training."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings
from foreshock.monitor.statistics import tensor_sums
from foreshock.trainer.config import (
    Architecture,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
)
from foreshock.trainer.data import Corpus
from foreshock.trainer.stacked import train_stack
from tests.monitor.models import Recorder, tiny

pytestmark = pytest.mark.gpu

COUNTS = ("numel", "nonfinite", "zeros", "flushed", "subnormal", "overflow", "sequences")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format_name", ["e4m3", "e5m2", "bf16"])
def test_sums_agree_with_the_cpu(dtype: torch.dtype, format_name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 65, 130, generator=generator) * 10).to(dtype)
    x[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-6])
    scale = torch.tensor(3.0)
    here = tensor_sums(x, format=format_name, scale=scale)
    there = tensor_sums(x.cuda(), format=format_name, scale=scale.cuda())
    for name, value in here.items():
        other = there[name].cpu()
        if name in COUNTS:
            assert torch.equal(value, other), name
        else:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=0, msg=name)


def test_edges_do_not_fail() -> None:
    for x in (torch.zeros(2, 3, 4), torch.empty(0, 4), torch.full((2, 2), float("nan"))):
        sums = tensor_sums(x.cuda(), format="e4m3", scale=None)
        assert float(sums["numel"].cpu()) == float(torch.isfinite(x).sum())


def _losses(*, watched: bool, sync_debug: bool = False) -> tuple[list[float], Recorder]:
    model, _ = tiny(0)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = Recorder()
    settings = WatchSettings(run="gpu", cadence=Cadence(2), sinks=(recorder,), spool=None)
    watch = Watch(model, optimizer, settings) if watched else None
    torch.manual_seed(1)
    batches = [torch.randint(0, 17, (4, 9), device="cuda") for _ in range(8)]
    losses = []
    for step, batch in enumerate(batches):
        # The first steps load kernels and pinned memory, which waits once and is no hook's doing.
        torch.cuda.set_sync_debug_mode("error" if sync_debug and step > 2 else "default")
        _, loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.cuda.set_sync_debug_mode("default")
    if watch is not None:
        watch.close()
        assert watch.errors == 0
    return [float(loss) for loss in losses], recorder


@pytest.fixture(autouse=True)
def _default_sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_watching_changes_no_bit_and_records_every_step() -> None:
    bare, _ = _losses(watched=False)
    seen, recorder = _losses(watched=True)
    assert bare == seen
    assert [record.step for record in recorder.records] == list(range(8))
    np.testing.assert_allclose([r.scalars["loss"] for r in recorder.records], bare, rtol=1e-6)
    assert [bool(r.tensors) for r in recorder.records] == [True, False] * 4


def test_the_training_thread_never_waits_for_the_device() -> None:
    _losses(watched=True, sync_debug=True)


@pytest.mark.parametrize("architecture", ["llama3", "fog_max"])
def test_a_gpu_trains_the_same_stack(architecture: Architecture) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (50_000,), generator=generator, dtype=torch.uint8)
    corpus = Corpus(tokens=tokens, sha256="0" * 64, name="noise")
    precisions = (PrecisionConfig(scaling="delayed"), PrecisionConfig(scaling="current"))
    configs = [
        RunConfig(
            name=f"gpu-{seed}",
            model=ModelConfig(architecture=architecture, width=32, layers=2, heads=2),
            precision=precision,
            data=DataConfig(sequence_length=32, batch_size=2),
            steps=6,
            seed=seed,
            tensor_every=5,
        )
        for seed, precision in enumerate(precisions)
    ]
    here = [step.scalars["loss"] for step in train_stack(configs, corpus=corpus)]
    there = [step.scalars["loss"] for step in train_stack(configs, corpus=corpus, device="cuda")]
    assert np.abs(np.array(here) - np.array(there)).max() < 0.02
