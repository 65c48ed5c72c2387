"""A layer's plan against the long way: what is noted of every step is the same.

Layers that hold and save what Transformer Engine's do; what would be launched is written down.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="tables of addresses are the kernels'")
from benchmarks import host_cost

from foreshock.monitor.device_rows import DeviceRows
from foreshock.monitor.layers import te_plan, transformer_engine
from foreshock.monitor.record import StepRecord
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings
from foreshock.monitor.sinks import StepRecordSink
from foreshock.monitor.together import Together

STEPS = 9
Noted = tuple[str, str, tuple[int, ...], str, float, float | None]


class Model(nn.Module):
    """One block of stand-ins, and how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for kind in host_cost.KINDS)
        self.layers[0].first = True
        for number, layer in enumerate(self.layers):
            layer.codes.fill_(number)
            for way, quantizers in layer.quantizers.items():
                for at, quantizer in enumerate(quantizers):
                    quantizer.scale.fill_(2.0 ** (at + number) + len(way))
                    quantizer.amax.fill_(float(at + 1))
        self.recomputes: bool | None = None
        self.again = False

    @property
    def layers(self) -> Any:
        """The blocks, as what they are."""
        return self.blocks

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.layers[2](x) if self.again else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recomputes is None:
            return self.body(x)
        result: torch.Tensor = checkpoint(self.body, x, use_reentrant=self.recomputes)
        return result


class Watched:
    """A model in training under a watch, and what was noted of each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, planned: bool) -> None:
        self.followed = 0
        self.noted: list[Noted] = []
        self.records: list[StepRecord] = []
        monkeypatch.setattr(Together, "_launch", lambda together: self._note(together._waiting))
        if not planned:
            monkeypatch.setattr(transformer_engine, "plan_of", lambda *_, **__: None)
        follow = te_plan.GemmPlan.follow

        def counted(plan: Any, *call: Any) -> bool:
            followed = follow(plan, *call)
            self.followed += followed
            return followed

        monkeypatch.setattr(te_plan.GemmPlan, "follow", counted)
        self.model = Model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        settings = WatchSettings(
            run="plan",
            cadence=Cadence(1, 1000),
            sinks=(StepRecordSink(self.records.append),),
            spool=None,
        )
        self.watch = Watch(self.model, self.optimizer, settings)
        self.rows, self.steps = 4, 0

    def _note(self, waiting: Any) -> None:
        for slot, x, scale in zip(waiting.owners, waiting.tensors, waiting.scales, strict=True):
            factor = None if scale is None else float(scale)
            total = float(x.detach().double().sum())
            self.noted.append((*slot.place, tuple(x.shape), slot.format, total, factor))

    def step(self, micro_batches: int = 1) -> list[Noted]:
        """Train; what was noted, in order."""
        self.noted = []
        self.steps += 1
        for number in range(micro_batches):
            shape = (self.rows, host_cost.WIDTH)
            x = torch.full(shape, self.steps + number / 4, dtype=torch.bfloat16)
            (self.model(x.requires_grad_()).sum() * self.steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sorted(self.noted, key=str)

    def histories(self) -> list[list[tuple[Any, ...]]]:
        """Rows that are known of scales and largest magnitudes alone, by step."""
        assert self.watch.flush()
        assert self.watch.errors == 0
        return [
            [
                (t.identity.layer, t.identity.role, t.amax, t.scale_log2, t.observations)
                for t in record.tensors
            ]
            for record in self.records
        ]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Transformer Engine were loaded, its context open, and there were a device."""
    state = types.ModuleType("transformer_engine.pytorch.quantization")
    state.FP8GlobalStateManager = types.SimpleNamespace(FP8_ENABLED=True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, state.__name__, state)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    kernels = host_cost.Kernels()
    on = classmethod(lambda cls, device, **rest: cls(device, kernels, **rest))
    monkeypatch.setattr(DeviceRows, "on", on)
    monkeypatch.setattr(Watch, "_reads_parameters", lambda *_: False)


def swap_quantizers(run: Watched) -> None:
    """Another recipe: new lists."""
    for layer in run.model.layers:
        old = layer.quantizers["scaling_fwd"]
        layer.quantizers["scaling_fwd"] = [host_cost.Float8Quantizer() for _ in old]


def swap_scale(run: Watched) -> None:
    """One quantizer gets another scale."""
    run.model.layers[2].quantizers["scaling_bwd"][0].scale = torch.full((1,), 32.0)


def other_shape(run: Watched) -> None:
    """Another number of rows, and back."""
    run.rows = 8 if run.rows == 4 else 4


def call_twice(run: Watched) -> None:
    """One layer runs twice in a forward pass."""
    run.model.again = True


def once_more(run: Watched) -> None:
    """Back to once."""
    run.model.again = False


