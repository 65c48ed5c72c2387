"""Independent pieces of work in processes of one thread each, told as they end."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

__all__ = ["row", "side_by_side"]

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def side_by_side(
    work: Callable[[Job], Answer], jobs: Sequence[Job], processes: int
) -> Iterator[tuple[Job, Answer]]:
    """Do every job, yield each with its answer as soon as it has one.

    A job that fails is told with its traceback and leaves the others alone.

    Args:
        work: A function of a module: processes import it.
        jobs: Picklable.
        processes: 1 works here, without any other process.
    """
    if processes == 1:
        torch.set_num_threads(1)
        for job in jobs:
            try:
                answer = work(job)
            except Exception:  # noqa: BLE001 - what fails is told
                traceback.print_exc()
                continue
            yield job, answer
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        running = {pool.submit(work, job): job for job in jobs}
        for done in concurrent.futures.as_completed(running):
            try:
                answer = done.result()
            except Exception:  # noqa: BLE001 - what fails is told
                traceback.print_exc()
                continue
            yield running[done], answer


def row(*cells: object) -> None:
    """A line of a table, at once."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
