"""Two processes that train under one kind of parallelism each, watched; run by test_ranks.

    python -m tests.monitor.parallel CASE RANK PORT FOLDER

Writes what it saw to FOLDER/RANK.json. Over gloo on the CPU, or with RANKS_OVER=nccl over NCCL, one
device a process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional

from foreshock.monitor import Watch, watch
from foreshock.monitor.operands import Operand
from foreshock.monitor.record import records_to_json, table_to_records

NCCL = os.environ.get("RANKS_OVER") == "nccl"
DEVICE = "cuda" if NCCL else "cpu"
SIZE = 2
STEPS = 4
WIDTH = 8


class Net(nn.Module):
    """Two linear layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(self.down(functional.gelu(self.up(x))), x)


class Scaled(nn.Linear):
    """A layer that says it casts to E4M3 under a scale all processes should share."""

    rank = 0

    def operand(self, role: str) -> Operand:
        scale = torch.tensor(4.0 + (self.rank == 1), device=DEVICE)
        return Operand("e4m3", scale, agreed=True)


class Experts(nn.Module):
    """Each process runs the expert of its number only."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(SIZE))
        self.rank = rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts[self.rank](x)
        return y.square().mean()


def inputs(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(3, 5, WIDTH, generator=generator)
    if rank == 1:
        x[0, 0, 3] = 50.0
    return x


class Out:
    """A sink that keeps records, and the numbers that a test compares them with."""

    def __init__(self) -> None:
        self.records: list[pa.RecordBatch] = []
        self.losses: list[float] = []
        self.norms: list[float] = []

    def __call__(self, record: pa.RecordBatch) -> None:
        self.records.append(record)

    def write(self, path: Path, **more: Any) -> None:
        table = pa.Table.from_batches(self.records) if self.records else None
        records = [] if table is None else json.loads(records_to_json(table_to_records(table)))
        data = {"records": records, "losses": self.losses, "norms": self.norms}
        path.write_text(json.dumps(data | more))


def train(
    model: nn.Module, rank: int, out: Out, *, watched: bool = True, data_rank: int | None = None
) -> Watch | None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = None
    if watched:
        seen = watch(
            model,
            optimizer,
            run="r",
            spool=Path(sys.argv[4]) / "spool",
            tensor_every=2,
            sinks=[out],
        )
    for step in range(STEPS):
        loss = model(inputs(step, rank if data_rank is None else data_rank).to(DEVICE))
        loss.backward()
        norm: Any = nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        out.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
        out.losses.append(float(loss.detach()))
    return seen


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(DEVICE)


def ddp(rank: int, out: Out) -> dict[str, Any]:
    seen = train(nn.parallel.DistributedDataParallel(net()), rank, out)
    bare = Out()
    train(nn.parallel.DistributedDataParallel(net()), rank, bare, watched=False)
    assert seen is not None
    return {"closed": seen.close(20), "bare": bare.losses, "errors": seen.errors}


def sharded() -> nn.Module:
    model = net()
    fully_shard(model.up)
    fully_shard(model)
    return model


def fsdp(rank: int, out: Out) -> dict[str, Any]:
    seen = train(sharded(), rank, out)
    bare = Out()
    train(sharded(), rank, bare, watched=False)
    assert seen is not None
    return {"closed": seen.close(20), "bare": bare.losses, "errors": seen.errors}


def split() -> nn.Module:
    model = net()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh(DEVICE, (SIZE,)), plan)
    return model


def tp(rank: int, out: Out) -> dict[str, Any]:
    # Tensor-parallel processes see the same data.
    seen = train(split(), rank, out, data_rank=1)
    bare = Out()
    train(split(), rank, bare, watched=False, data_rank=1)
    assert seen is not None
    return {"closed": seen.close(20), "bare": bare.losses, "errors": seen.errors}


def experts(rank: int, out: Out) -> dict[str, Any]:
    torch.manual_seed(0)
    seen = train(Experts(rank).to(DEVICE), rank, out)
    assert seen is not None
    return {"closed": seen.close(20), "layers": seen.layers}


def stages(rank: int, out: Out) -> dict[str, Any]:
    """A pipeline: each process has layers that the other has not."""
    torch.manual_seed(rank)
    linear = nn.Linear(WIDTH, WIDTH, bias=False)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(f"stage{rank}", linear)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = linear(x)
            return y.square().mean()

    seen = train(Stage().to(DEVICE), rank, out)
    assert seen is not None
    return {"closed": seen.close(20), "layers": seen.layers}


def disagree(rank: int, out: Out) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = Scaled(WIDTH, WIDTH, bias=False)
    layer.rank = rank

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            return y.square().mean()

    seen = train(nn.parallel.DistributedDataParallel(Model().to(DEVICE)), rank, out)
    assert seen is not None
    return {"closed": seen.close(20)}


def dead(rank: int, out: Out) -> dict[str, Any]:
    """Process 1 vanishes in mid-run; process 0 trains on by itself."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    os.environ.pop("PYTEST_VERSION", None)
    seen = watch(
        model, optimizer, run="r", spool=Path(sys.argv[4]) / "spool", sinks=[out], tensor_every=1
    )
    for step in range(2 * STEPS):
        if rank == 1 and step == STEPS:
            os._exit(0)
        loss = model(inputs(step, rank).to(DEVICE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.losses.append(float(loss.detach()))
        seen.flush(10)
    return {"closed": seen.close(20), "errors": seen.errors}


def reporting(rank: int, out: Out) -> dict[str, Any]:
    """Process 1 meets an infinite input between two measured steps; both report to a relay."""
    model = nn.parallel.DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = watch(
        model, optimizer, run="r", spool=Path(sys.argv[4]) / "spool", tensor_every=2, sinks=[out]
    )
    for step in range(STEPS):
        x = inputs(step, rank).to(DEVICE)
        if rank == 1 and step == 1:
            seen.event("checkpoint", "of rank 1")
        if rank == 1 and step == STEPS - 1:
            x[0, 0, 0] = torch.inf
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.losses.append(float(loss.detach()))
    began = time.perf_counter()
    closed = seen.close(20)
    return {
        "closed": closed,
        "errors": seen.errors,
        "launch": seen.settings.launch_id,
        "closing": time.perf_counter() - began,
    }


CASES: dict[str, Callable[[int, Out], dict[str, Any]]] = {
    f.__name__: f for f in (ddp, fsdp, tp, experts, stages, disagree, dead, reporting)
}


def main() -> None:
    case, rank, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if NCCL:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if NCCL else "gloo", rank=rank, world_size=SIZE)
    out = Out()
    more = CASES[case](rank, out)
    out.write(folder / f"{rank}.json", **more)
    dist.barrier() if case != "dead" else None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
