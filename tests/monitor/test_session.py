"""A watched run: what is recorded, and that the training does not change."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foreshock.monitor import Watch
from foreshock.monitor.operands import Operand
from foreshock.monitor.record import read_stream, table_to_records
from foreshock.monitor.sinks import ParquetSink, StepRecordSink
from tests.monitor.models import Recorder, TinyLlama, batches, folder_of, row, tiny, train


def test_training_is_bit_identical(start: Callable[..., Watch], recorder: Recorder) -> None:
    plain, plain_optimizer = tiny()
    expected = train(plain, plain_optimizer, steps=6)
    after = torch.rand(3)
    watched, optimizer = tiny()
    with start(watched, optimizer, tensor_every=2):
        losses = train(watched, optimizer, steps=6)
    assert losses == expected
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert torch.equal(torch.rand(3), after)
    assert len(recorder.records) == 6


def test_scalars_of_every_step(start: Callable[..., Watch], recorder: Recorder) -> None:
    model, optimizer = tiny(dropout=0.0)
    reference, reference_optimizer = tiny(dropout=0.0)
    with start(model, optimizer, tensor_every=3, tokens_per_step=24):
        losses = train(model, optimizer, steps=4)
    assert [record.step for record in recorder.records] == [0, 1, 2, 3]
    for step, record in enumerate(recorder.records):
        before = torch.cat([p.detach().flatten() for p in reference.parameters()])
        for tokens in batches(step, 2):
            _, loss = reference(tokens[:, :-1], tokens[:, 1:])
            (loss / 2).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
        after = torch.cat([p.detach().flatten() for p in reference.parameters()])
        scalars = record.scalars
        assert scalars["loss"] == pytest.approx(sum(losses[2 * step : 2 * step + 2]) / 2, rel=1e-6)
        assert scalars["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert scalars["grad_norm"] > 0.1
        assert scalars["learning_rate"] == 1e-2
        assert scalars["tokens"] == 24 * (step + 1)
        assert scalars["param_norm"] == pytest.approx(float(after.norm()), rel=1e-5)
        expected = float((after - before).norm() / before.norm())
        assert scalars["update_ratio"] == pytest.approx(expected, rel=1e-4)
        assert scalars["step_seconds"] > 0
        assert scalars["overhead_ratio"] > 0


def test_cadence_governs_tensors_only(start: Callable[..., Watch], recorder: Recorder) -> None:
    model, optimizer = tiny()
    with start(model, optimizer, tensor_every=3):
        train(model, optimizer, steps=7)
    assert [len(record.tensors) > 0 for record in recorder.records] == [True, False, False] * 2 + [
        True
    ]


def test_rows_are_layers_by_roles_in_model_order(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model, optimizer = tiny()
    with start(model, optimizer) as w:
        train(model, optimizer, steps=1)
        assert w.layers == ("gate", "up", "down", "head")
    rows = [(t.identity.layer, t.identity.role) for t in recorder.records[0].tensors]
    roles = ("input", "weight", "grad_output")
    assert rows == [(layer, role) for layer in w.layers for role in roles]
    assert {t.identity.format for t in recorder.records[0].tensors} == {"fp32"}


def test_micro_batches_merge_into_one_row(start: Callable[..., Watch], recorder: Recorder) -> None:
    model, optimizer = tiny(dropout=0.0)
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    weight = model.head.weight.detach().clone()
    with start(model, optimizer):
        train(model, optimizer, steps=1, micro_batches=3)
    record = recorder.records[0]
    x = torch.cat(seen).double()
    statistics = row(record, "head", "input")
    assert statistics.observations == 3
    assert statistics.numel == x.numel()
    assert statistics.amax == pytest.approx(float(x.abs().max()))
    pooled = x.numel() * float((x**4).sum()) / float((x**2).sum()) ** 2
    assert statistics.kurtosis == pytest.approx(pooled, rel=1e-5)
    each = [40 * float((s**4).sum()) / float((s**2).sum()) ** 2 for s in x]
    assert statistics.kurtosis_sequence_mean == pytest.approx(sum(each) / len(each), rel=1e-5)
    channels = (x**2).sum((0, 1))
    assert statistics.top_channel == int(channels.argmax())
    assert statistics.top_channel_share == pytest.approx(float(channels.max() / channels.sum()))
    once = row(record, "head", "weight")
    assert once.observations == 1
    assert once.amax == pytest.approx(float(weight.abs().max()))
    assert row(record, "head", "grad_output").observations == 3


class Fp8Linear(nn.Module):
    """Counts its calls in the scales it says it used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 4), 0.25))
        self.scale = {"input": 1.0, "weight": 2.0, "grad_output": 4.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight.T)

    def operand(self, role: str) -> Operand:
        name = "e5m2" if role == "grad_output" else "e4m3"
        return Operand(name, torch.tensor(self.scale[role]))


