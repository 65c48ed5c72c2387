"""Tokens per second and memory of FOG in FP8 beside Llama 3 in BF16: whole training steps.

    python -m benchmarks.throughput [--width 4096] [--vocabulary 256] [--recipes a,b,...]
        [--seconds 200] [--device cpu --tokens 64 --compiler aot_eager]

Forward, backward and fused AdamW with float32 weights and states, activations in bfloat16,
torch.compile on for all; random tokens; sizes of FOG's published models, with fewer layers. Each
recipe is a process of its own, since Transformer Engine keeps the attention that it first chose.
All are built and compiled side by side, then measured one at a time while the others wait.

Printed per recipe: the median step of several, CUDA events around each; the most memory that torch
had allocated; and where the device's time of a step goes (torch.profiler), by kind of kernel. The
limit below the table is Amdahl's: what the Llama step would gain if GEMMs and attention of its
blocks took half their time and all else stayed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import milliseconds
from foreshock.trainer.compiled import compile_model
from foreshock.trainer.config import (
    Architecture,
    AttentionName,
    Backend,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScalingName,
)
from foreshock.trainer.model import Decoder
from foreshock.trainer.optimizer import make_optimizer

TOKENS: Final = 4096


@dataclass(frozen=True)
class Recipe:
    """An architecture and a precision."""

    architecture: Architecture
    backend: Backend
    scaling: ScalingName = "delayed"
    attention: AttentionName = "plain"


RECIPES: Final = {
    "llama_bf16": Recipe("llama3", "bf16"),
    "fog_bf16": Recipe("fog_max", "bf16"),
    "fog_fp8dpa_te": Recipe("fog_max", "transformer_engine", attention="fp8"),
    "fog_fp8_te": Recipe("fog_max", "transformer_engine"),
    "fog_fp8_te_current": Recipe("fog_max", "transformer_engine", "current"),
    "fog_fp8_native": Recipe("fog_max", "native"),
    "fog_fp8_native_current": Recipe("fog_max", "native", "current"),
    "llama_fp8_te": Recipe("llama3", "transformer_engine"),
    "llama_fp8_native": Recipe("llama3", "native"),
}
"""What can be measured, by name."""

FIRST: Final = "llama_bf16,fog_fp8dpa_te,fog_fp8_te,fog_fp8_native"


@dataclass(frozen=True)
class Sizes:
    """Of a model and its batch: heads, key heads, gated hidden width, layers, sequences."""

    heads: int
    key_heads: int
    ffn: int
    layers: int
    sequences: int


SIZES: Final = {
    64: Sizes(2, 1, 256, 2, 1),
    1024: Sizes(8, 4, 4096, 8, 8),
    2048: Sizes(16, 8, 8192, 6, 8),
    4096: Sizes(32, 8, 14336, 4, 8),
}

KINDS: Final = {
    "optimizer": ("adam",),
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn"),
    "GEMM": ("gemm", "nvjet", "xmma", "cutlass", "cublas", "splitk", "gemv"),
    "cast, scales": (
        "_cast_kernel",
        "_advance_kernel",
        "transformer_engine",
        "delayed_scaling",
        "transpose",
        "amax",
        "quantize",
    ),
}
"""Words in kernels' names; what has none is elementwise."""


def kind_of(kernel: str) -> str:
    """Which of `KINDS` a kernel is, by its name."""
    name = kernel.lower()
    found = [k for k, words in KINDS.items() if any(word in name for word in words)]
    return found[0] if found else "elementwise"


def made(recipe: Recipe, options: argparse.Namespace) -> Decoder:
    """The model, compiled, on its device."""
    sizes = SIZES[options.width]
    config = ModelConfig(
        architecture=recipe.architecture,
        width=options.width,
        layers=options.layers or sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.key_heads,
        ffn_width=sizes.ffn,
        vocabulary=options.vocabulary,
    )
    precision = PrecisionConfig(
        backend=recipe.backend,
        scaling=recipe.scaling,
        attention=recipe.attention,
        history=1024,
        activations="bfloat16",
    )
    torch.manual_seed(0)
    # Drawn on the device: a billion weights take a CPU a quarter of a minute.
    with torch.device(options.device):
        model = Decoder(config, precision)
    model.to(options.device)
    if not options.eager:
        compile_model(model, backend=options.compiler)
    return model


