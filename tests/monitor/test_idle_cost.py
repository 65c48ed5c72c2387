"""What the monitor leaves undone at steps it does not measure, and that nothing is lost by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from foreshock.monitor.collector import Collector
from foreshock.monitor.containment import Containment
from foreshock.monitor.layers.adapter import HookContext, Switched
from foreshock.monitor.scalars import GradientNorms
from foreshock.monitor.session import Watch
from tests.monitor.models import Recorder


class TwoHeads(nn.Module):
    """One trunk, two heads, of which a loss may use either."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = (nn.Linear(4, 4) for _ in range(3))


def norms_after(model: TwoHeads, norms: GradientNorms, *heads: nn.Linear) -> dict[str, float]:
    """One step with a backward pass for each head."""
    model.zero_grad()
    for head in heads:
        head(model.trunk(torch.ones(2, 4))).sum().backward()
    assert norms.use()
    found = norms.norms()
    norms.start_step()
    return dict(zip(found.names, torch.cat(found.vectors).tolist(), strict=True))


def true_norms(model: nn.Module) -> dict[str, float]:
    return {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}


def test_a_pass_that_opens_otherwise_is_measured_too() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    norms = GradientNorms({p: n for n, p in model.named_parameters()}, Containment("test"))
    for heads in (
        [model.a],
        [model.a],
        [model.a, model.b],
        [model.a, model.b],
        [model.b],
        [model.b, model.a],
    ):
        assert norms_after(model, norms, *heads) == pytest.approx(true_norms(model))


def test_most_parameters_hooks_run_no_python() -> None:
    model = TwoHeads()
    norms = GradientNorms({p: n for n, p in model.named_parameters()}, Containment("test"))
    calls: list[object] = []
    told = norms._accumulated

    def counted(parameter: torch.Tensor) -> None:
        calls.append(parameter)
        told(parameter)

    norms._accumulated = counted  # type: ignore[method-assign]
    norms._let_tell(norms._handles)
    norms_after(model, norms, model.a)
    first = len(calls)
    norms_after(model, norms, model.a)
    assert (first, len(calls) - first) == (4, 1)


def test_a_switched_hook_is_off_its_module_and_comes_back_first() -> None:
    module, seen = nn.Linear(2, 2), []
    collector = Collector(torch.device("cpu"))
    context = HookContext(collector, Containment("test"), lambda: None)
    switched = Switched(module, context.hook(lambda *_: seen.append("ours")))
    module.register_forward_hook(lambda *_: seen.append("theirs"))
    switched.switch(on=False)
    module(torch.ones(2))
    switched.switch(on=True)
    module(torch.ones(2))
    switched.remove()
    switched.switch(on=True)
    module(torch.ones(2))
    assert seen == ["theirs", "ours", "theirs", "theirs"]


def test_steps_that_wait_for_each_other_all_become_records(
    start: Callable[..., Watch], recorder: Recorder
) -> None:
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = start(model, optimizer, tensor_every=1)
    watch._outlets._worker._linger = 60.0
    for _ in range(5):
        model.a(model.trunk(torch.ones(2, 4))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert watch.flush()
    assert [record.step for record in recorder.records] == list(range(5))
