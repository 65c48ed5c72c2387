"""Time of device work, by the device's own clock where it has one."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["milliseconds"]


def milliseconds(work: Callable[[], object], device: torch.device, *, sleep: int = 0) -> float:
    """Time from the first to the last thing that the work queued.

    Args:
        work: Queues it.
        device: CUDA is timed by its events; elsewhere the host's clock is taken.
        sleep: Cycles for which the device waits first, so that the host is ahead of it.
    """
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    if sleep:
        torch.cuda._sleep(sleep)  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
