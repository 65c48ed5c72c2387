"""Step time of Transformer Engine layers with statistics, divided by step time without.

    python -m benchmarks.te_overhead [--part every|where|exact|te|plain] [--width 1024] [--freq 10]
        [--device cpu --tokens 32]

Four te.TransformerLayer (FFN 4 x width, heads of 64), 8,192 tokens as 2 x 4,096, FP8 delayed
scaling, attention in BF16, forward, backward and fused AdamW. Variants take turns in one process;
CUDA events around ten steps each, so that every variant pays its cadence in full; medians over
rounds. Debug mode is one per process, so its variants have processes of their own, each with a bare
model that debug mode leaves alone:

- every: bare, ours at every step and every tenth, torch.compile'd statistics in plain hooks
- where: bare, and ours off and at the cadence with parts left out, to see what each of them takes
- exact: bare, and our exact path at every --freq'th step
- te: bare, and Transformer Engine's LogFp8TensorStats and LogTensorStats at every step
- plain: a transformer of nn.Linear of the same size: bare, ours, and trainscope if it is installed
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.monitor_overhead import Transformer
from benchmarks.timing import milliseconds
from foreshock.monitor import Watch, te_exact, watch

BATCH, TOKENS, LAYERS = 2, 4096, 4


@dataclass
class Variant:
    """A model in training, with its own monitor or none.

    Attributes:
        name: In the table.
        step: One training step.
        close: Called at the end.
        times: Milliseconds per step, one per round.
        device: Where it trains.
    """

    name: str
    step: Callable[[], None]
    close: Callable[[], object] = lambda: None
    times: list[float] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    def run(self, steps: int) -> float:
        """Milliseconds per step."""

        def work() -> None:
            for _ in range(steps):
                self.step()

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return milliseconds(work, self.device) / steps


class Scales:
    """Transformer Engine updates the scales of all models of a process at once; this parts them."""

    NAMES = ("global_amax_buffer", "global_amax_history_buffer", "global_scale_buffer")

    def __init__(self) -> None:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        self._manager = FP8GlobalStateManager
        self._own: dict[str, Any] = {name: {} for name in self.NAMES}

    def use(self) -> None:
        """Let only this model's scales be known."""
        for name, value in self._own.items():
            setattr(self._manager, name, value)


