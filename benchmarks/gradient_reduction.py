"""The mean of FP8 gradients over many processes: what each way to add them loses.

    python -m benchmarks.gradient_reduction [--ranks 2 8 64] [--steps 300] [--size 32768]
    python -m benchmarks.gradient_reduction --real     # two processes: NCCL on GPUs, else gloo

Simulated processes, E4M3 codes, one shared power-of-two scale per tensor (FP8-LM, section 2.1):

- pre: gradients times 1/N before the cast; the running sum is E4M3 at every addition
- post: times 1; the same sum
- auto: times mu, which follows the share of saturated sums (equations 3 to 6)
- fp32 sum: FP8 on the wire, each process's own scale, added in float32 (a reduce-scatter's result)
- fp32 sum, gathered: and cast to E4M3 once more, as an all-reduce has to

SNR is of the mean against the float64 mean of the uncast gradients, in dB, mean over the later half
of the steps; underflow the share of nonzero elements of the processes' gradients that become 0;
overflow the share of sums that saturate. The gradients: independent normal ones, normal ones with
a common part (correlation 0.95), log-normal magnitudes (sigma 1, then times a normal) and those
of a small language model (one batch per process, all matrices, after some steps of training).
Bytes are what a process sends, per element, by the volume of ring and pairwise algorithms.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.side_by_side import row
from benchmarks.timing import milliseconds
from foreshock.trainer.data import batch, corpus_of
from foreshock.trainer.fp8lm.mu import GradientFactor
from foreshock.trainer.fp8lm.reduction import GradientReduction
from foreshock.trainer.fp8lm.scaled import (
    Scaled,
    amax_of,
    cast,
    encode,
    power_of_two_scale,
    saturated,
)
from foreshock.trainer.fp8lm.sums import add_codes, running_sum
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.states_config import CommunicationConfig
from foreshock.trainer.trainee import make_trainee
from foreshock.trainer.world import World

Gradients = list[list[Tensor]]
"""Of each tensor, one per process."""
SCALINGS: Final = ("pre", "post", "auto")
VECTORS: Final = (
    (448.0, 18.0),
    (448.0, 16.0),
    (448.0, 448.0),
    (-448.0, -18.0),
    (448.0, math.nan),
    (5.0, 8.0),
    (16.0, 24.0),
)


@dataclass(slots=True)
class Tally:
    """Sums over tensors and steps."""

    signal: float = 0.0
    noise: float = 0.0
    elements: int = 0
    overflowed: int = 0
    nonzero: int = 0
    vanished: int = 0

    def take(self, exact: Tensor, found: Tensor) -> None:
        """A tensor's mean."""
        self.signal += float(exact.square().sum())
        self.noise += float((found.double() - exact).square().sum())
        self.elements += exact.numel()

    def cells(self) -> list[str]:
        """SNR, underflow and overflow."""
        snr = 10 * math.log10(self.signal / self.noise) if self.noise else math.inf
        under = 100 * self.vanished / max(1, self.nonzero)
        over = 100 * self.overflowed / max(1, self.elements)
        return [f"{snr:.1f}", f"{under:.4f}", f"{over:.4f}"]


class Narrow:
    """Running FP8 sums with one of the three scalings."""

    def __init__(self, sizes: Sequence[int], ranks: int, config: CommunicationConfig) -> None:
        self.mu = GradientFactor(sizes, ranks, config)

    def step(self, gradients: Gradients, tally: Tally | None) -> None:
        """One reduction; a tally of None lets mu learn and measures nothing."""
        mu, at_largest = self.mu.in_force(), []
        for index, of_ranks in enumerate(gradients):
            amax = torch.stack([amax_of(g) for g in of_ranks]).max()
            factor = power_of_two_scale(amax, "e4m3", torch.ones_like(amax)) * mu[index]
            codes = [cast(g * factor, "e4m3") for g in of_ranks]
            total, over = running_sum(codes)
            at_largest.append(saturated(total).sum())
            if tally is not None:
                tally.take(exact_mean(of_ranks), total.float() / (factor * len(of_ranks)))
                tally.overflowed += int(over.sum())
                _count_vanished(tally, of_ranks, codes)
        self.mu.update(torch.stack(at_largest))


def wide(gradients: Gradients, tally: Tally, *, gathered: bool) -> None:
    """FP8 on the wire and sums in float32."""
    for of_ranks in gradients:
        coded = [encode(g, "e4m3") for g in of_ranks]
        total = add_codes([c.codes for c in coded], [c.scale_inv for c in coded]) / len(of_ranks)
        found = encode(total, "e4m3").values() if gathered else total
        tally.take(exact_mean(of_ranks), found)
        _count_vanished(tally, of_ranks, [c.codes for c in coded])


