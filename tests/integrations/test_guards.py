"""The guard in other loops: it restores, limits the rate, and a plain loop needs few lines."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.monitor import watch
from foreshock.monitor.guard import Guard, GuardPolicy, TorchControls
from foreshock.monitor.record import Risk, StepRecord

POLICY = GuardPolicy(snapshot_every=4, good_after=4, cooldown=2)


class Alarm:
    """A scorer that detects at one step, once."""

    def __init__(self, step: int = 13) -> None:
        self.step, self.done = step, False

    def __call__(self, record: StepRecord) -> Risk:
        fires = record.step == self.step and not self.done
        self.done = self.done or fires
        state, kind = ("firing", "detection") if fires else ("ok", None)
        return Risk(step=record.step, probability={}, state=state, kind=kind)  # type: ignore[arg-type]


def told(guard: Guard | None) -> str:
    assert guard is not None
    assert guard.errors == 0
    return " ".join(str(entry) for entry in guard.entries)


def test_a_plain_loop(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controls = TorchControls(model, optimizer)
    guard = Guard(Alarm(), controls, POLICY, patience=5.0)
    before: dict[int, Any] = {}
    with watch(model, optimizer, run="plain", spool=tmp_path, sinks=[guard.sink]) as w:
        guard.attach(w)
        for step in range(24):
            before[step] = copy.deepcopy(model.state_dict())
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.log(loss=loss)
            back = guard.step(step + 1)
            if back is not None:
                held, wanted = model.state_dict(), before[back.to]
                assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    text = told(guard)
    assert "roll back to before step" in text
    assert "learning rate at most 0.005" in text
    # The schedule's own rate stands in the optimizer again after each step.
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert controls.rate() == 1e-2


def test_a_limit_holds_inside_the_step_only() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    controls = TorchControls(model, optimizer)
    controls.limit_rate(0.25)
    weight = model.weight.detach().clone()
    model.weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(model.weight, weight - 0.25)
    controls.close()
    optimizer.step()
    assert torch.equal(model.weight, weight - 1.25)


def test_what_a_loop_does_not_offer_is_said(tmp_path: Path) -> None:
    from foreshock.monitor.record import Suspect

    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = Guard(
        Alarm(),
        TorchControls(model, optimizer),
        POLICY,
        diagnose=lambda records: Suspect(name="scale"),
        patience=5.0,
    )
    with watch(model, optimizer, run="plain", spool=tmp_path, sinks=[guard.sink]) as w:
        for step in range(18):
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            w.log(loss=loss)
            guard.step(step + 1)
    assert "this loop offers no precision" in told(guard)


@pytest.mark.long
def test_huggingface(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from foreshock.monitor.integrations.huggingface import ForeshockCallback
    from foreshock.monitor.integrations.huggingface_guard import GuardCallback
    from tests.integrations.test_huggingface import trainer

    guard = GuardCallback(Alarm, POLICY, patience=5.0)
    guard.watch = ForeshockCallback("hf", spool=tmp_path / "spool", sinks=[guard.sink])
    job = trainer(tmp_path, [guard, guard.watch])
    job.train()
    assert job.state.global_step == 24
    assert "roll back to before step" in told(guard.guard)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    library = pytest.importorskip("lightning.pytorch")
    from foreshock.monitor.integrations.lightning import ForeshockCallback
    from foreshock.monitor.integrations.lightning_guard import GuardCallback
    from tests.integrations.test_lightning import fit, module

    guard = GuardCallback(Alarm, POLICY, patience=5.0)
    guard.watch = ForeshockCallback("pl", spool=tmp_path / "spool", sinks=[guard.sink])
    job = fit(library, module(library), [guard, guard.watch])
    assert job.global_step == 24
    assert "roll back to before step" in told(guard.guard)