def layers(width: int, prefix: str) -> nn.Sequential:
    """The model."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    return nn.Sequential(
        *(
            te.TransformerLayer(
                width,
                4 * width,
                width // 64,
                layer_number=number + 1,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                attn_input_format="bshd",
                self_attn_mask_type="causal",
                params_dtype=torch.bfloat16,
                device="cuda",
                name=f"{prefix}.{number}",
            )
            for number in range(LAYERS)
        )
    )


def te_variant(
    name: str,
    width: int,
    attach: Callable[[nn.Module, torch.optim.Optimizer], tuple[Callable[[], object], ...]],
    prefix: str = "bare",
) -> Variant:
    """A variant with a model of its own.

    Args:
        name: In the table.
        width: Of the model.
        attach: Puts a monitor on model and optimizer; returns what to call after each step, and
            what to call at the end.
        prefix: Of the layers' names.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Format

    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=1024)
    model, scales = layers(width, prefix), Scales()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    after, close = attach(model, optimizer)
    data = torch.randn(BATCH, TOKENS, width, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        scales.use()
        x = data.detach().requires_grad_()
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            y = model(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return Variant(name, step, close)


def nothing(*_: object) -> tuple[Callable[[], object], ...]:
    """No monitor."""
    return (lambda: None, lambda: None)


def ours(
    every: int, detail: int = 10, without: Callable[[Watch], object] = lambda _: None
) -> Callable[..., tuple[Callable[[], object], ...]]:
    """Our watch, at every n-th step, in detail at every so many, without a part of it."""

    def attach(
        model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[Callable[[], object], ...]:
        folder = tempfile.mkdtemp()
        w = watch(
            model, optimizer, run="bench", spool=folder, tensor_every=every, detail_every=detail
        )
        without(w)

        def close() -> None:
            w.flush()
            assert w.errors == 0, "the monitor failed; its figures mean nothing"
            w.close()

        return (lambda: None, close)

    return attach


def no_worker(w: Watch) -> None:
    """Steps end in the training thread."""
    w._outlets.submit = lambda snapshot: None  # type: ignore[method-assign]


def no_gradients(w: Watch) -> None:
    """No norm of gradients, and no hook for it."""
    w._gradients.detach()


def no_layers(w: Watch) -> None:
    """No hook on a layer."""
    for _, handles in w._hooks._layers.values():
        for handle in handles:
            handle.remove()


def parts_left_out(width: int) -> list[Variant]:
    """What the parts take."""
    never = 10**9
    return [
        te_variant("bare", width, nothing),
        te_variant("off the cadence", width, ours(never)),
        te_variant("the same without the worker", width, ours(never, without=no_worker)),
        te_variant("the same without gradients' norms", width, ours(never, without=no_gradients)),
        te_variant("the same without layers' hooks", width, ours(never, without=no_layers)),
        te_variant("every step", width, ours(1)),
        te_variant("the same without the worker", width, ours(1, without=no_worker)),
        te_variant("bare, once more", width, nothing),
    ]


def one_pass(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What our rows hold of a tensor cast to E4M3, but for channels, as torch.compile fuses it."""
    values = x.float()
    finite = torch.isfinite(values)
    magnitude = torch.where(finite, values.abs(), 0.0)
    square = magnitude * magnitude
    scaled = (magnitude * scale).clamp(max=448.0)
    q = scaled.to(torch.float8_e4m3fn).float()
    error = q / scale - magnitude
    nonzero = magnitude > 0
    counts = (
        finite,
        nonzero,
        nonzero & (q == 0),
        nonzero & (scaled < 2.0**-6),
        magnitude * scale > 448.0,
    )
    sums = [count.sum(dtype=torch.float64) for count in counts]
    sums += [v.sum(dtype=torch.float64) for v in (square, square * square, error * error)]
    smallest = torch.where(nonzero, magnitude, torch.inf).amin()
    return torch.stack([*sums, magnitude.amax().double(), smallest.double()])


def compiled(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Callable[[], object], ...]:
    """Compiled statistics of module inputs, weights and output gradients, copied once a step."""
    import transformer_engine.pytorch as te

    measure = torch.compile(one_pass, dynamic=False)
    scale = torch.ones((), device="cuda")
    rows: list[torch.Tensor] = []
    pinned: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        rows.append(measure(args[0].detach(), scale))
        rows.extend(measure(p.detach(), scale) for p in module.parameters() if p.ndim == 2)
        first = output[0] if isinstance(output, tuple) else output
        first.register_hook(lambda g: rows.append(measure(g.detach(), scale)))

    for module in model.modules():
        if isinstance(module, te.Linear | te.LayerNormLinear | te.LayerNormMLP):
            module.register_forward_hook(hook)

    def after() -> None:
        found = torch.stack(rows)
        rows.clear()
        if not pinned:
            pinned.append(torch.empty(found.shape, dtype=found.dtype, pin_memory=True))
        pinned[0].copy_(found, non_blocking=True)

    return (after, lambda: None)


def plain_variant(
    name: str, width: int, attach: Callable[..., Any], device: torch.device, tokens: int
) -> Variant:
    """A transformer of nn.Linear in BF16; attach returns what to call with the loss, and close."""
    torch.manual_seed(0)
    model = Transformer(width, LAYERS, width // 64).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    before, close = attach(model, optimizer)
    data = torch.randint(0, 256, (BATCH, tokens + 1), device=device)

    def step() -> None:
        loss = model(data[:, :-1], data[:, 1:])
        loss.backward()
        before(loss)
        optimizer.step()
        optimizer.zero_grad()

    return Variant(name, step, close, device=device)


def plain_ours(every: int) -> Callable[..., Any]:
    """Our watch on the plain model."""

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        _, close = ours(every)(model, optimizer)
        return (lambda _: None, close)

    return attach


def trainscope(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Trainscope as its first page shows it."""
    from trainscope import TrainScope, TrainScopeConfig  # type: ignore[import-not-found]

    scope = TrainScope(model, optimizer, TrainScopeConfig(run_dir=tempfile.mkdtemp())).attach()
    return (lambda loss: scope.step(loss.item()), scope.detach)


def exact_variants(width: int, freq: int) -> list[Variant]:
    """Debug mode with our feature."""
    from foreshock.monitor.transformer_engine import te_debug

    te_debug(freq=freq, layers="^ours")
    return [
        te_variant("bare", width, nothing),
        te_variant(f"ours, exact path every {freq}", width, ours(freq), "ours"),
    ]


def te_variants(width: int) -> list[Variant]:
    """Debug mode with the library's own features."""
    from foreshock.monitor.transformer_engine import TEStatsLogger, te_debug

    common: dict[str, object] = {
        "enabled": True,
        "tensors": ["activation", "gradient", "weight"],
        "freq": 1,
    }
    te_debug(
        freq=0,
        layers="^te",
        features={
            "LogFp8TensorStats": common | {"stats": ["underflows%", "scale_inv_min", "mse"]},
            "LogTensorStats": common | {"stats": ["cur_amax", "std", "l2_norm", "dynamic_range"]},
        },
        statistics_logger=TEStatsLogger(),
    )
    logged = te_variant(
        "TE, LogFp8TensorStats + LogTensorStats every step",
        width,
        lambda *_: (te_exact.step, lambda: None),
        "te",
    )
    return [te_variant("bare", width, nothing), logged]


def plain_variants(width: int, device: torch.device, tokens: int) -> list[Variant]:
    """The model of plain layers, with what is installed."""
    attached: dict[str, Callable[..., Any]] = {
        "bare, nn.Linear in BF16": lambda *_: (lambda *_: None,) * 2,
        "ours every step": plain_ours(1),
        "ours every 10": plain_ours(10),
    }
    if importlib.util.find_spec("trainscope") is not None:
        attached["trainscope"] = trainscope
    return [plain_variant(n, width, attach, device, tokens) for n, attach in attached.items()]


def variants(part: str, width: int, freq: int) -> list[Variant]:
    """The variants of a part, the bare one first."""
    if part == "exact":
        return exact_variants(width, freq)
    if part == "te":
        return te_variants(width)
    if part == "where":
        return parts_left_out(width)
    found = [
        te_variant("bare", width, nothing),
        te_variant("ours every step", width, ours(1)),
        te_variant("ours every 10", width, ours(10)),
        te_variant("ours every step, all in detail", width, ours(1, 1)),
    ]
    if width <= 1024:
        found.append(te_variant("torch.compile'd statistics every step", width, compiled))
    # How far two that are the same are apart.
    found.append(te_variant("bare, once more", width, nothing))
    return found


def device_name(device: torch.device) -> str:
    """For the head of the table."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"


def profile(variant: Variant, steps: int = 3) -> None:
    """Print what the device and the host did in a step, largest first."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            variant.step()
        torch.cuda.synchronize()
    events = found.key_averages()
    busy = sum(event.self_device_time_total for event in events) / steps / 1e3
    print(f"\n{variant.name}: {busy:.3f} ms of kernels a step")
    print(events.table(sort_by="self_cuda_time_total", row_limit=15, max_name_column_width=60))


def take_turns(found: list[Variant], rounds: int, steps: int) -> None:
    """Time all variants in each round, in an order of its own."""
    order = list(found)
    random.seed(0)
    # What Python's collector takes falls on whichever variant is running when it is due.
    gc.collect()
    gc.freeze()
    gc.disable()
    for _ in range(rounds):
        gc.collect()
        random.shuffle(order)
        for variant in order:
            variant.times.append(variant.run(steps))
    gc.enable()
    gc.unfreeze()


def print_table(found: list[Variant]) -> None:
    """As Markdown; the first variant is the one that the others are divided by."""
    bare = found[0].times
    print(
        "| variant | ms per step | its fastest round | ratio to bare | of the fastest rounds | "
        "ratio by round, smallest and largest |"
    )
    print("|---|---|---|---|---|---|")
    for variant in found:
        ratios = [a / b for a, b in zip(variant.times, bare, strict=True)]
        print(
            f"| {variant.name} | {statistics.median(variant.times):.3f} | "
            f"{min(variant.times):.3f} | "
            f"{statistics.median(variant.times) / statistics.median(bare):.4f} | "
            f"{min(variant.times) / min(bare):.4f} | "
            f"{min(ratios):.4f} to {max(ratios):.4f} |",
            flush=True,
        )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", choices=("every", "where", "exact", "te", "plain"), default="every"
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--freq", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of --part plain")
    parser.add_argument("--profile", action="store_true", help="print kernels instead of times")
    options = parser.parse_args()
    if options.part == "plain":
        found = plain_variants(options.width, options.device, options.tokens)
    else:
        found = variants(options.part, options.width, options.freq)
    for variant in found:
        variant.run(options.steps)
    if options.profile:
        for variant in found:
            profile(variant)
        return
    take_turns(found, options.rounds, options.steps)
    for variant in found:
        variant.close()
    print(
        f"\n{device_name(options.device)}, width {options.width}, {BATCH * options.tokens} tokens, "
        f"{options.rounds} rounds of {options.steps} steps\n"
    )
    print_table(found)


if __name__ == "__main__":
    main()