def exact_mean(of_ranks: Sequence[Tensor]) -> Tensor:
    """float64."""
    return torch.stack([g.double() for g in of_ranks]).mean(0)


def _count_vanished(tally: Tally, of_ranks: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    for gradient, code in zip(of_ranks, codes, strict=True):
        nonzero = gradient != 0
        tally.nonzero += int(nonzero.sum())
        tally.vanished += int((nonzero & (code.float() == 0)).sum())


def drawn(kind: str, ranks: int, size: int, seed: int) -> Gradients:
    """Gradients of one tensor at one step."""
    random = torch.Generator().manual_seed(seed)
    own = [torch.randn(size, generator=random) for _ in range(ranks)]
    if kind == "correlated":
        common = torch.randn(size, generator=random)
        own = [math.sqrt(0.95) * common + math.sqrt(0.05) * g for g in own]
    if kind == "log-normal":
        spread = torch.randn(size, generator=random).exp()
        own = [spread * g for g in own]
    return [own]


def of_a_model(ranks: int, trained: int, steps: int) -> Iterator[Gradients]:
    """Gradients of a small Llama 3, one batch a process; the model trains on as it goes.

    Between reductions it takes one process's gradient, so that reductions see a moving model.
    """
    config = debug_cpu(seed=1)
    corpus = corpus_of(config.data)
    trainee = make_trainee(config, World())
    matrices = [p for p in trainee.model.parameters() if p.dim() >= 2]
    for step in range(trained + steps):
        of_ranks: Gradients = [[] for _ in matrices]
        wanted = ranks if step >= trained else 1
        for rank in range(wanted):
            tokens = batch(corpus, config.data, 1000 + rank, step)
            trainee.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(trainee.entry(tokens[:, :-1], tokens[:, 1:]))
            for held, p in zip(of_ranks, matrices, strict=True):
                held.append(p.grad.clone() if p.grad is not None else torch.zeros_like(p))
        trainee.gradients.clip(1.0)
        trainee.optimizer.step()
        if step >= trained:
            yield of_ranks


def simulate(options: argparse.Namespace) -> None:
    """The table of simulated processes."""
    row("gradients", "N", "way", "SNR dB", "underflow %", "overflow %", "mu", "bytes")
    row(*["---"] * 8)
    for kind in options.kinds:
        for ranks in options.ranks:
            steps = options.steps if kind != "model" else options.model_steps
            _simulated(kind, ranks, steps, options)


def _simulated(kind: str, ranks: int, steps: int, options: argparse.Namespace) -> None:
    source = (
        of_a_model(ranks, 60, steps)
        if kind == "model"
        else (drawn(kind, ranks, options.size, step) for step in range(steps))
    )
    ways: dict[str, Narrow] = {}
    tallies: dict[str, Tally] = {}
    for step, gradients in enumerate(source):
        if not ways:
            sizes = [of_ranks[0].numel() for of_ranks in gradients]
            for name in SCALINGS:
                config = CommunicationConfig(scaling=name, mu_doubling_steps=options.doubling)
                ways[name] = Narrow(sizes, ranks, config)
        late = step >= steps // 2 and (step - steps // 2) % options.every == 0
        for name, way in ways.items():
            if late or name == "auto":
                way.step(gradients, tallies.setdefault(name, Tally()) if late else None)
        if late:
            wide(gradients, tallies.setdefault("fp32 sum", Tally()), gathered=False)
            wide(gradients, tallies.setdefault("fp32 sum, gathered", Tally()), gathered=True)
    share = (ranks - 1) / ranks
    for name, tally in tallies.items():
        mu = f"{float(ways[name].mu.value.mean()):.3g}" if name in ways else "-"
        volume = share if name == "fp32 sum" else 2 * share
        row(kind, ranks, name, *tally.cells(), mu, f"{volume:.2f}")
    print(f"(a float32 all-reduce sends {8 * share:.2f} bytes an element, bf16 {4 * share:.2f})")


def real(options: argparse.Namespace) -> None:
    """Two processes, over NCCL where there are two GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[no-untyped-call,attr-defined]
            _process, (port, options.real_size, Path(folder)), nprocs=2, start_method="spawn"
        )


def _process(rank: int, port: int, size: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    gpus = torch.cuda.device_count() >= 2
    if gpus:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if gpus else "gloo", rank=rank, world_size=2)
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    tell = print_now if rank == 0 else _silent
    if gpus:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        tell(f"NCCL {nccl}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for part in (_sums_of_vectors, _reductions, _times):
        try:
            part(rank, size, device, tell)
        except Exception as error:  # noqa: BLE001 - one part's failure leaves the others
            tell(f"{part.__name__} failed: {error!r}")
    dist.destroy_process_group()


Tell = Callable[[str], None]


def print_now(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _silent(line: str) -> None:
    pass


def _sums_of_vectors(rank: int, size: int, device: torch.device, tell: Tell) -> None:
    """What the backend's own FP8 sum gives, and ours, in bits and numbers."""
    summands = [torch.tensor([pair[r] for pair in VECTORS]).to(device) for r in (0, 1)]
    codes = [cast(each, "e4m3") for each in summands]
    emulated, over = running_sum(codes)
    ours, flagged = Transport().sum_codes(codes[rank].clone())
    tell(f"emulated running sum: {_shown(emulated)}, saturated {over.int().tolist()}")
    tell(f"Transport.sum_codes:  {_shown(ours)}, flagged   {flagged.int().tolist()}")
    own = codes[rank].clone()
    try:
        dist.all_reduce(own)
        tell(f"all_reduce float8:    {_shown(own)}")
    except RuntimeError as error:
        tell(f"all_reduce float8: {str(error).splitlines()[0]}")
    tell(f"of: {VECTORS}")


def _shown(codes: Tensor) -> str:
    bits = codes.view(torch.uint8).tolist()
    return " ".join(f"{v:g}(0x{b:02X})" for v, b in zip(codes.float().tolist(), bits, strict=True))


def _reductions(rank: int, size: int, device: torch.device, tell: Tell) -> None:
    """The trainer's reduction with real processes: SNR, counts, equality, bytes."""
    for kind in ("normal", "correlated", "log-normal"):
        both = drawn(kind, 2, size, 0)[0]
        exact = exact_mean(both)
        for name, config in {
            **{s: CommunicationConfig(scaling=s) for s in SCALINGS},
            "fp32 sum, gathered": CommunicationConfig(reduction="fp32_sum"),
        }.items():
            transport = Transport()
            reduction = GradientReduction([torch.Size([size])], config, transport, device)
            found = reduction.reduce([both[rank].to(device)])
            gradient = found.gradients[0]
            assert isinstance(gradient, Scaled)
            # The very bits of both processes.
            bits = gradient.codes.view(torch.uint8).to(torch.int32)
            low, high = bits.clone(), bits.clone()
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
            tally = Tally()
            tally.take(exact, gradient.values().cpu())
            tell(
                f"{kind}, {name}: SNR {tally.cells()[0]} dB, overflow "
                f"{100 * float(found.saturation.sum()) / size:.4f} %, bytes an element "
                f"{transport.bytes_sent / size:.3f}, alike on both: {bool((low == high).all())}"
            )


def _times(rank: int, size: int, device: torch.device, tell: Tell) -> None:
    """Median of 9 after 3, each kind of sum of as many elements."""
    x = torch.randn(size, device=device)
    wide_config = CommunicationConfig(reduction="fp32_sum")
    reductions = {
        name: GradientReduction([torch.Size([size])], config, Transport(), device)
        for name, config in {"auto": CommunicationConfig(), "fp32 sum": wide_config}.items()
    }
    codes = cast(x, "e4m3")
    works: dict[str, Callable[[], object]] = {
        "float32 all_reduce": lambda: dist.all_reduce(x.clone()),
        "bf16 all_reduce": lambda: dist.all_reduce(x.bfloat16()),
        "e4m3 Transport.sum_codes, codes given": lambda: Transport().sum_codes(codes.clone()),
        "GradientReduction auto, casts and all": lambda: reductions["auto"].reduce([x]),
        "GradientReduction fp32 sum, casts and all": lambda: reductions["fp32 sum"].reduce([x]),
    }
    for name, work in works.items():
        took = []
        for _ in range(12):
            dist.barrier()
            began = time.perf_counter()
            took.append(milliseconds(work, device))
            if time.perf_counter() - began > 3:
                break
        tell(f"{size:,} elements, {name}: {statistics.median(took[3:] or took):.2f} ms")


def main() -> None:
    """Simulate, or take real processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", "--nccl", action="store_true")
    parser.add_argument("--real-size", type=int, default=1 << 22)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 8, 64])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model-steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=1 << 15)
    parser.add_argument("--every", type=int, default=10, help="measured of the later half")
    parser.add_argument("--doubling", type=int, default=100, help="mu_doubling_steps")
    kinds = ["normal", "correlated", "log-normal", "model"]
    parser.add_argument("--kinds", nargs="*", choices=kinds, default=kinds)
    options = parser.parse_args()
    if options.real:
        real(options)
        return
    torch.set_num_threads(1)
    simulate(options)


if __name__ == "__main__":
    main()
