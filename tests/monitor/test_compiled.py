"""Compiled models: one graph, no breaks, the same numbers, whenever watch() was called."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from foreshock.monitor import Watch
from foreshock.monitor.record import StepRecord
from tests.monitor.models import Recorder, TinyLlama, batches, row, tiny, train

Start = Callable[..., Watch]

# torch's own, inside its compiler.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def still(seed: int = 0) -> tuple[TinyLlama, torch.optim.Optimizer]:
    """Without dropout, whose random numbers differ between eager and compiled."""
    return tiny(seed, dropout=0.0)


def eager_records(start: Start) -> list[StepRecord]:
    model, optimizer = still()
    recorder = Recorder()
    watch = start(model, optimizer, sinks=[recorder])
    train(model, optimizer)
    watch.close()
    return recorder.records


def check_like_eager(records: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [r.step for r in records] == [r.step for r in expected]
    for ours, theirs in zip(records, expected, strict=True):
        assert ours.scalars["loss"] == pytest.approx(theirs.scalars["loss"], rel=1e-4)
        assert ours.scalars["grad_norm"] == pytest.approx(theirs.scalars["grad_norm"], rel=1e-3)
        assert [t.identity for t in ours.tensors] == [t.identity for t in theirs.tensors]
        for mine, its in zip(ours.tensors, theirs.tensors, strict=True):
            assert (mine.numel, mine.observations) == (its.numel, its.observations)
            assert mine.amax == pytest.approx(its.amax, rel=1e-3)
            assert mine.kurtosis == pytest.approx(its.kurtosis, rel=1e-2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_one_graph_and_the_numbers_of_eager(start: Start, recorder: Recorder, backend: str) -> None:
    expected = eager_records(start)
    model, optimizer = still()
    watch = start(model, optimizer)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    train(compiled, optimizer)
    watch.close()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert watch.errors == 0
    check_like_eager(recorder.records, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_losses_are_those_of_the_unwatched_compiled_model(start: Start, backend: str) -> None:
    losses = []
    for watched in (False, True):
        torch._dynamo.reset()
        model, optimizer = tiny()
        watch = start(model, optimizer) if watched else None
        torch.manual_seed(3)
        losses.append(train(torch.compile(model, backend=backend, fullgraph=True), optimizer))
        if watch is not None:
            watch.close()
    assert losses[0] == losses[1]


def test_a_compiled_model_is_watched_through_its_wrapper(start: Start, recorder: Recorder) -> None:
    expected = eager_records(start)
    model, optimizer = still()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    watch = start(compiled, optimizer)
    train(compiled, optimizer)
    watch.close()
    check_like_eager(recorder.records, expected)
    assert recorder.records[0].tensors[0].identity.layer == "gate", "no _orig_mod in names"


def test_compiled_in_place(start: Start, recorder: Recorder) -> None:
    expected = eager_records(start)
    model, optimizer = still()
    watch = start(model, optimizer)
    model.compile(backend="aot_eager", fullgraph=True)
    train(model, optimizer)
    watch.close()
    assert counters["stats"]["unique_graphs"] == 1
    check_like_eager(recorder.records, expected)


def test_a_graph_that_exists_takes_notice(start: Start, recorder: Recorder) -> None:
    model, optimizer = still()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer, steps=2)
    watch = start(compiled, optimizer)
    train(compiled, optimizer, steps=2)
    watch.close()
    assert [len(record.tensors) for record in recorder.records] == [12, 12]


def test_a_module_of_torch_that_ran_compiled_before(start: Start, recorder: Recorder) -> None:
    # torch compiles a frame of its own around these, one and the same for every model.
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            compiled(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()

    first, second = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)) for _ in range(2))
    run(first, torch.optim.SGD(first.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    with start(second, optimizer):
        run(second, optimizer)
    assert [len(record.tensors) for record in recorder.records] == [6, 6]


class Broken(nn.Module):
    """A graph break in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        z: torch.Tensor = self.b(y).square().mean()
        return z


def test_a_break_of_the_models_own_loses_nothing(start: Start, recorder: Recorder) -> None:
    torch.manual_seed(0)
    model = Broken()
    optimizer = adam(model)
    watch = start(model, optimizer)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(torch.randn(4, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    assert watch.errors == 0
    for record in recorder.records:
        found = {(t.identity.layer, t.identity.role): t.observations for t in record.tensors}
        assert found == {
            (layer, role): 1 for layer in ("a", "b") for role in ("input", "weight", "grad_output")
        }


class Checkpointed(nn.Module):
    """Recomputes its one layer in backward."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = checkpoint(self._inner, x, use_reentrant=self.reentrant)
        assert isinstance(y, torch.Tensor)
        return y.square().mean()

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.tanh(self.layer(x))
        return y


# torch.compile leaves reentrant checkpoints to eager.
@pytest.mark.parametrize(("compiled", "reentrant"), [(False, False), (False, True), (True, False)])
def test_recomputation_counts_once(
    start: Start, recorder: Recorder, compiled: bool, reentrant: bool
) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=reentrant)
    optimizer = adam(model)
    watch = start(model, optimizer)
    step = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(2):
        x = torch.randn(4, 8, requires_grad=True)
        step(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    for record in recorder.records:
        assert row(record, "layer", "input").observations == 1
        assert row(record, "layer", "grad_output").observations == 1
        assert row(record, "layer", "weight").observations == 1


def test_changing_the_cadence_compiles_nothing_anew(start: Start, recorder: Recorder) -> None:
    model, optimizer = still()
    watch = start(model, optimizer, tensor_every=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(compiled, optimizer, steps=4)
    watch.close()
    assert counters["stats"]["unique_graphs"] == 1
    assert [bool(record.tensors) for record in recorder.records] == [True, False] * 2


def test_evaluation_of_a_compiled_model_is_not_counted(start: Start, recorder: Recorder) -> None:
    model, optimizer = still()
    watch = start(model, optimizer)
    compiled = torch.compile(model, backend="aot_eager")
    (tokens,) = batches(0, 1)
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            compiled(tokens[:, :-1], tokens[:, 1:])
        model.train()
        train(compiled, optimizer, steps=1, micro_batches=1)
    watch.close()
    for record in recorder.records:
        assert row(record, "gate", "input").observations == 1