def test_a_quantized_layer_tells_format_and_scale(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model = nn.Sequential(Fp8Linear())
    layer = model[0]
    assert isinstance(layer, Fp8Linear)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        y = model(torch.tensor([[[448.0, 896.0, 0.0, 2.0**-10]]]))
        layer.scale["grad_output"] = 8.0
        y.sum().backward()
        optimizer.step()
    record = recorder.records[0]
    x = row(record, "0", "input")
    assert (x.identity.format, x.scale_log2) == ("e4m3", 0)
    assert (x.overflow_ratio, x.underflow_ratio, x.headroom_log2) == (0.25, 0.25, -1)
    assert row(record, "0", "weight").scale_log2 == 1
    gradient = row(record, "0", "grad_output")
    assert (gradient.identity.format, gradient.scale_log2) == ("e5m2", 3)


def test_a_module_used_twice_has_two_rows(start: Callable[..., Watch], recorder: Recorder) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sum(self.shared(10 * self.shared(x)))

    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        for _ in range(2):
            model(torch.ones(2, 3)).backward()
        optimizer.step()
    record = recorder.records[0]
    assert len(record.tensors) == 5
    assert [row(record, "shared", "input", call).observations for call in (0, 1)] == [2, 2]
    assert row(record, "shared", "weight").observations == 1
    assert row(record, "shared", "input", 0).amax == 1
    assert row(record, "shared", "grad_output", 1).amax == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_counted(
    start: Callable[..., Watch], recorder: Recorder, reentrant: bool
) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = checkpoint(self.block, x, use_reentrant=reentrant)
            assert isinstance(y, torch.Tensor)
            return y.sum()

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        model(torch.ones(2, 3, requires_grad=True)).backward()
        optimizer.step()
    counted = {
        (t.identity.layer, t.identity.role): t.observations for t in recorder.records[0].tensors
    }
    layers, roles = ("block.0", "block.2"), ("input", "weight", "grad_output")
    assert counted == {(layer, role): 1 for layer in layers for role in roles}


def test_evaluation_is_not_counted(start: Callable[..., Watch], recorder: Recorder) -> None:
    model, optimizer = tiny()
    tokens = batches(0, 1)[0]

    def evaluate(_: int) -> None:
        model.eval()
        model(tokens[:, :-1], tokens[:, 1:])
        model.train()
        with torch.no_grad():
            model(tokens[:, :-1], tokens[:, 1:])

    with start(model, optimizer):
        losses = train(model, optimizer, steps=2, micro_batches=1, before=evaluate)
    assert [r.scalars["loss"] for r in recorder.records] == pytest.approx(losses)
    assert row(recorder.records[1], "head", "input").observations == 1


def test_logged_values_win_and_late_ones_belong_to_the_step_that_ended(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model, optimizer = tiny()
    with start(model, optimizer) as w:
        for step in range(2):
            tokens = batches(step, 1)[0]
            _, loss = model(tokens, tokens)
            loss.backward()
            w.log(loss=torch.tensor(2.0), accuracy=1)
            w.log(loss=torch.tensor(4.0))
            optimizer.step()
            w.log(late=float(step))
    assert [r.scalars["loss"] for r in recorder.records] == [3.0, 3.0]
    assert [r.scalars["late"] for r in recorder.records] == [0.0, 1.0]
    assert recorder.records[0].scalars["accuracy"] == 1


@pytest.mark.parametrize(
    "output",
    [
        lambda loss: loss,
        lambda loss: {"loss": loss, "logits": None},
        lambda loss: (torch.ones(2), loss),
        lambda loss: type("Output", (), {"loss": loss})(),
    ],
    ids=["tensor", "mapping", "tuple", "attribute"],
)
def test_the_loss_is_picked_up(
    start: Callable[..., Watch], recorder: Recorder, output: Callable[[torch.Tensor], object]
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> object:
            self.loss = self.linear(x).square().mean()
            return output(self.loss)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        model(torch.ones(1, 2))
        expected = float(model.loss.detach())
        model.loss.backward()
        # A loop that divides in place must not divide the record.
        model.loss.detach().div_(10)
        optimizer.step()
    assert recorder.records[0].scalars["loss"] == pytest.approx(expected)


def test_no_loss_is_no_error(start: Callable[..., Watch], recorder: Recorder) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert "loss" not in recorder.records[0].scalars
    assert recorder.records[0].tensors[0].identity.layer == "Linear"


def test_events_stand_in_the_step_that_follows(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model, optimizer = tiny()
    with start(model, optimizer) as w:
        train(model, optimizer, steps=1)
        w.event("data_switch", "prose to code")
        train(model, optimizer, steps=1)
        w.event("checkpoint", detail="last")
    first, second = recorder.records
    assert first.events == ()
    assert [(e.kind, e.detail) for e in second.events] == [
        ("data_switch", "prose to code"),
        ("checkpoint", "last"),
        ("end", None),
    ]


def test_detach_in_mid_run(start: Callable[..., Watch], recorder: Recorder) -> None:
    model, optimizer = tiny()
    w = start(model, optimizer)
    train(model, optimizer, steps=1)
    tokens = batches(0, 1)[0]
    _, loss = model(tokens, tokens)
    w.detach()
    loss.backward()
    optimizer.step()
    train(model, optimizer, steps=1)
    assert w.close()
    assert [record.step for record in recorder.records] == [0]
    with start(model, optimizer):
        pass


def test_copies_and_pickles_of_the_model_are_not_watched(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model, optimizer = tiny()
    with start(model, optimizer):
        train(model, optimizer, steps=1, micro_batches=1)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        )
        for twin in copies:
            assert isinstance(twin, TinyLlama)
            train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), steps=1)
        copy.deepcopy(optimizer)
        train(model, optimizer, steps=1, micro_batches=1)
    assert len(recorder.records) == 2
    assert row(recorder.records[1], "head", "input").observations == 1


def test_include_and_exclude(start: Callable[..., Watch]) -> None:
    model, optimizer = tiny()
    with start(model, optimizer, include="up|down|gate", exclude="^up$") as w:
        assert w.layers == ("gate", "down")


def test_a_failing_monitor_does_not_stop_training(
    start: Callable[..., Watch],
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken statistic")

    plain, plain_optimizer = tiny()
    expected = train(plain, plain_optimizer)
    model, optimizer = tiny()
    monkeypatch.setattr("foreshock.monitor.batching.packed_sums", broken)
    monkeypatch.setattr("foreshock.monitor.containment._UNDER_TEST", False)
    with caplog.at_level(logging.WARNING), start(model, optimizer) as w:
        assert train(model, optimizer) == expected
        w.log(loss=torch.ones(3))
    assert w.errors > 1
    assert len([r for r in caplog.records if "training goes on" in r.message]) == 1
    assert [r.scalars["loss"] for r in recorder.records]
    assert "broken statistic" in str(recorder.records[0].events[0].detail)
    assert recorder.records[0].events[0].kind == "monitor_error"


def test_under_pytest_a_failing_monitor_is_loud(
    start: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = tiny()
    with start(model, optimizer) as w, pytest.raises(ValueError, match="not one value"):
        w.log(loss=torch.ones(3))


def test_a_failing_sink_hurts_nobody_else(
    start: Callable[..., Watch], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: pa.RecordBatch) -> None:
        raise RuntimeError("sink")

    monkeypatch.setattr("foreshock.monitor.containment._UNDER_TEST", False)
    model, optimizer = tiny()
    with start(model, optimizer, sinks=[broken, recorder]) as w:
        train(model, optimizer, steps=2)
        assert w.flush()
    assert len(recorder.records) == 2


def test_the_spool_holds_what_the_sinks_got(
    start: Callable[..., Watch], recorder: Recorder, tmp_path: Path
) -> None:
    model, optimizer = tiny()
    steps: list[int] = []
    parquet = tmp_path / "run.parquet"
    sinks = [recorder, StepRecordSink(lambda r: steps.append(r.step)), ParquetSink(parquet, rows=2)]
    with start(model, optimizer, sinks=sinks, config={"lr": 0.01}) as w:
        train(model, optimizer, steps=3)
        folder = folder_of(w.folder)
    (sealed,) = folder.glob("*.arrow")
    assert table_to_records(read_stream(sealed.read_bytes())) == recorder.records
    assert table_to_records(pq.read_table(parquet)) == recorder.records
    assert steps == [0, 1, 2]


def test_a_resumed_run_counts_on(start: Callable[..., Watch], recorder: Recorder) -> None:
    model, optimizer = tiny()
    with start(model, optimizer, first_step=7, tensor_every=4):
        train(model, optimizer, steps=2)
    assert [(r.step, bool(r.tensors)) for r in recorder.records] == [(7, False), (8, True)]


def test_autocast_operands_are_in_the_format_of_the_gemm(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.ones(1, 2))
        y.float().sum().backward()
        optimizer.step()
    assert {t.identity.format for t in recorder.records[0].tensors} == {"bf16"}


def test_tuple_outputs_keyword_inputs_and_empty_tensors(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    class Pair(nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair(2, 2)
            self.plain = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = self.pair(input=x)
            return torch.sum(y) + torch.sum(self.plain(x[:0]))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with start(model, optimizer):
        model(torch.ones(3, 2)).backward()
        optimizer.step()
    record = recorder.records[0]
    assert row(record, "pair", "grad_output").numel == 6
    empty = row(record, "plain", "input")
    assert (empty.numel, empty.amax) == (0, None)


def test_other_ranks_watch_nothing(
    start: Callable[..., Watch], recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    model, optimizer = tiny()
    with start(model, optimizer) as w:
        train(model, optimizer, steps=1)
        w.log(loss=1.0)
        w.event("checkpoint")
        assert w.flush()
        assert w.errors == 0
    assert recorder.records == []
    assert list(tmp_path.iterdir()) == []


def test_the_monitors_memory_is_in_the_record(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model, optimizer = tiny()
    watch = start(model, optimizer, tensor_every=2, detail_every=2)
    train(model, optimizer, steps=4)
    assert watch.close()
    sizes = [record.scalars.get("monitor_bytes") for record in recorder.records]
    assert sizes[1] is None
    assert sizes[3] is None, "counted where tensors are measured in full"
    for size in (sizes[0], sizes[2]):
        assert size is not None
        rows = len(recorder.records[0].tensors) * 17 * 8
        assert rows < size < 1_000_000, "more than its rows, and bounded"
    assert sizes[0] == sizes[2], "it does not grow"
