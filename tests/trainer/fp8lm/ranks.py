"""Processes that reduce FP8 gradients or train at a level; run by test_ranks and on two GPUs.

    python -m tests.trainer.fp8lm.ranks CASE RANK RANKS PORT FOLDER

Writes what it saw to FOLDER/CASE-RANK.pt. Over gloo on the CPU; RANKS_OVER=nccl: one GPU a process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from foreshock.trainer.fp8lm import CommunicationConfig, Fp8AdamW, StatesConfig, fp8_optimizer
from foreshock.trainer.fp8lm.activations import gather_sequence
from foreshock.trainer.fp8lm.reduction import GradientReduction
from foreshock.trainer.fp8lm.scaled import Scaled, encode
from foreshock.trainer.fp8lm.transport import Transport
from foreshock.trainer.fp8lm.weights import ScaledWeight, scale_weights

NCCL = os.environ.get("RANKS_OVER") == "nccl"
DEVICE = torch.device("cuda" if NCCL else "cpu")
ROOT = Path(__file__).parents[3]
WIDTH = 16
STEPS = 3


class Net(nn.Module):
    """Matrices, a bias, a gain, and a layer that not every step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.spare = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, *, spare: bool = False) -> Tensor:
        y = self.norm(self.down(functional.gelu(self.up(x))))
        return functional.mse_loss(y + self.spare(x) if spare else y, x.roll(1, -1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().to(DEVICE)


def inputs(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(8, WIDTH, generator=generator).to(DEVICE)


def gradients(rank: int) -> list[Tensor]:
    """Of three tensors, unlike on every process: sizes and magnitudes differ."""
    generator = torch.Generator().manual_seed(rank)
    shapes = [(64, 32), (7, 5), (33,)]
    made = [torch.randn(s, generator=generator) * 10.0**-i for i, s in enumerate(shapes)]
    return [g.to(DEVICE) * (1 + rank) for g in made]


def _reduction(
    config: CommunicationConfig, local: list[Tensor | Scaled | None], shapes: list[torch.Size]
) -> dict[str, Any]:
    transport = Transport()
    reduction = GradientReduction(shapes, config, transport, DEVICE)
    found = reduction.reduce(local)
    return {
        "gradients": [g.values() if isinstance(g, Scaled) else g for g in found.gradients],
        "codes": [g.codes.view(torch.uint8) for g in found.gradients if isinstance(g, Scaled)],
        "scale_inv": [g.scale_inv for g in found.gradients if isinstance(g, Scaled)],
        "present": found.present,
        "finite": found.finite,
        "overflow": found.overflow,
        "saturation": found.saturation,
        "at_largest": found.at_largest,
        "mu": reduction.mu.value,
        "bytes": transport.bytes_sent,
    }


def reduce_all(rank: int, ranks: int) -> dict[str, Any]:
    """Every way, with a tensor that only the last process has a gradient for."""
    own = gradients(rank)
    shapes = [g.shape for g in own]
    local: list[Tensor | Scaled | None] = [encode(g, "e4m3") for g in own]
    if rank != ranks - 1:
        local[2] = None
    configs = {
        f"{reduction}-{scaling}": CommunicationConfig(reduction=reduction, scaling=scaling)  # type: ignore[arg-type]
        for reduction, scaling in (
            ("fp8_sum", "pre"),
            ("fp8_sum", "post"),
            ("fp8_sum", "auto"),
            ("fp32_sum", "auto"),
        )
    }
    return {name: _reduction(c, list(local), shapes) for name, c in configs.items()}


def broken(rank: int, ranks: int) -> dict[str, Any]:
    """NaN, then infinity, on the last process alone."""
    found = {}
    for name, bad in (("nan", float("nan")), ("inf", float("inf"))):
        x = torch.ones(4, 4, device=DEVICE)
        if rank == ranks - 1:
            x[1, 2] = bad
        for reduction in ("fp8_sum", "fp32_sum"):
            config = CommunicationConfig(reduction=reduction)
            key = f"{name}-{reduction}"
            local: list[Tensor | Scaled | None] = [encode(x, "e4m3")]
            local.append(encode(torch.ones(4, 4, device=DEVICE), "e4m3"))
            found[key] = _reduction(config, local, [x.shape, x.shape])
    return found


def saturating(rank: int, ranks: int) -> dict[str, Any]:
    """448 on one process and 18 on the other under one scale: what RCCL made NaN of."""
    x = torch.full((256,), 448.0 if rank == 0 else 18.0, device=DEVICE)
    codes, over = Transport().sum_codes(x.to(torch.float8_e4m3fn))
    golden = torch.tensor([0x4A, 0x58] if rank == 0 else [0x50, 0x5C], dtype=torch.uint8)
    small, _ = Transport().sum_codes(golden.to(DEVICE).view(torch.float8_e4m3fn))
    return {
        "codes": codes.view(torch.uint8),
        "over": over,
        "golden": small.view(torch.uint8),
    }


def _train(
    rank: int,
    states: StatesConfig,
    communication: CommunicationConfig,
    *,
    first: int = 0,
    steps: int = STEPS,
    resume: dict[str, Any] | None = None,
    bad_step: int = -1,
) -> tuple[Net, Fp8AdamW, list[Tensor]]:
    model = net()
    optimizer = fp8_optimizer(model, states, communication, lr=1e-2)
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_full_state_dict(resume["optimizer"])
    norms = []
    for step in range(first, first + steps):
        for half in inputs(step, rank).chunk(2):
            model(half).div(2).backward()
        if step == bad_step and rank == 1:
            gradient = optimizer.exchange.store.local()[0]
            assert isinstance(gradient, Scaled)
            gradient.codes.view(torch.uint8).view(-1)[3] = 0x7F
        norms.append(optimizer.clip_gradients(0.5))
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, norms


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.plain() if isinstance(p, ScaledWeight) else p).detach().clone()
        for name, p in model.named_parameters()
    }


LEVELS = {
    "O1": StatesConfig(level="O1"),
    "O2": StatesConfig(level="O2"),
    "O3": StatesConfig(level="O3"),
    "O3-blocks": StatesConfig(level="O3", block=32),
}


def levels(rank: int, ranks: int) -> dict[str, Any]:
    """Training at every level; O3 is saved whole and goes on."""
    found: dict[str, Any] = {}
    for name, states in LEVELS.items():
        for reduction in ("fp8_sum", "fp32_sum"):
            config = CommunicationConfig(reduction=reduction)
            model, optimizer, norms = _train(rank, states, config)
            found[f"{name}-{reduction}"] = {
                "weights": _plain(model),
                "norms": torch.stack(norms),
                "owned": len([s for s in optimizer.state.values() if "exp_avg" in s]),
                "bytes": optimizer.bytes,
                "sent": optimizer.transport.bytes_sent,
            }
            if name.startswith("O3"):
                whole = {"model": model.state_dict(), "optimizer": optimizer.full_state_dict()}
                found[f"{name}-{reduction}"]["saved"] = whole
                again, _, _ = _train(rank, states, config, first=STEPS, steps=2, resume=whole)
                straight, _, _ = _train(rank, states, config, steps=STEPS + 2)
                found[f"{name}-{reduction}"]["resumed"] = _plain(again)
                found[f"{name}-{reduction}"]["straight"] = _plain(straight)
    return found


def one_bad_rank(rank: int, ranks: int) -> dict[str, Any]:
    """A NaN in one code of one process in the last step: nobody takes it."""
    config = CommunicationConfig()
    before, _, _ = _train(rank, LEVELS["O2"], config, steps=STEPS - 1)
    after, optimizer, _ = _train(rank, LEVELS["O2"], config, bad_step=STEPS - 1)
    steps = {float(s["step"]) for s in optimizer.state.values()}
    return {"before": _plain(before), "after": _plain(after), "steps": steps}


def fsdp(rank: int, ranks: int) -> dict[str, Any]:
    """FSDP2 with FP8 weights on the wire, beside the same in one piece."""
    model = net()
    named = scale_weights(model, "e4m3")
    for module in (model.up, model.down, model.spare):
        fully_shard(module)
    fully_shard(model)
    optimizer = Fp8AdamW(model.parameters(), 1e-2, states=LEVELS["O3"])
    optimizer.set_masters({p: named[n] for n, p in model.named_parameters() if n in named})
    losses, norms = [], []
    for step in range(STEPS):
        loss = model(inputs(step, 0), spare=True)
        loss.backward()
        losses.append(loss.detach())
        norms.append(optimizer.clip_gradients(0.5))
        optimizer.step()
        optimizer.zero_grad()
    whole = net()
    single = fp8_optimizer(whole, LEVELS["O3"], lr=1e-2, weight_decay=1e-2, betas=(0.9, 0.999))
    expected = []
    for step in range(STEPS):
        loss = whole(inputs(step, 0), spare=True)
        loss.backward()
        expected.append(loss.detach())
        single.clip_gradients(0.5)
        single.step()
        single.zero_grad()
    return {
        "losses": torch.stack(losses),
        "expected": torch.stack(expected),
        "norms": torch.stack(norms),
        "bytes": optimizer.bytes,
        "whole": single.bytes,
    }


def sequence(rank: int, ranks: int) -> dict[str, Any]:
    """Activations of a sequence-parallel region, gathered in FP8."""
    whole = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    part = whole.chunk(ranks, 1)[rank].clone().requires_grad_()
    transport = Transport()
    gathered = gather_sequence(part, transport)
    weights = torch.arange(1.0, 17.0, device=DEVICE).view(2, 8, 1) * (rank + 1)
    (gathered * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert part.grad is not None
    return {
        "whole": whole,
        "gathered": gathered.detach(),
        "grad": part.grad,
        "bytes": transport.bytes_sent,
    }


CASES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "reduce_all": reduce_all,
    "broken": broken,
    "saturating": saturating,
    "levels": levels,
    "one_bad_rank": one_bad_rank,
    "fsdp": fsdp,
    "sequence": sequence,
}


def run(folder: Path, *cases: str, ranks: int = 2, **more: str) -> dict[str, list[Any]]:
    """What each process of each case saw, in rank order; all cases in the same processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | more
    command = [sys.executable, "-m", "tests.trainer.fp8lm.ranks", ",".join(cases)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(port), str(folder)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    return {
        case: [
            torch.load(folder / f"{case}-{r}.pt", weights_only=True, map_location="cpu")
            for r in range(ranks)
        ]
        for case in cases
    }


def main() -> None:
    cases, rank, ranks = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[4]}
    torch.set_num_threads(1)
    if NCCL:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if NCCL else "gloo", rank=rank, world_size=ranks)
    for case in cases:
        torch.save(CASES[case](rank, ranks), Path(sys.argv[5]) / f"{case}-{rank}.pt")
    dist.barrier()
    # All is written. Gloo's threads may still run when Python ends, which then aborts now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
