"""Trainings that no tutorial has: records are right, or they say what is missing."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from foreshock.monitor import Watch
from foreshock.monitor.clock import Clock
from foreshock.monitor.containment import Containment
from foreshock.monitor.notices import MOST_MICRO_BATCHES, MOST_SKIPS
from tests.monitor.models import Recorder, folder_of, row, tiny, train

Start = Callable[..., Watch]


class Plain(nn.Sequential):
    """Two layers and a loss."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y.square().mean()


@pytest.fixture
def model() -> Plain:
    torch.manual_seed(0)
    return Plain()


def go(
    model: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    steps: int = 2,
    seed: int = 0,
) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(3, 4, generator=generator, dtype=torch.float32))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def gradient_norm(model: nn.Module) -> float:
    gradients = [p.grad.abs().double() for p in model.parameters() if p.grad is not None]
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def details(recorder: Recorder, kind: str = "not_measured") -> list[str]:
    return [str(e.detail) for r in recorder.records for e in r.events if e.kind == kind]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_weight_that_is_computed_when_it_is_read_is_not_read(
    start: Start, recorder: Recorder, model: Plain, compiled: bool
) -> None:
    # spectral_norm takes a step of its power iteration at each reading.
    parametrizations.spectral_norm(model[0])
    twin = copy.deepcopy(model)

    def run(watched: nn.Module) -> list[float]:
        step = torch.compile(watched, backend="aot_eager") if compiled else watched
        return go(step, sgd(watched), steps=5)

    expected = run(twin)
    step = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = sgd(model)
    with start(model, optimizer) as watch:
        assert go(step, optimizer, steps=5) == expected
        assert watch.errors == 0
    roles = {t.identity.role for t in recorder.records[0].tensors if t.identity.layer == "0"}
    assert roles == {"input", "grad_output"}
    assert details(recorder) == ["no dense floating tensor that may be read: weight of 0"]


@pytest.fixture(params=[torch.bfloat16, torch.float64])
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def test_the_programs_default_dtype_changes_no_number(
    start: Start, recorder: Recorder, default_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = Plain().float()
    optimizer = sgd(model)
    x = torch.randn(3, 4, dtype=torch.float32)
    with start(model, optimizer):
        before = [p.detach().double() for p in model.parameters()]
        model(x).backward()
        optimizer.step()
    moved = sum(
        float((p.detach().double() - old).square().sum())
        for p, old in zip(model.parameters(), before, strict=True)
    )
    record = recorder.records[0]
    assert row(record, "0", "input").amax == float(x.abs().max())
    expected = math.sqrt(moved / sum(float(old.square().sum()) for old in before))
    assert record.scalars["update_ratio"] == pytest.approx(expected, rel=1e-5)


def test_complex_parameters_have_norms(start: Start, recorder: Recorder) -> None:
    class Spectrum(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4))

    torch.manual_seed(0)
    model = Spectrum()
    optimizer = sgd(model)
    before = [p.detach().clone() for p in model.parameters()]
    with start(model, optimizer) as watch:
        go(model, optimizer, steps=1)
        assert watch.errors == 0
    scalars = recorder.records[0].scalars
    after = [p.detach() for p in model.parameters()]
    assert scalars["grad_norm"] == pytest.approx(gradient_norm(model), rel=1e-6)

    def size(tensors: list[torch.Tensor]) -> float:
        return math.sqrt(sum(float(t.abs().double().square().sum()) for t in tensors))

    assert scalars["param_norm"] == pytest.approx(size(after), rel=1e-6)
    moved = size([new - old for new, old in zip(after, before, strict=True)])
    assert scalars["update_ratio"] == pytest.approx(moved / size(before), rel=1e-5)


def test_frozen_codes_in_the_optimizer_are_left_out(start: Start, recorder: Recorder) -> None:
    class Quantised(Plain):
        def __init__(self) -> None:
            super().__init__()
            for name, dtype in (("q", torch.uint8), ("f", torch.float8_e4m3fn)):
                frozen = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
                self.register_parameter(name, frozen)

    model = Quantised()
    optimizer = sgd(model)
    with start(model, optimizer) as watch:
        go(model, optimizer, steps=1)
        assert watch.errors == 0
    assert {"grad_norm", "param_norm", "update_ratio"} <= recorder.records[0].scalars.keys()


