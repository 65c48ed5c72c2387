"""Activation checkpoints: every tensor counts once, and what was kept is the training's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from foreshock.monitor import Watch
from tests.monitor.models import Recorder, row
from tests.monitor.test_odd_loops import Plain, go, sgd

Start = Callable[..., Watch]


@pytest.fixture
def model() -> Plain:
    torch.manual_seed(0)
    return Plain()


class Checkpointed(nn.Module):
    """Recomputes its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        # Something must be needed from after the layer, or it is not run again to its end.
        return torch.relu(self.a(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(checkpoint(self._first, x, use_reentrant=False))
        return y.square().mean()


def test_a_pass_for_values_between_forward_and_backward_is_not_counted(
    start: Start, recorder: Recorder
) -> None:
    model = Checkpointed()
    optimizer = sgd(model)
    x = torch.randn(2, 4, requires_grad=True)
    with start(model, optimizer):
        loss = model(x)
        with torch.no_grad():
            # As a reference or a teacher that is the model itself.
            reference = model(x)
        (loss - reference).backward()
        optimizer.step()
    inputs = [t.identity.call_index for t in recorder.records[0].tensors if t.identity.layer == "a"]
    assert inputs == [0, 0, 0]


class Twice(nn.Module):
    """Inside a checkpoint a layer runs for its values, and for gradients, in either order."""

    def __init__(self, reentrant: bool, values_first: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)
        self._reentrant, self._values_first = reentrant, values_first

    def _values(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y: torch.Tensor = self.a(x)
            return y

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        if self._values_first:
            return torch.relu(self._values(x) + self.a(x))
        y = self.a(x)
        return torch.relu(y + self._values(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(checkpoint(self._first, x, use_reentrant=self._reentrant))
        return y.square().mean()


@pytest.mark.parametrize("values_first", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_call_for_values_inside_a_checkpoint_doubles_nothing(
    start: Start, recorder: Recorder, reentrant: bool, values_first: bool
) -> None:
    model = Twice(reentrant, values_first)
    optimizer = sgd(model)
    with start(model, optimizer):
        for _ in range(2):
            model(torch.randn(3, 4, requires_grad=True)).backward()
            optimizer.step()
    for record in recorder.records:
        assert [t.identity.call_index for t in record.tensors] == [0] * 6
        assert {t.observations for t in record.tensors} == {1}


class Selective(nn.Module):
    """Keeps sums and recomputes everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)

    @staticmethod
    def _policy(ctx: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
        kept = operation is torch.ops.aten.sum.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return torch.relu(h * torch.sigmoid(h.sum()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        contexts = partial(create_selective_checkpoint_contexts, self._policy)
        h = checkpoint(self._first, x, use_reentrant=False, context_fn=contexts)
        y: torch.Tensor = self.b(h)
        return y.square().mean()


def test_a_selective_checkpoint_gets_its_own_operations_back(
    start: Start, recorder: Recorder
) -> None:
    # What is kept is handed out in the order of operations: a sum of the monitor's between two of
    # the training's would be taken for one of them.
    torch.manual_seed(0)
    model = Selective()
    twin = copy.deepcopy(model)
    expected = go(twin, sgd(twin), steps=5)
    optimizer = sgd(model)
    # Off the cadence operands are summed up at once, on a CPU.
    with start(model, optimizer, tensor_every=10):
        assert go(model, optimizer, steps=5) == expected
    assert row(recorder.records[0], "a", "input").observations == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(
    start: Start, recorder: Recorder, model: Plain, reentrant: bool
) -> None:
    optimizer = sgd(model)
    with start(model, optimizer):
        x = torch.randn(3, 4, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).backward()
        optimizer.step()
    record = recorder.records[0]
    assert [t.identity.call_index for t in record.tensors] == [0] * 6
    assert row(record, "0", "input").amax == float(x.detach().abs().max())
