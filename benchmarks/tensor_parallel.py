"""Bytes on the wire of tensor and sequence parallel, and what each wire does to the loss.

    python -m benchmarks.tensor_parallel [--steps 20] [--ranks 2,4] [--wires exact,fp8]

Processes over gloo on this machine. Bytes are counted from the tensors that collectives are given,
all processes together, and beside it from what the loopback interface sent (Linux; headers and
whatever else talks on it included).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from foreshock.trainer.config import DataConfig, ExecutionConfig, ModelConfig, RunConfig
from foreshock.trainer.data import corpus_of
from foreshock.trainer.optimizer import set_learning_rate
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.schedule import learning_rate
from foreshock.trainer.task import RunningText, parts_of, share_of_loss
from foreshock.trainer.trainee import make_trainee
from foreshock.trainer.world import joined

WIRES = ("exact", "bfloat16", "fp8")


def config_of(steps: int, ranks: int, wire: str) -> RunConfig:
    """FOG with SwiGLU, FP8 with current scales: the same run whatever the processes."""
    base = debug_cpu(seed=0)
    execution = ExecutionConfig(
        tensor_parallel=ranks,
        sequence_parallel=ranks > 1,
        wire=wire,  # type: ignore[arg-type]
    )
    return replace(
        base,
        steps=steps,
        model=ModelConfig(architecture="fog_swiglu", width=128, layers=4, heads=4),
        precision=replace(base.precision, scaling="current"),
        data=DataConfig(batch_size=8, sequence_length=64),
        execution=execution,
    )


def loopback_bytes() -> int:
    """Sent on the loopback interface since it is up; 0 where that is not known."""
    table = Path("/proc/net/dev")
    if not table.exists():
        return 0
    for line in table.read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def measured(steps: int, ranks: int, wire: str) -> dict[str, float]:
    """One process's part of a run; the same answer on all of them."""
    config = config_of(steps, ranks, wire)
    corpus = corpus_of(config.data)
    task = RunningText(config=config, corpus=corpus)
    with joined(config.execution) as world:
        trainee = make_trainee(config, world)
        transport = None if trainee.cut is None else trainee.cut.wire.transport
        losses = []
        counted, before = 0, loopback_bytes()
        for step in range(steps):
            set_learning_rate(trainee.optimizer, learning_rate(config, step))
            (part,) = parts_of(task.batch(step), world, 1)
            trainee.model.begin_step(step, None)
            loss = share_of_loss(trainee.entry, part)
            torch.autograd.backward(loss)
            trainee.gradients.reduce()
            trainee.gradients.clip(config.optimizer.clip)
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
        on_loopback = loopback_bytes() - before
        if transport is not None:
            total = torch.tensor(float(transport.bytes_sent))
            dist.all_reduce(total)
            counted = int(total)
    return {
        "loss": sum(losses[-5:]) / len(losses[-5:]),
        "bytes": counted / steps,
        "loopback": on_loopback / steps,
    }


def launched(steps: int, ranks: int, wire: str) -> dict[str, float]:
    """The same in as many processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = os.environ | {"OMP_NUM_THREADS": "1"}
    if ranks > 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.tensor_parallel",
        "--one",
        f"{steps},{ranks},{wire}",
    ]
    processes = [
        subprocess.Popen(
            command,
            env=shared | ({"RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [process.communicate(timeout=600)[0] for process in processes]
    found: dict[str, float] = json.loads(told[0].strip().splitlines()[-1])
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", default="2,4", help="numbers of processes")
    parser.add_argument("--wires", default=",".join(WIRES), help="of " + ", ".join(WIRES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        steps, ranks, wire = given.one.split(",")
        torch.set_num_threads(1)
        print(json.dumps(measured(int(steps), int(ranks), wire)), flush=True)
        # Gloo's threads may still run when Python ends.
        os._exit(0)
    print("| processes | wire | MB a step, collectives | MB a step, loopback | loss | difference |")
    print("|---|---|---|---|---|---|")
    lone = launched(given.steps, 1, "exact")["loss"]
    print(f"| 1 | - | 0 | 0 | {lone:.4f} | - |", flush=True)
    for ranks in (int(n) for n in given.ranks.split(",") if int(n) > 1):
        for wire in given.wires.split(","):
            found = launched(given.steps, ranks, wire)
            sizes = f"{found['bytes'] / 1e6:.3f} | {found['loopback'] / 1e6:.3f}"
            loss = found["loss"]
            print(f"| {ranks} | {wire} | {sizes} | {loss:.4f} | {loss - lone:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
