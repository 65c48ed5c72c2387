"""Accelerate's loop, with and without the tracker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from foreshock.monitor.integrations.accelerate import ForeshockTracker
from tests.monitor.models import Recorder

accelerate: Any = pytest.importorskip("accelerate")

pytestmark = pytest.mark.long


def loop(tracker: ForeshockTracker | None, *, parts: int = 2) -> list[float]:
    trackers = None if tracker is None else [tracker]
    accelerator = accelerate.Accelerator(
        cpu=True, log_with=trackers, gradient_accumulation_steps=parts
    )
    accelerator.init_trackers("p", config={"lr": 0.01})
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 1))
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    model, optimizer, loader = accelerator.prepare(
        body,
        torch.optim.AdamW(body.parameters(), lr=1e-2),
        DataLoader(TensorDataset(x), batch_size=2),
    )
    if tracker is not None:
        watched = tracker.watch(model, optimizer)
        assert accelerator.get_tracker("foreshock", unwrap=True) is watched
    losses = []
    for index, (batch,) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = (model(batch).squeeze(-1) - batch.sum(-1)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        values = {"loss": loss.detach(), "data/index": index, "note": "text", "flag": True}
        accelerator.log(values, step=index)
    accelerator.end_training()
    return losses


def test_same_losses_and_logged_values_in_records(tmp_path: Path, recorder: Recorder) -> None:
    alone = loop(None)
    tracker = ForeshockTracker("a", spool=tmp_path, sinks=[recorder], tensor_every=1)
    watched = loop(tracker)
    assert watched == alone
    assert tracker.tracker is None
    records = recorder.records
    assert [r.step for r in records] == list(range(24))
    means = [(watched[2 * i] + watched[2 * i + 1]) / 2 for i in range(24)]
    assert [r.scalars["loss"] for r in records] == pytest.approx(means, rel=1e-12)
    assert [r.scalars["data/index"] for r in records] == [2 * i + 0.5 for i in range(24)]
    assert not {"note", "flag"} & set(records[0].scalars)
    assert {t.identity.layer for t in records[0].tensors} == {"0", "3"}
    (registration,) = tmp_path.glob("*/*/*/run.json")
    assert json.loads(registration.read_text())["config"] == {"lr": 0.01}
