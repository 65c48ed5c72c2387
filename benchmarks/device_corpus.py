"""The corpus of the second plan on the machine it runs on: every GPU, and the cores beside them.

python -m benchmarks.device_corpus --out build/corpus --minutes 8

GPUs train the plan of the seed; cores train smaller runs of the next one. Before anything counts, a
few steps on the GPU are compared with the same steps on a core: where they differ, or no graph can
be captured, that is said and done without. Every 20 seconds: runs, model-steps per second, events.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from foreshock.api.cli.device_signals import fold_on_device, signals_of
from foreshock.api.cli.sweep import Job, train_all, write_index
from foreshock.api.labels import label_run
from foreshock.api.signals import SIGNALS, TENSOR_SIGNALS
from foreshock.trainer.config import DataConfig
from foreshock.trainer.corpus_plan import corpus_plan
from foreshock.trainer.stacked_device import train_windows

PROBE_STEPS = 16
LOSS_TOLERANCE = 0.05
SIGNAL_TOLERANCE = 0.05
"""Median over signals of each one's median at the first steps; of small counts one more or less is
much, and casts that flip let runs drift apart later."""


def probe(device: str, graph: bool) -> dict[str, object]:
    """Compare some steps on the device with the same on a core; all flavours of faults in it."""
    [first, *_] = corpus_plan(7, 1, models_per_stack=12)
    configs = [
        replace(
            run.config,
            steps=PROBE_STEPS,
            tensor_every=1,
            data=DataConfig(sequence_length=32, batch_size=4),
        )
        for run in first
    ]
    both = []
    for where in ("cpu", device):
        windows = train_windows(
            configs,
            fold=fold_on_device,
            folded=len(TENSOR_SIGNALS),
            device=where,
            window=8,
            graph=graph,
        )
        parts = [(*signals_of(window), window.graph) for window in windows]
        both.append(parts)
    losses = [np.concatenate([part[1] for part in parts]) for parts in both]
    signals = [np.concatenate([part[0] for part in parts]) for parts in both]
    loss = float(np.nanmax(np.abs(losses[0] - losses[1])))
    early = np.abs(signals[0][:3] - signals[1][:3])
    same_holes = bool((np.isnan(signals[0]) == np.isnan(signals[1])).all())
    apart = np.nanmedian(early, (0, 1))
    middle = float(np.nanmedian(apart))
    worst = {SIGNALS[i]: round(float(apart[i]), 4) for i in np.argsort(-apart)[:6]}
    return {
        "ok": bool(loss < LOSS_TOLERANCE and middle < SIGNAL_TOLERANCE and same_holes),
        "graph": bool(both[1][-1][2]),
        "loss_difference": loss,
        "signal_difference": middle,
        "same_holes": same_holes,
        "worst_signals": worst,
    }


def probed(device: str) -> tuple[bool, bool]:
    """Whether the device can be used, and with graphs; asked in a process of its own."""
    for graph in (True, False):
        command = [sys.executable, "-m", "benchmarks.device_corpus", "--probe", device]
        try:
            done = subprocess.run(
                [*command, *([] if graph else ["--eager"])],
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"probe of {device}, graph {graph}: no answer in 100 s", flush=True)
            continue
        lines = done.stdout.strip().splitlines()
        print(f"probe of {device}, graph {graph}: {lines[-1:]} {done.stderr[-1500:]}", flush=True)
        try:
            answer = json.loads(lines[-1])
        except (IndexError, ValueError):
            continue
        if answer["ok"]:
            return True, bool(answer["graph"])
    return False, False


class _Count:
    """What is in the shards so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[Path] = set()
        self.runs = self.steps = 0
        self.events: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def look(self) -> None:
        for shard in sorted(set(self.folder.glob("shards/*.parquet")) - self.seen):
            self.seen.add(shard)
            table = pq.read_table(shard, columns=["run", "step", "raw_loss"])
            lines = json.loads((table.schema.metadata or {})[b"foreshock.runs"])
            loss = table["raw_loss"].to_numpy().reshape(len(lines), -1)
            steps = np.arange(loss.shape[1])
            self.runs += len(lines)
            self.steps += loss.size
            for line, values in zip(lines, loss, strict=True):
                self.kinds[line["kind"]] += 1
                if label_run(steps, values.astype(np.float64)).diverges:
                    self.events[f"{line['architecture']}/{line['recipe']}/{line['kind']}"] += 1


def main() -> None:
    """Sweep until the time is up."""
    options = _options()
    if options.probe:
        print(json.dumps(probe(options.probe, not options.eager)), flush=True)
        return
    began = time.monotonic()
    (options.out / "shards").mkdir(parents=True, exist_ok=True)
    threads = _sweeps(options, began + 60 * options.minutes)
    count, told = _Count(options.out), began
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        if time.monotonic() - told > 20:
            told = time.monotonic()
            count.look()
            _tell(count, told - began)
    count.look()
    _tell(count, time.monotonic() - began)
    print(f"{write_index(options.out)} runs in {options.out}", flush=True)
    print(json.dumps({"kinds": count.kinds, "events": count.events}, indent=1), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/corpus"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--stacks", type=int, default=200)
    parser.add_argument("--models", type=int, default=64, help="Runs per stack on a GPU.")
    parser.add_argument("--per-gpu", type=int, default=2, help="Processes on each GPU.")
    parser.add_argument("--cores", type=int, default=-1, help="Processes without a GPU.")
    parser.add_argument("--core-models", type=int, default=16)
    parser.add_argument("--core-scale", type=float, default=0.5)
    parser.add_argument("--probe", default="")
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


def _sweeps(options: argparse.Namespace, deadline: float) -> list[threading.Thread]:
    """Start what trains on cores and what trains on GPUs."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    cores = options.cores
    if cores < 0:
        cores = max(1, (os.cpu_count() or 1) - options.per_gpu * len(gpus) - 2)
    threads = []
    # Before the cores are busy: with nothing beside it a probe takes half a minute, else more than
    # it may.
    usable, graph = probed(gpus[0]) if gpus else (False, False)
    print(f"{len(gpus)} GPUs, usable {usable}, graphs {graph}", flush=True)
    if usable:
        plan = corpus_plan(options.seed, options.stacks, models_per_stack=options.models)
        jobs = [replace(Job.planned(stack, options.out), graph=graph) for stack in plan]
        threads.append(_start(jobs, deadline, options.per_gpu * len(gpus), gpus))
    if cores:
        small = corpus_plan(
            options.seed + 1,
            options.stacks,
            models_per_stack=options.core_models,
            scale=options.core_scale,
        )
        jobs = [Job.planned(stack, options.out) for stack in small]
        threads.append(_start(jobs, deadline, cores, ("cpu",)))
    return threads


def _start(
    jobs: Sequence[Job], deadline: float, processes: int, devices: Sequence[str]
) -> threading.Thread:
    waiting = [job for job in jobs if not job.path.exists()]

    def train() -> None:
        for job in train_all(waiting, deadline, processes=processes, devices=devices):
            print(f"{devices[0]}: {job.path.name} is whole", flush=True)

    thread = threading.Thread(target=train)
    thread.start()
    return thread


def _tell(count: _Count, seconds: float) -> None:
    events = sum(count.events.values())
    print(
        f"{seconds:5.0f} s: {len(count.seen)} stacks, {count.runs} runs, {count.steps} model-steps "
        f"({count.steps / seconds:.0f}/s), {events} events",
        flush=True,
    )


if __name__ == "__main__":
    main()
