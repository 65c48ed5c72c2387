"""`foreshock sweep`: train the corpus that a forecaster is fitted on, stack by stack.

Writes one Parquet shard per stack (signals of every step) and `runs.jsonl`, one line per run.
Finished shards are kept and skipped, so a sweep goes on where it was cut off. It fits nothing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from foreshock.api.cli import extras
from foreshock.trainer.corpus_plan import PlannedRun, corpus_plan
from foreshock.trainer.recipes import corpus

if TYPE_CHECKING:
    from foreshock.trainer.config import RunConfig
    from foreshock.trainer.faults import Fault

__all__ = ["Job", "register", "sweep_stack", "sweep_windows", "train_all", "write_index"]

_RUNS_KEY: Final = b"foreshock.runs"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep")(sweep)


def sweep(
    out: Annotated[Path, typer.Option(help="Folder for shards/*.parquet and runs.jsonl.")],
    seed: Annotated[int, typer.Option(min=0, help="All randomness comes from it.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Runs to train.")] = 256,
    minutes: Annotated[float, typer.Option(min=0.0, help="Start no stack that ends later.")] = 20.0,
    shard: Annotated[str, typer.Option(help="I/N: only every N-th stack, from the I-th.")] = "0/1",
    processes: Annotated[int, typer.Option(min=0, help="0: one per core.")] = 0,
    stack: Annotated[int, typer.Option(min=1, max=256, help="Runs trained as one.")] = 16,
    plan: Annotated[str, typer.Option(help="v1 or v2: docs/corpus.md.")] = "v1",
    device: Annotated[
        str, typer.Option(help="cpu, cuda or several such as cuda:0,cuda:1.")
    ] = "cpu",
    scale: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of v2: shrink widths and lengths.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Only a JSON line at the end.")] = False,
) -> None:
    """Train healthy runs, natural failures and faults, many as one, for `foreshock fit`."""
    # Neither the service nor scikit-learn: signals need numpy alone.
    extras.require("trainer")
    index, every = _parse_shard(shard)
    devices = tuple(device.split(","))
    if plan == "v2":
        planned = corpus_plan(seed, -(-runs // stack), models_per_stack=stack, scale=scale)
        jobs = [Job.planned(stack_of, out) for stack_of in planned]
    elif plan == "v1":
        stacks = corpus(seed, runs, models_per_stack=stack)
        jobs = [Job.of(configs, out) for configs in stacks]
    else:
        raise typer.BadParameter(f"plan is {plan!r}; allowed: v1, v2")
    jobs = jobs[index::every]
    waiting = [job for job in jobs if not job.path.exists()]
    deadline = time.monotonic() + 60 * minutes
    (out / "shards").mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("stacks"),
        TimeElapsedColumn(),
        disable=as_json,
    ) as progress:
        task = progress.add_task("sweep", total=len(jobs), completed=len(jobs) - len(waiting))
        count = processes or _processes(devices)
        for _ in train_all(waiting, deadline, processes=count, devices=devices):
            progress.advance(task)
    trained = write_index(out)
    left = sum(not job.path.exists() for job in jobs)
    if as_json:
        typer.echo(json.dumps({"runs": trained, "stacks": len(jobs) - left, "stacks_left": left}))
        return
    rest = f"; {left} stacks are left, the same command goes on with them" if left else ""
    typer.echo(f"{trained} runs in {out}{rest}")


def _parse_shard(text: str) -> tuple[int, int]:
    try:
        index, every = (int(part) for part in text.split("/"))
    except ValueError:
        index, every = -1, 0
    if not 0 <= index < every:
        raise typer.BadParameter(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return index, every


def _processes(devices: Sequence[str]) -> int:
    return (os.cpu_count() or 1) if devices == ("cpu",) else 2 * len(devices)


@dataclass(frozen=True, slots=True)
class Job:
    """One stack and the shard that it becomes; the name holds a digest of all its runs.

    Attributes:
        configs: The runs.
        path: Of the shard.
        lines: The runs' lines of `runs.jsonl`.
        windowed: Train by windows of steps, which any device does, and the plan's runs need.
        graph: On CUDA, by a captured graph.
    """

    configs: tuple[RunConfig, ...]
    path: Path
    lines: tuple[dict[str, object], ...]
    windowed: bool = False
    graph: bool = True

    @classmethod
    def of(cls, configs: Sequence[RunConfig], out: Path) -> Job:
        """A stack of the first plan."""
        lines = tuple(_describe(config) for config in configs)
        return cls(tuple(configs), _path(configs, out), lines)

    @classmethod
    def planned(cls, runs: Sequence[PlannedRun], out: Path) -> Job:
        """A stack of the second plan."""
        configs = tuple(run.config for run in runs)
        lines = tuple(_describe_planned(run) for run in runs)
        return cls(configs, _path(configs, out), lines, True)


def _path(configs: Sequence[RunConfig], out: Path) -> Path:
    prints = "".join(config.fingerprint() for config in configs)
    digest = hashlib.sha256(prints.encode()).hexdigest()[:10]
    return out / "shards" / f"{_group(configs[0])}-{digest}.parquet"


def _group(config: RunConfig) -> str:
    return config.name.rpartition("-")[0]


def train_all(
    jobs: Sequence[Job], deadline: float, *, processes: int, devices: Sequence[str] = ("cpu",)
) -> Iterator[Job]:
    """Train the stacks; start none that, going by the slowest so far, would end too late.

    Args:
        jobs: The stacks, in the order in which they are started.
        deadline: `time.monotonic()` after which nothing goes on.
        processes: How many train at once.
        devices: Where; processes take turns with them.

    Yields:
        Stacks whose shard is whole.
    """
    context = multiprocessing.get_context("spawn")
    slowest = 0.0
    left = list(reversed(jobs))
    running: dict[Future[float], Job] = {}
    load = dict.fromkeys(devices, 0)
    placed: dict[Future[float], str] = {}
    with ProcessPoolExecutor(max_workers=processes, mp_context=context) as pool:
        while left or running:
            while left and len(running) < processes and time.monotonic() + slowest < deadline:
                job = left.pop()
                device = min(load, key=lambda name: load[name])
                future = pool.submit(_train, job, deadline, device)
                running[future], placed[future] = job, device
                load[device] += 1
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                slowest = max(slowest, future.result())
                job = running.pop(future)
                load[placed.pop(future)] -= 1
                if job.path.exists():
                    yield job


def _train(job: Job, deadline: float, device: str) -> float:
    if job.windowed or device != "cpu":
        return sweep_windows(job, deadline, device)
    return sweep_stack(job.configs, job.path, deadline)


def sweep_windows(
    job: Job, deadline: float, device: str, on_steps: Callable[[int], None] | None = None
) -> float:
    """As `sweep_stack`, window by window, on any device.

    Args:
        job: The stack.
        deadline: `time.monotonic()` after which the stack is given up.
        device: Where to train.
        on_steps: Told how many model-steps every window came to.

    Returns:
        Seconds that it took; also where the stack failed, which is printed and leaves no shard.
    """
    import torch

    from foreshock.api.cli.device_signals import fold_on_device, signals_of
    from foreshock.api.signals import SIGNALS, TENSOR_SIGNALS
    from foreshock.trainer.stacked_device import train_windows

    torch.set_num_threads(1)
    began = time.monotonic()
    signals, losses = [], []
    try:
        for window in train_windows(
            job.configs,
            fold=fold_on_device,
            folded=len(TENSOR_SIGNALS),
            device=device,
            graph=job.graph,
        ):
            some, loss = signals_of(window)
            signals.append(some)
            losses.append(loss)
            if on_steps is not None:
                on_steps(loss.size)
            if time.monotonic() > deadline:
                return time.monotonic() - began
    except (RuntimeError, ValueError) as error:
        # One stack that does not fit the device is no reason to lose the others.
        typer.echo(f"{job.path.name}: {type(error).__name__}: {error}", err=True)
        return time.monotonic() - began
    table = _table(job.configs, np.concatenate(signals), np.concatenate(losses), SIGNALS, job.lines)
    _write(table, job.path)
    return time.monotonic() - began


def sweep_stack(configs: Sequence[RunConfig], path: Path, deadline: float) -> float:
    """Train one stack in this process and write its shard, whole or not at all.

    Args:
        configs: The runs; one model shape, batch shape and length.
        path: Of the shard.
        deadline: `time.monotonic()` after which the stack is given up.

    Returns:
        Seconds that it took.
    """
    import torch

    from foreshock.api.signals import SIGNALS, summarise
    from foreshock.trainer.stacked import train_stack

    torch.set_num_threads(1)
    began = time.monotonic()
    signals = np.full((configs[0].steps, len(configs), len(SIGNALS)), np.nan, dtype=np.float32)
    losses = np.full((configs[0].steps, len(configs)), np.nan, dtype=np.float32)
    for step in train_stack(configs):
        signals[step.step] = summarise(step.identities, step.statistics, step.scalars)
        losses[step.step] = step.scalars["loss"]
        if time.monotonic() > deadline:
            return time.monotonic() - began
    lines = [_describe(config) for config in configs]
    _write(_table(configs, signals, losses, SIGNALS, lines), path)
    return time.monotonic() - began


def _write(table: pa.Table, path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    pq.write_table(table, unfinished, compression="zstd")
    os.replace(unfinished, path)


def _table(
    configs: Sequence[RunConfig],
    signals: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    losses: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    names: Sequence[str],
    lines: Sequence[dict[str, object]],
) -> pa.Table:
    """Rows run by run: run, step, raw_loss (NaN and infinities as they came), every signal."""
    steps = signals.shape[0]
    columns = {
        "run": pa.array([c.name for c in configs for _ in range(steps)]).dictionary_encode(),
        "step": pa.array(np.tile(np.arange(steps, dtype=np.int32), len(configs))),
        "raw_loss": pa.array(losses.T.reshape(-1)),
    }
    for index, name in enumerate(names):
        columns[name] = pa.array(signals[:, :, index].T.reshape(-1))
    runs = json.dumps(list(lines))
    return pa.table(columns).replace_schema_metadata({_RUNS_KEY: runs.encode()})


def _describe(config: RunConfig) -> dict[str, object]:
    """One line of runs.jsonl: what was trained, and beside it the truth about its fault."""
    settings = config.as_dict()
    del settings["fault"]
    return {
        "run": config.name,
        "fingerprint": config.fingerprint(),
        "group": _group(config),
        "config": settings,
        "truth": None if config.fault is None else _truth(config.fault),
    }


def _describe_planned(run: PlannedRun) -> dict[str, object]:
    """As `_describe`, with what the plan knows."""
    model, fault = run.config.model, run.config.fault
    return {
        **_describe(run.config),
        "group": run.group,
        "architecture": model.architecture,
        "width": model.width,
        "layers": model.layers,
        "recipe": run.recipe,
        "kind": run.kind,
        "hard": run.hard,
        "fault_family": None if fault is None else type(fault).__name__,
        "planned_events": [{"step": step, "kind": kind} for step, kind in run.events],
        "twin": run.twin,
        "split": run.split,
    }


def _truth(fault: Fault) -> dict[str, object]:
    settings = asdict(fault)
    layers = settings.get("layers") or settings.get("layer")
    kind = type(fault).__name__
    return {"kind": kind, "start": fault.start, "layers": layers, "settings": settings}


def write_index(out: Path) -> int:
    """Write `runs.jsonl` anew from all shards of the folder; returns how many runs there are."""
    lines = []
    for shard in sorted((out / "shards").glob("*.parquet")):
        metadata = pq.read_schema(shard).metadata or {}
        lines += [json.dumps(run) for run in json.loads(metadata.get(_RUNS_KEY, b"[]"))]
    unfinished = out / "runs.jsonl.part"
    unfinished.write_text("".join(f"{line}\n" for line in lines))
    os.replace(unfinished, out / "runs.jsonl")
    return len(lines)