def test_vmap_hides_tensors_and_that_is_told(
    start: Start, recorder: Recorder, model: Plain
) -> None:
    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = torch.func.functional_call(model, parameters, (x,))
        return value

    optimizer = sgd(model)
    with start(model, optimizer) as watch:
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))
        found = each(dict(model.named_parameters()), torch.randn(3, 4))
        for name, parameter in model.named_parameters():
            parameter.grad = found[name].mean(0).detach()
        optimizer.step()
        assert watch.errors == 0
    (detail,) = details(recorder)
    assert "input of 0" in detail


def test_a_step_that_calls_its_base_class_is_one_step(
    start: Start, recorder: Recorder, model: Plain
) -> None:
    class Mine(torch.optim.Adam):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            super().step()

    # An instance of the base class is what makes torch put hooks around its `step` too.
    torch.optim.Adam(model.parameters())
    optimizer = Mine(model.parameters())
    with start(model, optimizer, optimizer_states=True):
        losses = go(model, optimizer, steps=3)
    assert [record.step for record in recorder.records] == [0, 1, 2]
    assert [record.scalars["loss"] for record in recorder.records] == losses
    assert row(recorder.records[1], "0", "grad_weight").observations == 1


def test_a_step_that_raised_is_taken_again(start: Start, recorder: Recorder, model: Plain) -> None:
    optimizer = sgd(model)
    with start(model, optimizer):
        model(torch.randn(3, 4)).backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 // 0)
        optimizer.step()
        go(model, optimizer, steps=1)
    assert [record.step for record in recorder.records] == [0, 1]


@pytest.mark.parametrize("thrown_away", [True, False])
def test_another_optimizer_steps(
    start: Start,
    recorder: Recorder,
    model: Plain,
    thrown_away: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = sgd(model)
    with start(model, optimizer) as watch:
        go(model, optimizer, steps=1)
        other = sgd(model)
        for _ in range(2 * MOST_MICRO_BATCHES + 10):
            model(torch.randn(3, 4)).backward()
            other.step()
            other.zero_grad(set_to_none=thrown_away)
        held = watch._collector.take()
        assert len(held.entries) + len(held.probes) <= MOST_MICRO_BATCHES * 6, "memory is bounded"
        go(model, optimizer, steps=2)
    if thrown_away:
        # Taken for skipped steps, but not for ever.
        steps = 1 + MOST_SKIPS + 2
        assert len(details(recorder, "step_skipped")) == MOST_SKIPS
    else:
        steps = 3
    assert [record.step for record in recorder.records] == list(range(steps))
    assert recorder.records[-2].tensors == ()
    assert len(recorder.records[-1].tensors) == 6
    assert len(details(recorder)) == 1 + thrown_away
    assert "is it the one that steps?" in caplog.text


def test_a_model_that_is_trained_in_evaluation_mode(
    start: Start, recorder: Recorder, model: Plain
) -> None:
    optimizer = sgd(model.eval())
    with start(model, optimizer):
        go(model, optimizer)
    (detail,) = details(recorder)
    assert "call model.train()" in detail


@pytest.mark.parametrize("bad", ["text", torch.ones(3), None])
def test_a_bad_value_costs_no_record(
    start: Start,
    recorder: Recorder,
    model: Plain,
    bad: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("foreshock.monitor.containment._UNDER_TEST", False)
    optimizer = sgd(model)
    with start(model, optimizer) as watch:
        for _ in range(2):
            losses = go(model, optimizer, steps=1)
            watch.log(loss=bad, learning_rate=3.0)  # type: ignore[arg-type]
            watch.event("data_switch", 5)  # type: ignore[arg-type]
            watch.event(bad)  # type: ignore[arg-type]
    assert [record.step for record in recorder.records] == [0, 1]
    assert recorder.records[1].scalars["loss"] == losses[0]
    assert recorder.records[1].scalars["learning_rate"] == 3.0
    assert details(recorder, "data_switch") == ["5", "5"]


def test_what_is_unfrozen_or_added_counts(start: Start, recorder: Recorder, model: Plain) -> None:
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *list(model[2].parameters())[:1]], lr=0.1)
    with start(model, optimizer):
        go(model, optimizer)
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": [model[2].bias]})
        go(model, optimizer, steps=2)
        norm = gradient_norm(model)
    assert recorder.records[-1].scalars["grad_norm"] == pytest.approx(norm, rel=1e-6)
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    assert recorder.records[-1].scalars["param_norm"] == pytest.approx(size, rel=1e-6)


