"""The first non-finite value of a run is an event that says where it came from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from foreshock.monitor.record import StepRecord
from tests.monitor.models import Recorder, batches, tiny, train


def nonfinite(record: StepRecord) -> list[tuple[int | None, str | None, str | None]]:
    return [(e.micro_batch, e.layer, e.role) for e in record.events if e.kind == "nonfinite"]


@pytest.mark.parametrize("tensor_every", [1, 100])
def test_the_first_nonfinite_value_has_micro_batch_layer_and_role(
    start: Callable[..., Watch], recorder: Recorder, tensor_every: int
) -> None:
    model, optimizer = tiny(dropout=0.0)
    calls = iter(range(100))

    def poison(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        # The second micro-batch of step 1.
        return (args[0] * math.inf,) if next(calls) == 3 else None

    model.down.register_forward_pre_hook(poison)
    with start(model, optimizer, tensor_every=tensor_every):
        train(model, optimizer, steps=4)
    assert nonfinite(recorder.records[0]) == []
    assert nonfinite(recorder.records[1])[0] == (1, "down", "input")
    # Reported once, not at every step that follows.
    assert nonfinite(recorder.records[2]) == []
    assert all(e.rank == 0 for e in recorder.records[1].events)


def test_a_nonfinite_loss_is_an_event_and_the_next_layer_stands_beside_it(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model, optimizer = tiny(dropout=0.0)
    with start(model, optimizer, tensor_every=50):
        tokens = batches(0, 1)[0]
        _, loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.head.bias.fill_(math.nan)
        optimizer.zero_grad()
        _, loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
    found = nonfinite(recorder.records[1])
    assert found == [(0, None, None), (0, "head", "grad_output")]
    assert math.isnan(recorder.records[1].scalars["loss"])


def test_parameters_that_turn_nonfinite_are_named(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    with start(model, optimizer, tensor_every=50):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert nonfinite(recorder.records[0])[0] == (None, "0", "weight")
