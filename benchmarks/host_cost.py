"""Host time that watching Transformer Engine layers takes, without a device.

    python -m benchmarks.host_cost [--layers 4] [--rounds 15] [--steps 20] [--profile on|off]

Layers that hold and save what Transformer Engine's hold and save (quantizers, FP8 codes, an
autograd function of the same name), on tensors of a few elements, so that a step is nothing but
host time; kernels on the device are replaced by a function that does nothing. CPU time of the
training thread and of the monitor's worker, per optimizer step, medians over rounds in which
variants take turns. What launches and CUDA's own operations cost is not in it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from foreshock.monitor import fused_norms, outlets, scalars, together, triton_tables
from foreshock.monitor.device_rows import DeviceRows
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings

WIDTH = 16


class Float8Quantizer:
    """As delayed scaling has it: a scale and a largest magnitude."""

    dtype = "kFloat8E4M3"

    def __init__(self) -> None:
        self.scale, self.amax = torch.ones(1), torch.ones(1)


class Float8TensorStorage:
    """Saved as data, transpose and inverse scale."""


class Passing(torch.autograd.Function):
    """Hands its input on, and saves tensors as Transformer Engine's functions do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any, *parameters: torch.Tensor) -> torch.Tensor:
        """Shape kept."""
        objects, tensors = module.kept(x)
        ctx.tensor_objects = objects
        ctx.reduce_and_update_bwd_fp8_tensors = module.first
        ctx.parameters = len(parameters)
        ctx.save_for_backward(*tensors, *parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The gradient of each parameter is the parameter."""
        (gradient,) = gradients
        saved = ctx.saved_tensors
        parameters = saved[len(saved) - ctx.parameters :]
        return (gradient.clone(), None, *(p.detach() for p in parameters))


def function(name: str) -> Any:
    """Named, so that its node is called as the monitor knows it."""
    return type(name, (Passing,), {})


class Layer(nn.Module):
    """What a layer of Transformer Engine shows: quantizers, and tensors saved at known places."""

    fp8 = True
    first = False
    activation_dtype = torch.bfloat16
    places: tuple[tuple[int, str], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    node: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in self.shapes
        )
        self.quantizers = {
            "scaling_fwd": [Float8Quantizer() for _ in range(6)],
            "scaling_bwd": [Float8Quantizer() for _ in range(4)],
        }
        self.codes = torch.ones(4, WIDTH, dtype=torch.uint8)
        self.scale_inv = torch.ones(1)

    def kept(self, x: torch.Tensor) -> tuple[list[object], list[torch.Tensor | None]]:
        """Objects and tensors to save, codes or a weight at each known place."""
        objects: list[object] = []
        tensors: list[torch.Tensor | None] = []
        known = dict(self.places)
        for place in range(max(known, default=-1) + 1):
            if known.get(place) == "codes":
                objects.append(Float8TensorStorage())
                tensors += [self.codes, None, self.scale_inv]
            else:
                objects.append(None)
                tensors.append(self.weights[-1] if known.get(place) == "weight" else None)
        return objects, tensors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape kept."""
        result: torch.Tensor = self.node.apply(x, self, *self.weights)
        return result


def kind(name: str, places: Any, shapes: Any) -> type[Layer]:
    """A class that counts as one of Transformer Engine's."""
    inside = {"places": places, "shapes": shapes, "node": function(f"_{name}")}
    return type(name, (Layer,), inside | {"__module__": "transformer_engine.pytorch.stand_in"})


_NORM = ((WIDTH,), (WIDTH,))
KINDS = (
    kind(
        "LayerNormLinear",
        ((2, "weight"), (5, "codes")),
        (*_NORM, (3 * WIDTH,), (3 * WIDTH, WIDTH)),
    ),
    kind("DotProductAttention", (), ()),
    kind("Linear", ((0, "codes"), (2, "weight")), ((WIDTH,), (WIDTH, WIDTH))),
    kind(
        "LayerNormMLP",
        ((2, "codes"), (4, "weight"), (8, "codes"), (10, "weight")),
        (*_NORM, (4 * WIDTH,), (4 * WIDTH, WIDTH), (WIDTH,), (WIDTH, 4 * WIDTH)),
    ),
)


class Kernels:
    """In place of `foreshock.monitor.kernels`: counts what would be launched."""

    bytes = 0
    startable = True
    function = packed_metadata = None

    def __init__(self) -> None:
        self.launches = 0
        self.variant = together._Variant({}, None, self)

    def Scratch(self, device: torch.device) -> object:
        """Nothing is kept."""
        return self

    def accumulate(self, *_: object, **__: object) -> tuple[Kernels, ...]:
        """Another kind of tensor: one launch, ready for the next."""
        self.launches += 1
        return (self,)

    def start(self, x: int, scale: int | None) -> None:
        """One launch."""
        self.launches += 1

    accumulate_codes = accumulate

    def joint(self, *_: object, **__: object) -> together.Member:
        """All of them may be measured together."""
        entry = np.zeros(triton_tables.FIELDS, dtype=np.int64)
        return together.Member(self.variant, 1, entry, 0, True)

    def Together(self, _: object, control: torch.Tensor) -> together.Together:
        """The real one, whose launches come here."""
        return together.Together(self, control)

    def stream(self) -> int:
        """There is one."""
        return 0

    def addresses(self, stream: int) -> tuple[int, int]:
        """Nothing is kept."""
        return 0, 0

    def run(self, *_: object) -> None:
        """As a compiled kernel is started."""
        self.launches += 1

    def __getitem__(self, grid: object) -> Callable[..., Kernels]:
        """As Triton starts a kernel, and leaves it to be started again."""
        return self.accumulate_one

    def accumulate_one(self, *_: object, **__: object) -> Kernels:
        """The first launch of a kernel."""
        self.launches += 1
        return self


@dataclass
class Variant:
    """A model in training with its own monitor or none.

    Attributes:
        name: In the table.
        step: One training step.
        watch: The monitor.
        training, worker: Microseconds per step, one per round.
    """

    name: str
    step: Callable[[], None]
    watch: Watch | None
    training: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """One round."""
        all_before, own_before = time.process_time(), time.thread_time()
        for _ in range(steps):
            self.step()
        own = time.thread_time() - own_before
        if self.watch is not None:
            self.watch.flush()
        rest = time.process_time() - all_before - own
        self.training.append(own / steps * 1e6)
        self.worker.append(rest / steps * 1e6)


def variant(name: str, layers: int, every: int | None) -> Variant:
    """A model of so many blocks; every 0 measures nothing after the first step."""
    model = nn.Sequential(*(cls() for _ in range(layers) for cls in KINDS))
    model.get_submodule("0").first = True  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = None
    if every is not None:
        settings = WatchSettings(
            run="bench", cadence=Cadence(every or 10**9), sinks=(), spool=None, probe=False
        )
        watch = Watch(model, optimizer, settings)
        # As on a device.
        watch._outlets._worker._linger = outlets.LINGER_SECONDS
    x = torch.ones(4, WIDTH, dtype=torch.bfloat16)

    def step() -> None:
        model(x.detach().requires_grad_()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Variant(name, step, watch)


def profile(found: Variant, steps: int) -> None:
    """Where the training thread's time goes."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        found.step()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def stand_ins() -> Kernels:
    """Put what is no device in its place."""
    # Adapters of a library are asked where it is loaded.
    sys.modules.setdefault("transformer_engine", types.ModuleType("transformer_engine"))
    kernels = Kernels()
    vars(fused_norms)["norms_kernel"] = kernels
    scalars._fused = lambda device: fused_norms.FusedNorms(device) if device else None
    # All runs inside of its context.
    state = types.ModuleType("transformer_engine.pytorch.quantization")
    state.FP8GlobalStateManager = types.SimpleNamespace(FP8_ENABLED=True)  # type: ignore[attr-defined]
    sys.modules.setdefault(state.__name__, state)
    # As on a device: reading all parameters belongs to the cadence.
    Watch._reads_parameters = (  # type: ignore[method-assign]
        lambda self, step: step.measured and step.detailed
    )
    DeviceRows.on = classmethod(  # type: ignore[method-assign,assignment]
        lambda cls, device, **rest: cls(device, kernels, **rest)
    )
    return kernels


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", choices=("on", "off"))
    options = parser.parse_args()
    kernels = stand_ins()
    variants = [
        variant("without a monitor", options.layers, None),
        variant("monitor, a step off the cadence", options.layers, 0),
        variant("monitor, a measured step", options.layers, 1),
    ]
    for found in variants:
        found.run(options.steps)
        found.training.clear()
        found.worker.clear()
    if options.profile:
        profile(variants[2 if options.profile == "on" else 1], options.steps)
        return
    gc.disable()
    kernels.launches = 0
    for _ in range(options.rounds):
        for found in variants:
            found.run(options.steps)
    each = kernels.launches / options.rounds / options.steps
    bare = statistics.median(variants[0].training)
    print(f"{options.layers} blocks, {each:.0f} tensors a measured step; microseconds a step\n")
    print("| | training thread | of it the monitor's | worker thread |\n|---|---|---|---|")
    for found in variants:
        own = statistics.median(found.training)
        worker = statistics.median(found.worker)
        print(f"| {found.name} | {own:,.0f} | {own - bare:,.0f} | {worker:,.0f} |")
    for found in variants:
        if found.watch is not None:
            assert found.watch.errors == 0, "the monitor failed; its figures mean nothing"
            found.watch.close()


if __name__ == "__main__":
    main()