def test_a_backward_pass_that_raised_does_not_cost_the_next_one_its_norm(
    start: Start, recorder: Recorder, model: Plain
) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ArithmeticError

    optimizer = sgd(model)
    with start(model, optimizer):
        x = torch.randn(3, 4, requires_grad=True)
        x.register_hook(fail)  # type: ignore[no-untyped-call]
        with pytest.raises(ArithmeticError):
            model(x).backward()
        optimizer.zero_grad()
        model(x.detach()).backward()
        norm = gradient_norm(model)
        optimizer.step()
    assert recorder.records[0].scalars["grad_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_tracing_a_watched_model_for_export(start: Start, recorder: Recorder, model: Plain) -> None:
    optimizer = sgd(model)
    x = torch.randn(3, 4)
    with start(model, optimizer):
        go(model, optimizer, steps=1)
        traced = torch.jit.trace(model, (x,))  # type: ignore[no-untyped-call]
        assert float(traced(x).detach()) == float(model(x).detach())
        go(model, optimizer, steps=1)
    # The model's own forward for the comparison, and the step's.
    assert row(recorder.records[1], "0", "input").observations == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripting_a_watched_model_says_what_to_do(start: Start) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with start(model, sgd(model)), pytest.raises(AttributeError, match="close the watch first"):
        torch.jit.script(model)
    scripted = torch.jit.script(model)
    x = torch.randn(3, 4)
    assert torch.equal(scripted(x), model(x))


def test_a_folder_that_is_gone_ends_no_training(
    start: Start, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = tiny()
    watch = start(model, optimizer)
    train(model, optimizer, steps=1)
    assert watch.flush()
    shutil.rmtree(folder_of(watch.folder).parent)
    train(model, optimizer, steps=2)
    assert not watch.flush(), "nothing is sealed"
    assert not watch.close(), "and that is said"
    assert "is the disk full?" in caplog.text
    assert len(recorder.records) == 3


@pytest.mark.parametrize("loss_last", [True, False])
def test_a_measure_beside_the_loss_is_not_taken_for_it(
    start: Start, recorder: Recorder, model: Plain, loss_last: bool
) -> None:
    class Measuring(nn.Module):
        """Returns an accuracy that no gradient comes through, a count, and the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            found = [torch.tensor(0.25), torch.tensor(3), self.body(x)]
            return found if loss_last else found[::-1]

    whole = Measuring()
    optimizer = sgd(whole)
    with start(whole, optimizer):
        found = whole(torch.randn(3, 4))
        loss = found[-1] if loss_last else found[0]
        loss.backward()
        optimizer.step()
    assert recorder.records[0].scalars["loss"] == float(loss.detach())


def test_a_watch_that_let_go_keeps_nothing(start: Start, model: Plain) -> None:
    watch = start(model, sgd(model))
    watch.detach()
    watch.log(loss=1.0)
    watch.event("checkpoint")
    assert watch._step.logged == {}
    assert watch._step.events == []
    watch.close()


def test_a_secret_with_a_line_break(
    start: Start, model: Plain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORESHOCK_TOKEN", "secret\n")
    with start(model, sgd(model)) as watch:
        assert watch.settings.token == "secret"
    monkeypatch.setenv("FORESHOCK_TOKEN", "sécret")
    with pytest.raises(ValueError, match="FORESHOCK_TOKEN"):
        start(model, sgd(model))


def test_time_inside_is_never_more_than_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    guard = Containment("test")
    clock = Clock(guard)
    clock.start()
    with guard:
        now[0] = 10.0
        first = clock.step(0.0)
        # Still in the hook that ended the first step, as a slow publication would be.
        now[0] = 11.0
    now[0] = 12.0
    with guard:
        second = clock.step(0.0)
    assert first["step_seconds"] == 10.0
    assert second == {"step_seconds": 2.0, "overhead_ratio": 1.0}
