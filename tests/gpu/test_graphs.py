"""Compiled models and CUDA graphs on a device: same losses, every replay counted, no wait."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from foreshock.monitor.record import StepRecord
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings
from tests.monitor.models import Recorder, row

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
WIDTH = 256


class Net(nn.Module):
    """Two layers in bf16 and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(functional.gelu(self.up(x)))
        return functional.mse_loss(y.float(), x.float())


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()


def made() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net().to(DEVICE, torch.bfloat16)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)


def watched(
    model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, every: int = 1
) -> Watch:
    settings = WatchSettings(run="gpu", cadence=Cadence(every), sinks=(recorder,), spool=None)
    return Watch(model, optimizer, settings)


def data(step: int) -> torch.Tensor:
    generator = torch.Generator(device=DEVICE).manual_seed(step)
    shape = (4, 128, WIDTH)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)


def train(
    call: Callable[..., Any], optimizer: torch.optim.Optimizer, steps: int = 6
) -> list[float]:
    losses = []
    for step in range(steps):
        loss = call(data(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A copy: under reduce-overhead the next step writes where this loss is.
        losses.append(loss.detach().clone())
    return [float(loss) for loss in losses]


def beside(function: Callable[[], None], times: int) -> None:
    """In a stream of its own, as a graph wants to be warmed up."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            function()
    torch.cuda.current_stream().wait_stream(side)


def check_replays(records: list[StepRecord], losses: list[float], first: int) -> None:
    for number, record in enumerate(records):
        x = data(first + number).double()
        found = row(record, "up", "input")
        assert found.observations == 1
        assert found.amax == pytest.approx(float(x.abs().max()))
        assert found.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
        assert record.scalars["loss"] == pytest.approx(losses[number], rel=1e-6)
        assert record.scalars["grad_norm"] > 0
        assert row(record, "down", "grad_output").observations == 1


def check_inputs(recorder: Recorder, steps: int, observations: int = 1) -> None:
    assert [record.step for record in recorder.records] == list(range(steps))
    for record in recorder.records:
        x = data(record.step).double()
        found = row(record, "up", "input")
        assert found.identity.format == "bf16"
        assert found.observations == observations
        assert found.numel == x.numel() * observations
        assert found.amax == pytest.approx(float(x.abs().max()))
        assert found.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
        kurtosis = x.numel() * x.square().square().sum() / x.square().sum().square()
        assert found.kurtosis == pytest.approx(float(kurtosis), rel=1e-4)
        assert row(record, "down", "grad_output").observations == observations


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_losses_are_bit_identical(mode: str) -> None:
    found = []
    for watching in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model, optimizer = made()
        recorder = Recorder()
        watch = watched(model, optimizer, recorder) if watching else None
        found.append(train(torch.compile(model, mode=mode, fullgraph=True), optimizer))
        if watch is not None:
            assert watch.close(30)
            assert watch.errors == 0
            assert counters["stats"]["unique_graphs"] == 1
            assert not counters["graph_break"]
            check_inputs(recorder, 6)
    assert found[0] == found[1]


def test_every_replay_of_a_captured_step_is_recorded() -> None:
    model, optimizer = made()
    recorder = Recorder()
    watch = watched(model, optimizer, recorder)
    static = data(0).clone()

    def step() -> torch.Tensor:
        loss: torch.Tensor = model(static)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    def warm_up() -> None:
        optimizer.zero_grad(set_to_none=True)
        step()

    beside(warm_up, 3)
    watch.flush()
    warm = len(recorder.records)
    assert warm >= 2
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    losses = []
    for number in range(4):
        static.copy_(data(10 + number))
        graph.replay()
        losses.append(float(captured))
        watch.step()
    assert watch.close(30)
    check_replays(recorder.records[-4:], losses, 10)
    assert watch.errors == 0


def test_replays_off_the_cadence_read_nothing() -> None:
    model, optimizer = made()
    recorder = Recorder()
    watch = watched(model, optimizer, recorder, every=2)
    static = data(0).clone()

    def warm_up() -> None:
        model(static).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    beside(warm_up, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(static).backward()
        optimizer.step()
    for _ in range(4):
        graph.replay()
        watch.step()
    assert watch.close(30)
    assert [bool(record.tensors) for record in recorder.records[-4:]] in (
        [True, False] * 2,
        [False, True] * 2,
    )


def test_accumulation_counts_every_micro_batch() -> None:
    model, optimizer = made()
    recorder = Recorder()
    watch = watched(model, optimizer, recorder)
    for step in range(3):
        for _ in range(3):
            model(data(step)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert watch.close(30)
    check_inputs(recorder, 3, observations=3)


def test_the_first_nonfinite_micro_batch_is_known() -> None:
    model, optimizer = made()
    recorder = Recorder()
    watch = watched(model, optimizer, recorder)
    for micro_batch in range(3):
        x = data(0)
        if micro_batch == 2:
            x[0, 0, 0] = float("nan")
        model(x).backward()
    optimizer.step()
    assert watch.close(30)
    event = next(each for each in recorder.records[0].events if each.kind == "nonfinite")
    assert (event.kind, event.layer, event.role) == ("nonfinite", "up", "input")
    assert event.micro_batch == 2


def waits_in_trace(path: Path, *, watching: bool) -> tuple[list[str], set[str]]:
    """Synchronise calls in the threads that train, and the names of everything in the trace.

    Threads by the file's own numbers: the profiler's events in Python give calls of the driver in
    threads without operations, as the monitor's is, to a thread that has some.
    """
    model, optimizer = made()
    watch = watched(model, optimizer, Recorder()) if watching else None
    train(model, optimizer, steps=4)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for step in range(4):
            model(data(step)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    trace.export_chrome_trace(str(path))
    if watch is not None:
        watch.close(30)
    events = [each for each in json.loads(path.read_text())["traceEvents"] if "tid" in each]
    training = {each["tid"] for each in events if each["name"] == "aten::mm"}
    calls = [each for each in events if each.get("cat") in ("cuda_runtime", "cuda_driver")]
    launches = [each for each in calls if "Launch" in each["name"]]
    assert {each["tid"] for each in launches} & training, (
        "the same numbers for calls and operations"
    )
    waits = [e["name"] for e in calls if "Synchronize" in e["name"] and e["tid"] in training]
    return waits, {each["name"] for each in events}


def test_a_trace_shows_no_more_waits_in_the_training_thread(tmp_path: Path) -> None:
    """The profiler itself waits for the device; the monitor adds nothing to that."""
    bare, _ = waits_in_trace(tmp_path / "bare.json", watching=False)
    seen, names = waits_in_trace(tmp_path / "watched.json", watching=True)
    assert len(seen) <= len(bare), (seen, bare)
    ours = ("accumulate_kernel", "table_kernel")
    assert any(kernel in name for name in names for kernel in ours), sorted(names)


def test_the_budget_sees_the_devices_time() -> None:
    model, optimizer = made()
    recorder = Recorder()
    settings = WatchSettings(
        run="gpu", cadence=Cadence(1), sinks=(recorder,), spool=None, budget=0.05
    )
    watch = Watch(model, optimizer, settings)
    train(model, optimizer, steps=60)
    assert watch.close(30)
    assert all(record.scalars["overhead_ratio"] > 0 for record in recorder.records[2:])
    events = [event for record in recorder.records for event in record.events]
    assert any(event.kind == "budget" for event in events), "hooks cost more on so small a model"