class Training:
    """One recipe's model in training on random tokens."""

    def __init__(self, recipe: Recipe, options: argparse.Namespace) -> None:
        self.model = made(recipe, options)
        self.optimizer = make_optimizer(self.model, OptimizerConfig(learning_rate=1e-4))
        self.micro_batches = options.micro_batches
        self.count = 0
        sequences = options.sequences or SIZES[options.width].sequences
        shape = (self.micro_batches, sequences, options.tokens + 1)
        self.data = torch.randint(options.vocabulary, shape, device=options.device)
        self.loss = torch.zeros(())

    @property
    def tokens(self) -> int:
        """Per step."""
        return self.data[..., 1:].numel()

    def step(self) -> None:
        """Forward, backward, optimizer; waits for nothing."""
        self.model.begin_step(self.count, None)
        self.count += 1
        for part in self.data:
            loss = self.model(part[:, :-1], part[:, 1:])
            (loss / self.micro_batches).backward()
        self.loss = loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measured(training: Training, options: argparse.Namespace) -> dict[str, Any]:
    """What the table needs of one recipe."""
    cuda = options.device == "cuda"
    device = torch.device(options.device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    training.step()
    times = [milliseconds(training.step, device) for _ in range(options.steps)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    found: dict[str, Any] = {
        "ms": statistics.median(times),
        "spread": [min(times), max(times)],
        "tokens": training.tokens,
        "gib": peak,
        "loss": float(training.loss),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "head_ms": head_time(training, device),
    }
    if cuda:
        found["kernels"], found["kinds"] = profiled(training)
    return found


def head_time(training: Training, device: torch.device) -> float:
    """Milliseconds a step of the language model head and its loss, forward and backward."""
    model = training.model
    rows = training.data[0, :, 1:].reshape(-1)
    x = torch.randn(len(rows), model.config.width, device=device, dtype=torch.bfloat16)
    assert model.head is not None
    head = model.head

    def work() -> None:
        with torch.no_grad():
            narrow = x.detach()
        narrow.requires_grad_()
        model.head_loss(narrow, head, rows).backward()

    work()
    once = statistics.median([milliseconds(work, device) for _ in range(3)])
    head.grad = None
    return once * float(training.micro_batches)


def profiled(
    training: Training, steps: int = 2
) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """Milliseconds of a step by kernel, longest first, and by kind."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            training.step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    kernels = []
    for event in found.key_averages():
        time_of = event.self_device_time_total / steps / 1e3
        if time_of > 0:
            kernels.append((event.key, time_of))
            kind = kind_of(event.key)
            kinds[kind] = kinds.get(kind, 0.0) + time_of
    return sorted(kernels, key=lambda k: -k[1])[:25], kinds


def wait_for(file: Path, until: float) -> None:
    """Until the file is there, or the time is over."""
    while not file.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"no {file.name} in time")
        time.sleep(0.05)


def one(options: argparse.Namespace) -> None:
    """Build, compile, say so, wait for the word, measure, write down."""
    folder = Path(options.folder)
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention first: on Hopper the fastest that torch has in bfloat16.
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        training = Training(RECIPES[options.one], options)
        for _ in range(2):
            training.step()
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"{options.one}: ready after {time.monotonic() - began:.0f} s", flush=True)
        (folder / f"{options.one}.ready").touch()
        wait_for(folder / f"{options.one}.go", time.monotonic() + options.seconds)
        found = measured(training, options)
    unfinished = folder / f"{options.one}.part"
    unfinished.write_text(json.dumps(found))
    unfinished.rename(folder / f"{options.one}.json")


class Worker:
    """A process that measures one recipe."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.log = (folder / f"{name}.log").open("wb")
        command = [sys.executable, "-u", "-m", "benchmarks.throughput", *sys.argv[1:]]
        command += ["--one", name, "--folder", str(folder)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def has(self, suffix: str) -> bool:
        """Whether it left this file."""
        return (self.folder / f"{self.name}.{suffix}").exists()

    def result(self, until: float) -> dict[str, Any] | None:
        """Let it measure; None if that came to nothing."""
        while not self.has("ready") and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.has("ready"):
            (self.folder / f"{self.name}.go").touch()
            try:
                self.process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                print(f"{self.name}: no time left")
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.has("json"):
            found: dict[str, Any] = json.loads((self.folder / f"{self.name}.json").read_text())
            return found
        text = (self.folder / f"{self.name}.log").read_text(errors="replace")
        print(f"{self.name}: nothing measured; its last words:\n{text[-1500:]}", flush=True)
        return None


def line(name: str, found: dict[str, Any], base: dict[str, Any] | None) -> str:
    """Of the table."""
    rate = found["tokens"] / found["ms"] * 1e3
    ratio = f"{base['ms'] / found['ms']:.3f}" if base else ""
    low, high = found["spread"]
    return (
        f"| {name} | {found['ms']:.1f} ({low:.1f} to {high:.1f}) | {rate:,.0f} | {ratio} "
        f"| {found['gib']:.1f} | {found['parameters'] / 1e6:,.0f} | {found['loss']:.3f} |"
    )


def shares(results: dict[str, dict[str, Any]]) -> None:
    """Where the time goes."""
    kinds = sorted({kind for found in results.values() for kind in found.get("kinds", ())})
    if not kinds:
        return
    print(f"\n| ms of kernels a step | {' | '.join(kinds)} | all | of it head and loss |")
    print("|---" * (len(kinds) + 3) + "|")
    for name, found in results.items():
        each = [found["kinds"].get(kind, 0.0) for kind in kinds]
        cells = " | ".join(f"{t:.1f}" for t in each)
        print(f"| {name} | {cells} | {sum(each):.1f} | {found['head_ms']:.1f} |")
    for name, found in results.items():
        print(f"\n{name}, longest kernels (ms a step):")
        for kernel, time_of in found["kernels"][:14]:
            print(f"  {time_of:8.2f}  {kernel[:110]}")
    print(flush=True)


def limit(base: dict[str, Any]) -> None:
    """Amdahl's, from the profile of the step in BF16."""
    kinds = base.get("kinds")
    if not kinds:
        return
    head = min(base["head_ms"], kinds.get("GEMM", 0.0))
    products = kinds.get("GEMM", 0.0) - head
    attention = kinds.get("attention", 0.0)
    total = base["ms"]
    for what, half in (("GEMMs", products), ("GEMMs and attention", products + attention)):
        print(
            f"limit with the blocks' {what} in half their time: x{total / (total - half / 2):.2f}"
        )


def asked() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=4096, choices=tuple(SIZES))
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--layers", type=int, default=0, help="0: as many as SIZES says")
    parser.add_argument("--sequences", type=int, default=0, help="a micro-batch; 0: as SIZES says")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="per sequence")
    parser.add_argument("--recipes", default=FIRST, help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=240.0, help="at most, in all")
    parser.add_argument("--hold", type=float, default=0.0, help="seconds before the first measure")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one", choices=tuple(RECIPES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def head(options: argparse.Namespace) -> None:
    """Of the table."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    sequences = options.sequences or SIZES[options.width].sequences
    layers = options.layers or SIZES[options.width].layers
    print(
        f"{device}, torch {torch.__version__}: width {options.width}, {layers} layers, "
        f"vocabulary {options.vocabulary}, {options.micro_batches} x {sequences} x "
        f"{options.tokens} tokens a step, {'eager' if options.eager else 'compiled'}\n"
    )
    print("| recipe | ms a step | tokens/s | ratio to the first | GiB | M weights | loss |")
    print("|---|---|---|---|---|---|---|", flush=True)


def main() -> None:
    """Print Markdown tables."""
    options = asked()
    if options.one:
        one(options)
        return
    until = time.monotonic() + options.seconds
    names = options.recipes.split(",")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(name, Path(folder)) for name in names]
        head(options)
        # All are compiled before the first is measured, so that nobody else keeps the host busy.
        ripe = until - options.seconds + options.hold
        while time.monotonic() < ripe or (
            any(not w.has("ready") and w.process.poll() is None for w in workers)
            and time.monotonic() < until - 0.25 * options.seconds
        ):
            time.sleep(0.1)
        for worker in workers:
            found = worker.result(until)
            if found is not None:
                results[worker.name] = found
                print(line(worker.name, found, results.get(names[0])), flush=True)
    shares(results)
    if names[0] in results:
        limit(results[names[0]])
    sys.exit(0 if len(results) == len(names) else 1)


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    main()
