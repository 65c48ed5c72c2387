"""Optimizers that show what they cast: m, v, master weights, reduced gradients with mu, weights."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

from foreshock.monitor import watch
from foreshock.monitor.operands import ObservableStates, Observer, Operand
from foreshock.monitor.record import StepRecord, table_to_records


class Codes(torch.optim.SGD):
    """Casts a tensor of every role, with a factor on one of them."""

    observer: Observer | None = None

    def observe_with(self, observer: Observer | None) -> None:
        self.observer = observer

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if self.observer is None or parameter.ndim < 2:
                continue
            x = torch.tensor([[1.0, 2.0], [500.0, 2.0**-11]])
            for role in ("exp_avg", "exp_avg_sq", "master_weight", "weight_gathered"):
                self.observer(parameter, role, x, Operand("e4m3", torch.tensor(1.0)), None)
            mu = torch.tensor(0.25)
            self.observer(parameter, "grad_reduced", x, Operand("e4m3", torch.tensor(1.0)), mu)


@pytest.fixture
def records(tmp_path: Path) -> list[StepRecord]:
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = Codes(model.parameters(), lr=0.1)
    assert isinstance(optimizer, ObservableStates)
    batches: list[pa.RecordBatch] = []
    seen = watch(model, optimizer, run="r", spool=tmp_path, sinks=[batches.append], tensor_every=2)
    for _ in range(3):
        model(torch.randn(3, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen.close(20)
    assert seen.errors == 0
    assert optimizer.observer is None, "nobody looks after the watch"
    return table_to_records(pa.Table.from_batches(batches))


def test_roles_and_mu_are_in_the_records(records: list[StepRecord]) -> None:
    assert [bool(record.tensors) for record in records] == [True, False, True]
    rows = {row.identity.role: row for row in records[0].tensors if row.identity.layer == "0"}
    for role in ("exp_avg", "exp_avg_sq", "master_weight", "weight_gathered", "grad_reduced"):
        row = rows[role]
        assert row.identity.format == "e4m3"
        assert row.overflow_ratio == 0.25
        assert row.underflow_ratio == 0.25
        assert row.mu == (0.25 if role == "grad_reduced" else None)
    assert rows["input"].mu is None


def test_states_are_not_read_twice(tmp_path: Path) -> None:
    """What an optimizer shows is not read from its state as well, as codes without a scale."""
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = Codes(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[next(model.parameters())]["exp_avg"] = torch.ones(2, 2)
    batches: list[pa.RecordBatch] = []
    seen = watch(
        model,
        optimizer,
        run="r",
        spool=tmp_path,
        sinks=[batches.append],
        tensor_every=1,
        optimizer_states=True,
    )
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    assert seen.close(20)
    (record,) = table_to_records(pa.Table.from_batches(batches))
    found = [row.identity.format for row in record.tensors if row.identity.role == "exp_avg"]
    assert found == ["e4m3"]
