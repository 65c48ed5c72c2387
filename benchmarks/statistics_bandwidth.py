"""Bandwidth of the statistics of one tensor on a GPU, beside plain torch.sum in the same process.

    python -m benchmarks.statistics_bandwidth [--tensors 8] [--rounds 30]

Bytes of the tensor over the time of one measurement. Several tensors are read in turn, so that none
waits in the cache; variants take turns, so that what else the machine does hits all alike; medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from foreshock.monitor.device_rows import ROW_FIELDS
from foreshock.monitor.kernels import Scratch, accumulate
from foreshock.monitor.statistics import packed_sums

SHAPES = ((8192, 8192), (32768, 8192))
Measure = Callable[[torch.Tensor], object]


def plain(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Amax, moments, counts and the smallest magnitude, as one writes them in torch."""
    magnitude = x.float().abs()
    finite = magnitude.isfinite()
    magnitude = torch.where(finite, magnitude, 0.0)
    square = magnitude * magnitude
    return (
        magnitude.amax(),
        square.sum(),
        (square * square).sum(),
        (magnitude == 0).sum(),
        (~finite).sum(),
        torch.where(magnitude > 0, magnitude, torch.inf).amin(),
    )


def variants(columns: int) -> Mapping[str, Measure]:
    """What is measured, by its name in the table."""
    device = torch.device("cuda")
    rows = torch.zeros(1, ROW_FIELDS, dtype=torch.float64, device=device)
    control = torch.tensor([1, 0], dtype=torch.int32, device=device)
    scale = torch.tensor(64.0, device=device)
    channels = torch.zeros(columns, dtype=torch.float64, device=device)
    histogram = torch.zeros(256, dtype=torch.float64, device=device)
    ours = partial(accumulate, rows=rows, slot=0, control=control, scratch=Scratch(device))
    return {
        "torch.sum": torch.sum,
        "ours, core set": partial(ours, format="bf16", scale=None),
        "ours, core set and cast, without sqnr": partial(
            ours, format="e4m3", scale=scale, sqnr=False
        ),
        "ours, with sqnr": partial(ours, format="e4m3", scale=scale),
        "ours, core set with channels": partial(ours, format="bf16", scale=None, channels=channels),
        "ours, with sqnr and channels": partial(
            ours, format="e4m3", scale=scale, channels=channels
        ),
        "ours, current scaling (two reads)": partial(ours, format="e4m3", scale=None),
        "ours, core set with histogram": partial(
            ours, format="bf16", scale=None, histogram=histogram
        ),
        "the core set by torch.compile": torch.compile(plain),
        "the core set by eager torch": plain,
        "packed_sums (eager torch, with sqnr)": partial(packed_sums, format="e4m3", scale=scale),
    }


def milliseconds(measure: Measure, x: torch.Tensor) -> float:
    """Time on the device of one measurement."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # The device waits while the host prepares the launch: what is timed is the device's work.
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
    start.record()
    measure(x)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def table(shape: tuple[int, int], tensors: int, rounds: int) -> list[str]:
    """Lines of the table for one shape."""
    several = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(tensors)]
    measures = variants(shape[1])
    times: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        for x in several[:3]:
            milliseconds(measure, x)
    for number in range(rounds):
        for name, measure in measures.items():
            slow = "eager" in name
            if slow and number >= 5:
                continue
            for x in several[: 2 if slow else tensors]:
                times[name].append(milliseconds(measure, x))
    size = several[0].numel() * several[0].element_size()
    speeds = {name: size / statistics.median(t) / 1e6 for name, t in times.items()}
    return [
        f"| {shape[0]}x{shape[1]} | {name} | {speed:,.0f} | {speed / speeds['torch.sum']:.3f} |"
        for name, speed in speeds.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tensors", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| tensor, bf16 | what | GB/s | of torch.sum |\n|---|---|---|---|")
    for shape in SHAPES:
        print("\n".join(table(shape, arguments.tensors, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
