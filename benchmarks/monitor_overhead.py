"""What the monitor costs: step time with it divided by step time without it.

    python -m benchmarks.monitor_overhead [--rounds 20] [--threads N] [--device cuda] [--markdown]

Steps of every variant are taken in turn in one process, so that what else the machine does hits
all of them alike; medians over rounds. A round is as many steps as lie between two measurements of
tensors, so every variant pays its tensors in full. Leaves nothing behind but its output.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from foreshock.monitor import Watch, watch
from foreshock.trainer.config import RunConfig
from foreshock.trainer.data import batch, load_corpus
from foreshock.trainer.model import Decoder
from foreshock.trainer.optimizer import clip_gradients, make_optimizer
from foreshock.trainer.recipes import demo_healthy, llama_cpu

CADENCES = (1, 4, 10)


class Block(nn.Module):
    """Causal attention and a feed-forward of plain nn.Linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, tokens, width), kept."""
        size, tokens, width = x.shape
        shape = (size, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        residual: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return residual


class Transformer(nn.Module):
    """A plain decoder that returns its loss."""

    def __init__(self, width: int = 256, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy."""
        logits = self.head(self.blocks(self.embedding(tokens)))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass
class Variant:
    """One model with its own monitor, or none."""

    step: Callable[[], None]
    watch: Watch | None
    device: torch.device

    def seconds(self, steps: int) -> float:
        """Time of so many steps."""
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


Make = Callable[[int | None, Path, torch.device], Variant]


def plain_variant(every: int | None, spool: Path, device: torch.device) -> Variant:
    """The transformer of nn.Linear, 1,024 tokens a step."""
    torch.manual_seed(0)
    model = Transformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(256, (8, 129)).to(device)

    def step() -> None:
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Variant(step, watched(model, optimizer, every, spool), device)


def trainer_variant(config: RunConfig) -> Make:
    """A run of our own trainer, without its loop's bookkeeping."""

    def make(every: int | None, spool: Path, device: torch.device) -> Variant:
        torch.manual_seed(config.seed)
        model = Decoder(config.model, config.precision).to(device)
        optimizer = make_optimizer(model, config.optimizer)
        corpus = load_corpus(config.data.folder)
        steps = iter(range(10**9))

        def step() -> None:
            number = next(steps)
            tokens = batch(corpus, config.data, config.seed, number, None).to(device)
            model.begin_step(number, None)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            clip_gradients(model, config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Variant(step, watched(model, optimizer, every, spool), device)

    return make


def watched(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int | None, spool: Path
) -> Watch | None:
    """A watch with a spool and no service; None for no cadence."""
    if every is None:
        return None
    return watch(model, optimizer, run=f"every-{every}", spool=spool, tensor_every=every)


def ratios(make: Make, rounds: int, device: torch.device) -> Iterator[tuple[str, float]]:
    """Step time without a monitor in milliseconds, then the ratio per cadence."""
    longest = max(CADENCES)
    with tempfile.TemporaryDirectory() as folder:
        variants = {every: make(every, Path(folder), device) for every in (None, *CADENCES)}
        for variant in variants.values():
            variant.seconds(longest)
        times: dict[int | None, list[float]] = {every: [] for every in variants}
        for _ in range(rounds):
            for every, variant in variants.items():
                # A multiple of every cadence, so that each round holds its share of tensors.
                steps = longest * 2
                times[every].append(variant.seconds(steps) / steps)
        for variant in variants.values():
            if variant.watch is not None:
                variant.watch.close()
    bare = statistics.median(times[None])
    yield "ms per step without", bare * 1e3
    for every in CADENCES:
        # Ratios of neighbours in time: a machine that slows down slows both.
        pairs = zip(times[every], times[None], strict=True)
        yield f"every {every}", statistics.median(on / off for on, off in pairs)


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {
        "4 blocks of nn.Linear, width 256, 1,024 tokens": plain_variant,
        "the demo's model, emulated FP8": trainer_variant(demo_healthy(seed=7)),
        "llama_cpu, emulated FP8": trainer_variant(llama_cpu()),
    }
    for number, (name, make) in enumerate(models.items()):
        cells = dict(ratios(make, options.rounds, options.device))
        if options.markdown:
            if number == 0:
                print("| model | " + " | ".join(cells) + " |\n|---" * 1 + "|---" * len(cells) + "|")
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in cells.values()) + " |")
        else:
            print(name, *(f"{key}: {value:.3f}" for key, value in cells.items()), sep="  ")


if __name__ == "__main__":
    main()
