"""What of a model is watched, what is said of the rest, and layers that come and go."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from foreshock.monitor.layers.plain import GemmAdapter
from foreshock.monitor.spool import leftovers
from tests.monitor.models import Recorder, row

Start = Callable[..., Watch]


def told(recorder: Recorder) -> list[str]:
    return [str(e.detail) for r in recorder.records for e in r.events if e.kind == "not_measured"]


class Attending(nn.Module):
    """Attention whose projections torch reads without calling them, and a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + torch.einsum("btd,edf->btf", x, self.experts)
        y: torch.Tensor = self.head(x)
        return y.square().mean()


def go(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_matrices_that_no_watched_layer_uses_are_named(start: Start, recorder: Recorder) -> None:
    torch.manual_seed(0)
    model = Attending()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with start(model, optimizer) as watch:
        assert watch.layers == ("head",), "out_proj is read, never called"
        go(model, optimizer, torch.randint(7, (2, 3)))
    (detail,) = told(recorder)
    # 56 of 56 + 192 + 64 + 128 elements; the embedding is no GEMM's.
    assert detail == (
        "13% of the elements of trained matrices are in layers that can be watched; "
        "not attention.in_proj_weight, experts, attention.out_proj.weight"
    )


class Calling(nn.MultiheadAttention):
    """Calls its projection, as attention written anew does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        y: torch.Tensor = self.out_proj(x)
        return y.square().mean()


def test_a_projection_that_is_called_is_watched(start: Start, recorder: Recorder) -> None:
    model = Calling(8, 2)
    optimizer = torch.optim.SGD([model.out_proj.weight], lr=0.01)
    with start(model, optimizer) as watch:
        assert watch.layers == ("out_proj",)
        go(model, optimizer, torch.randn(3, 8))
    assert not told(recorder)
    assert row(recorder.records[0], "out_proj", "input").numel == 24


def test_what_a_user_leaves_out_is_no_news(start: Start, recorder: Recorder) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    loss = nn.Sequential(model, nn.Flatten(0), nn.Softmax(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with start(loss, optimizer, include="0.0"):
        for _ in range(2):
            loss(torch.randn(3, 4)).sum().backward()
            optimizer.step()
    assert not told(recorder)


def test_the_linear_layer_of_gpt2(start: Start, recorder: Recorder) -> None:
    from transformers.pytorch_utils import Conv1D

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc: Any = Conv1D(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.c_fc(x)
            return y.square().mean()

    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.c_fc.weight[2] *= 50
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(2, 3, 4)
    with start(model, optimizer):
        go(model, optimizer, x, steps=1)
    record = recorder.records[0]
    assert not told(recorder)
    assert {t.identity.role for t in record.tensors} == {"input", "weight", "grad_output"}
    weight = row(record, "c_fc", "weight")
    assert weight.amax == float(model.c_fc.weight.detach().abs().max())
    assert weight.top_channel == 2, "channels are inputs, as of every other layer"
    assert row(record, "c_fc", "input").numel == 24


def test_a_layer_put_in_place_of_another_is_watched(start: Start, recorder: Recorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()

    with start(model, optimizer):
        step()
        old = ref(model[0])
        new = nn.Linear(4, 4)
        with torch.no_grad():
            new.weight.fill_(100.0)
        model[0] = new
        optimizer.param_groups[0]["params"] = list(model.parameters())
        step()
        step()
        del optimizer.state
        gc.collect()
        assert old() is None, "what the model let go of is not held"
    last = recorder.records[-1]
    assert (row(last, "0", "weight").amax or 0.0) > 50
    assert row(last, "0", "input").observations == 1
    added = [e.detail for r in recorder.records for e in r.events if e.kind == "layers_added"]
    assert added == ["0"]


def test_an_attach_that_fails_leaves_nothing_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach = GemmAdapter.attach

    def fails(self: GemmAdapter, name: str, *rest: Any) -> Any:
        if name == "1":
            raise ArithmeticError("a layer of an odd kind")
        return attach(self, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(GemmAdapter, "attach", fails)
        with pytest.raises(ArithmeticError, match="odd kind"):
            start(model, optimizer)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not list(leftovers(tmp_path))
    with start(model, optimizer):
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