def recompute(run: Watched) -> None:
    """Activation checkpoints."""
    run.model.recomputes = False


def recompute_reentrantly(run: Watched) -> None:
    """The other kind of them."""
    run.model.recomputes = True


def sixteen_bits(run: Watched) -> None:
    """A layer leaves FP8."""
    run.model.layers[0].fp8 = False


def other_weight(run: Watched) -> None:
    """Weights move in memory."""
    weight = run.model.layers[2].weights[-1]
    weight.data = torch.full_like(weight, 3.0)


def other_objects(run: Watched) -> None:
    """A layer saves its input as values."""
    run.model.layers[0].places = ((2, "weight"), (5, "weight"))


def no_update(run: Watched) -> None:
    """Nobody says when scales of gradients are made anew."""
    run.model.layers[0].first = False


def evaluate(run: Watched) -> None:
    """Passes that do not count."""
    x = torch.ones(4, host_cost.WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        run.model(x)
    run.model.eval()
    run.model(x.requires_grad_())
    run.model.train()


def context_ends(run: Watched) -> None:
    """The model runs outside of the library's context."""
    state: Any = sys.modules["transformer_engine.pytorch.quantization"]
    state.FP8GlobalStateManager.FP8_ENABLED = False


def other_layer(run: Watched) -> None:
    """A layer is replaced by a new one."""
    new = host_cost.KINDS[2]()
    new.codes.fill_(9)
    run.model.layers[2] = new


CHANGES: list[Callable[[Watched], None]] = [
    swap_quantizers, swap_scale, other_shape, call_twice, once_more, recompute,
    recompute_reentrantly, sixteen_bits, other_weight, other_objects, no_update, evaluate,
    context_ends, other_layer,
]  # fmt: skip


def both(
    story: Callable[[Watched], list[list[Noted]]],
) -> tuple[list[list[Noted]], int]:
    """What a story notes the long way and by plans, which must be the same; calls by plans."""
    found = []
    for planned in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            run = Watched(patch, planned=planned)
            found.append((story(run), run.histories(), run.followed))
            run.watch.close()
        state: Any = sys.modules["transformer_engine.pytorch.quantization"]
        state.FP8GlobalStateManager.FP8_ENABLED = True
    (long, long_rows, none), (short, short_rows, followed) = found
    assert none == 0
    assert short == long
    assert short_rows == long_rows
    return short, followed


def test_steps_that_are_alike_go_by_the_plan_and_note_the_same() -> None:
    steps, followed = both(lambda run: [run.step() for _ in range(STEPS)])
    # Three layers with eleven operands; the first steps find out.
    assert followed >= 3 * (STEPS - 5)
    assert {len(step) for step in steps[2:]} == {11}
    assert len({(layer, role) for layer, role, *_ in steps[-1]}) == 11


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_in_mid_run_is_noted_as_without_a_plan(
    change: Callable[[Watched], None],
) -> None:
    def story(run: Watched) -> list[list[Noted]]:
        steps = [run.step() for _ in range(6)]
        change(run)
        steps += [run.step() for _ in range(4)]
        if change in (other_shape, call_twice):
            (other_shape if change is other_shape else once_more)(run)
        return steps + [run.step() for _ in range(4)]

    both(story)


def test_micro_batches_are_noted_each_and_weights_once() -> None:
    steps, followed = both(lambda run: [run.step(micro_batches=3) for _ in range(STEPS)])
    assert followed >= 3 * 3 * (STEPS - 5)
    weights = [noted for noted in steps[-1] if noted[1] == "weight"]
    assert len(weights) == 4
    assert len(steps[-1]) == 4 + 3 * 7


def test_forward_passes_before_their_backward_passes() -> None:
    """As pipeline stages do: two calls of a layer are in flight."""

    def interleaved(run: Watched) -> list[Noted]:
        run.noted = []
        shape = (4, host_cost.WIDTH)
        losses = [run.model(torch.full(shape, at, dtype=torch.bfloat16).requires_grad_()).sum()
                  for at in (1.0, 2.0)]  # fmt: skip
        for loss in losses:
            loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return sorted(run.noted, key=str)

    _, followed = both(lambda run: [interleaved(run) for _ in range(STEPS)])
    assert followed > 0


def test_after_detach_nothing_is_noted() -> None:
    def story(run: Watched) -> list[list[Noted]]:
        steps = [run.step() for _ in range(6)]
        run.watch.detach()
        last = run.step()
        assert last == []
        return steps

    both(story)


def test_a_layer_that_is_let_go_of_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Watched(monkeypatch, planned=True)
    for _ in range(6):
        run.step()
    assert run.followed
    old = weakref.ref(run.model.layers[2])
    other_layer(run)
    run.step()
    gc.collect()
    assert old() is None
    run.watch.close()
