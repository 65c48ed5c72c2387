"""Several optimizers, a GradScaler, batches that are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from tests.monitor.models import Recorder, row

Start = Callable[..., Watch]


class Net(nn.Sequential):
    """Two layers and a loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y.square().mean()


def norm(parameters: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(p.double().square().sum()) for p in parameters))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def events(recorder: Recorder, kind: str) -> list[int]:
    return [r.step for r in recorder.records for e in r.events if e.kind == kind]


def test_two_optimizers_are_one_step(start: Start, recorder: Recorder) -> None:
    model = Net()
    of = dict(model.named_parameters())
    matrices = torch.optim.SGD([of["0.weight"], of["2.weight"]], lr=0.1, momentum=0.9)
    rest = torch.optim.Adam([of["0.bias"], of["2.bias"]], lr=0.3)
    expected = []
    with start(model, [matrices, rest], optimizer_states=True) as watch:
        for _ in range(3):
            model(torch.randn(3, 4)).backward()
            before = [p.detach().clone() for p in model.parameters()]
            came = norm(gradients(model))
            for optimizer in (matrices, rest):
                optimizer.step()
                optimizer.zero_grad()
            moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
            expected.append((came, norm(moved) / norm(before)))
        assert watch.errors == 0
    records = recorder.records
    assert [r.step for r in records] == [0, 1, 2]
    found = [(r.scalars["grad_norm"], r.scalars["update_ratio"]) for r in records]
    assert found == [pytest.approx(pair, rel=1e-5) for pair in expected]
    assert {r.scalars["learning_rate"] for r in records} == {0.3}
    last = records[-1]
    assert row(last, "0", "grad_weight").observations == 1
    assert row(last, "0.bias", "exp_avg").observations == 1, "of the second optimizer"
    assert not events(recorder, "step_skipped")


def test_the_first_of_two_may_drop_its_gradients_before_the_second_has_its_own(
    start: Start, recorder: Recorder
) -> None:
    # As a generator and its discriminator take turns.
    model = Net()
    one = torch.optim.SGD(model[0].parameters(), lr=0.1)
    other = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with start(model, (one, other)):
        for _ in range(3):
            for optimizer in (one, other):
                model(torch.randn(3, 4)).backward()
                optimizer.step()
                one.zero_grad()
                other.zero_grad()
    assert [r.step for r in recorder.records] == [0, 1, 2]
    assert not events(recorder, "step_skipped")
    assert row(recorder.records[1], "0", "input").observations == 2


@pytest.mark.parametrize(
    ("optimizers", "error", "message"),
    [
        (lambda o: [], ValueError, "empty"),
        (lambda o: [o, o], ValueError, "twice"),
        (lambda o: [o, "adam"], TypeError, "is a str"),
        (lambda o: None, TypeError, "is a NoneType"),
    ],
)
def test_what_is_no_list_of_optimizers(
    start: Start, optimizers: Callable[[object], object], error: type[Exception], message: str
) -> None:
    model = Net()
    with pytest.raises(error, match=message):
        start(model, optimizers(torch.optim.SGD(model.parameters(), lr=0.1)))


def test_steps_that_a_grad_scaler_skips(start: Start, recorder: Recorder) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    norms, scales = [], []
    with start(model, optimizer, scaler=scaler) as watch:
        for step in range(6):
            x = torch.randn(3, 4)
            if step in (2, 3):
                x[0, 0] = math.inf
            optimizer.zero_grad()
            loss = model(x)
            scaler.scale(loss).backward()
            scales.append(scaler.get_scale())
            scaler.unscale_(optimizer)
            norms.append(norm(gradients(model)))
            scaler.step(optimizer)
            scaler.update()
        assert watch.errors == 0
    records = recorder.records
    assert [r.step for r in records] == list(range(6)), "numbers are those of the loop"
    assert events(recorder, "step_skipped") == [2, 3]
    assert [r.scalars["loss_scale"] for r in records] == scales
    assert scales == [1024, 1024, 1024, 512, 256, 256]
    healthy = [0, 1, 4, 5]
    found = [records[i].scalars["grad_norm"] for i in healthy]
    assert found == pytest.approx([norms[i] for i in healthy], rel=1e-5)
    assert not math.isfinite(records[2].scalars["grad_norm"])
    assert "update_ratio" not in records[2].scalars
    # What was wrong is told of the step that had it, and of no other one.
    assert set(events(recorder, "nonfinite")) == {2}
    assert {row(r, "0", "input").observations for r in records} == {1}


def test_a_fused_optimizer_is_told_on_the_device(start: Start, recorder: Recorder) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with start(model, optimizer, scaler=scaler):
        for x in (torch.randn(3, 4), torch.full((3, 4), math.inf)):
            optimizer.zero_grad()
            scaler.scale(model(x)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert [r.scalars["found_inf"] for r in recorder.records] == [0.0, 1.0]


def test_a_batch_that_the_loop_skips(start: Start, recorder: Recorder) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with start(model, optimizer):
        for step in range(4):
            loss = model(torch.randn(3, 4) * (100 if step == 2 else 1))
            losses.append(float(loss.detach()))
            loss.backward()
            if step == 2:
                optimizer.zero_grad()
                continue
            optimizer.step()
            optimizer.zero_grad()
    records = recorder.records
    assert [r.scalars["loss"] for r in records] == losses, "not mixed into the next one"
    assert events(recorder, "step_skipped") == [2]
    assert {row(r, "0", "input").observations for r in records} == {1}


def test_who_keeps_gradients_elsewhere_is_not_taken_for_skipping(
    start: Start, recorder: Recorder
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = [torch.zeros_like(p) for p in model.parameters()]
    with start(model, optimizer):
        for _ in range(4):
            for _ in range(2):
                model(torch.randn(3, 4)).backward()
                for held, parameter in zip(sums, model.parameters(), strict=True):
                    assert parameter.grad is not None
                    held += parameter.grad
                    parameter.grad = None
            for held, parameter in zip(sums, model.parameters(), strict=True):
                parameter.data -= 0.1 * held
            optimizer.step()
    # Known after the first step of the optimizer, which works on none of them.
    assert events(recorder, "step_skipped") == [0]
    assert [r.step for r in recorder.records] == [0, 1, 2, 3, 4]


def test_a_scaler_that_is_none(start: Start) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"torch\.amp\.GradScaler"):
        start(model, optimizer, scaler=3)
    off = torch.amp.GradScaler("cpu", enabled=False)
    with start(model, optimizer, scaler=off):
        pass
