"""Layers and models that no tutorial has: right numbers or a clear error, never a broken run."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from tests.monitor.models import Recorder, row, tiny, train

Start = Callable[..., Watch]


class Odd(nn.Linear):
    """A linear layer whose forward returns something else."""

    kind = "tuple"

    def forward(self, x: torch.Tensor) -> object:  # type: ignore[override]
        y = super().forward(x)
        return {
            "tuple": (y, None),
            "nested": ([y], {"more": y}),
            "integers": torch.zeros(3, dtype=torch.long),
            "none": None,
        }[self.kind]


class Around(nn.Module):
    """Uses an odd layer and a plain one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.odd, self.plain = Odd(4, 4), nn.Linear(4, 4)
        self.odd.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.odd(x)
        if self.odd.kind == "tuple":
            x = y[0]
        elif self.odd.kind == "nested":
            x = y[0][0]
        z: torch.Tensor = self.plain(x)
        return z.square().mean()


def run(model: nn.Module, x: torch.Tensor, steps: int = 2) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return one(model, optimizer, x, steps)


def one(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int = 2
) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["tuple", "nested", "integers", "none"])
def test_outputs_of_any_kind(start: Start, recorder: Recorder, kind: str) -> None:
    torch.manual_seed(0)
    model, x = Around(kind), torch.randn(2, 3, 4)
    bare = run(copy.deepcopy(model), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer) as watch:
        assert one(model, optimizer, x) == bare
        assert watch.errors == 0
    record = recorder.records[0]
    assert row(record, "odd", "input").numel == x.numel()
    gradients = [t for t in record.tensors if t.identity.role == "grad_output"]
    # Where the odd layer's output is used as a tensor, its gradient is measured.
    assert len(gradients) == (2 if kind in ("tuple", "nested") else 1)


def test_sparse_and_quantised_inputs_are_left_out_and_counted(
    start: Start, recorder: Recorder
) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.plain = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x.to_sparse())
            z: torch.Tensor = self.plain(y)
            return z.square().mean()

    torch.manual_seed(0)
    model, x = Sparse(), torch.eye(4)
    bare = run(copy.deepcopy(model), x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer) as watch:
        assert one(model, optimizer, x) == bare
        assert watch.errors == 0
    measured = {(t.identity.layer, t.identity.role) for t in recorder.records[0].tensors}
    assert ("layer", "input") not in measured
    assert ("plain", "input") in measured
    (event,) = recorder.records[0].events
    assert (event.kind, str(event.detail)[-14:]) == ("not_measured", "input of layer")


def test_layers_added_later_are_watched_from_the_next_measurement_on(
    start: Start, recorder: Recorder
) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        one(model, optimizer, torch.randn(2, 4), steps=1)
        added = nn.Linear(4, 4)
        model.layers.append(added)
        optimizer.add_param_group({"params": list(added.parameters())})
        one(model, optimizer, torch.randn(2, 4), steps=3)
    last = {t.identity.layer for t in recorder.records[-1].tensors}
    assert last == {"layers.0", "layers.1"}
    kinds = [(e.kind, e.detail) for record in recorder.records for e in record.events]
    assert kinds == [("layers_added", "layers.1"), ("end", None)]


def test_zero_elements(start: Start, recorder: Recorder) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer) as watch:
        model(torch.empty(0, 4)).sum().backward()
        optimizer.step()
    assert watch.errors == 0
    found = row(recorder.records[0], "0", "input")
    assert found.numel == 0
    assert found.amax is None


def test_two_watchers_on_one_model_are_refused(start: Start) -> None:
    model, optimizer = tiny()
    with start(model, optimizer), pytest.raises(ValueError, match="watched already"):
        start(model, optimizer)
    start(model, optimizer).close()


def test_a_part_that_is_watched_already_is_refused(start: Start) -> None:
    model, _ = tiny()
    part = torch.optim.SGD(model.gate.parameters(), lr=0.1)
    whole = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model.gate, part), pytest.raises(ValueError, match="watched already"):
        start(model, whole)


def test_a_watched_model_is_saved_and_loaded_whole(start: Start, recorder: Recorder) -> None:
    model, optimizer = tiny()
    with start(model, optimizer):
        train(model, optimizer, steps=1)
        file = io.BytesIO()
        torch.save(model, file)
        twin = copy.deepcopy(model)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    seen = len(recorder.records)
    for other in (loaded, twin):
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), steps=1)
    assert len(recorder.records) == seen


def test_detach_in_the_middle_of_a_step(start: Start, recorder: Recorder) -> None:
    model, optimizer = tiny()
    watch = start(model, optimizer)
    train(model, optimizer, steps=1)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    _, loss = model(tokens, tokens)
    watch.detach()
    loss.backward()
    optimizer.step()
    train(model, optimizer, steps=1)
    assert watch.close()
    assert watch.errors == 0


def test_optimizer_states_and_weight_gradients(start: Start, recorder: Recorder) -> None:
    model, optimizer = tiny()
    with start(model, optimizer, optimizer_states=True):
        train(model, optimizer, steps=2)
    state = optimizer.state[model.gate.weight]
    record = recorder.records[-1]
    for role in ("exp_avg", "exp_avg_sq"):
        found = row(record, "gate", role)
        assert found.amax == pytest.approx(float(state[role].abs().max()))
        assert found.rms == pytest.approx(float(state[role].square().mean().sqrt()), rel=1e-6)
    # 0.1 is the norm to which the loop clips.
    squares = sum(
        (t.rms or 0.0) ** 2 * t.numel for t in record.tensors if t.identity.role == "grad_weight"
    )
    assert squares**0.5 == pytest.approx(0.1, rel=1e-3)


def test_a_step_without_a_torch_optimizer_is_ended_by_hand(
    start: Start, recorder: Recorder
) -> None:
    model, optimizer = tiny()
    with start(model, optimizer) as watch:
        for _ in range(3):
            tokens = torch.zeros(1, 4, dtype=torch.long)
            _, loss = model(tokens, tokens)
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
            watch.step()
    assert [record.step for record in recorder.records] == [0, 1, 2]
    assert all(record.tensors for record in recorder.records)
    assert all(record.scalars["grad_norm"] > 0 for record in recorder.records)
