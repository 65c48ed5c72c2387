"""Bandwidth of the statistics of one tensor on a GPU, beside plain torch.sum in the same process.

    python -m benchmarks.statistics_bandwidth [--tensors 8] [--rounds 30] [--device cpu --tiny]

Bytes of the tensor over the time of one measurement. Several tensors are read in turn, so that none
waits in the cache; variants take turns, so that what else the machine does hits all alike; medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.timing import milliseconds
from foreshock.monitor.device_rows import ROW_FIELDS
from foreshock.monitor.kernels import Scratch, accumulate, accumulate_codes
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


def variants(columns: int, device: torch.device) -> Mapping[str, Measure]:
    """What is measured, by its name in the table."""
    rows = torch.zeros(1, ROW_FIELDS, dtype=torch.float64, device=device)
    control = torch.tensor([1, 0], dtype=torch.int32, device=device)
    scale, one = torch.tensor(64.0, device=device), torch.tensor(1.0, device=device)
    channels = torch.zeros(columns, dtype=torch.float64, device=device)
    histogram = torch.zeros(256, dtype=torch.float64, device=device)

    def ours(per_core: int | None = None, **options: Any) -> Measure:
        scratch = Scratch(device, per_core=per_core)
        return partial(accumulate, rows=rows, slot=0, control=control, scratch=scratch, **options)

    def codes(x: torch.Tensor) -> None:
        # As many bytes, so twice as many elements, each what a cast leaves.
        made = cast.get(x.data_ptr())
        if made is None:
            made = torch.cat([x, x.flip(1)], 1).to(torch.float8_e4m3fn).view(torch.uint8)
            cast[x.data_ptr()] = made
        accumulate_codes(
            made, rows, 0, format="e4m3", scale_inv=one, control=control, scratch=for_codes
        )

    cast: dict[int, torch.Tensor] = {}
    for_codes = Scratch(device)
    found: dict[str, Measure] = {
        "torch.sum": torch.sum,
        "torch._foreach_norm (what a gradient norm takes)": lambda x: torch._foreach_norm([x]),
        "ours, core set": ours(format="bf16", scale=None),
        "ours, core set and cast, without sqnr": ours(format="e4m3", scale=scale, sqnr=False),
        "ours, with sqnr": ours(format="e4m3", scale=scale),
        "ours, FP8 codes (as many bytes)": codes,
        "ours, core set with channels": ours(format="bf16", scale=None, channels=channels),
        "ours, with sqnr and channels": ours(format="e4m3", scale=scale, channels=channels),
        "ours, current scaling (two reads)": ours(format="e4m3", scale=None),
        "ours, core set with histogram": ours(format="bf16", scale=None, histogram=histogram),
        "the core set by eager torch": plain,
        "packed_sums (eager torch, with sqnr)": partial(packed_sums, format="e4m3", scale=scale),
    }
    if device.type == "cuda":
        found["the core set by torch.compile"] = torch.compile(plain)
        for each in (6, 8):
            found[f"ours, core set, {each} programs a core"] = ours(each, format="bf16", scale=None)
        found["ours, with sqnr, 5 programs a core"] = ours(5, format="e4m3", scale=scale)
    return found


def time_of(measure: Measure, x: torch.Tensor) -> float:
    """Milliseconds of one measurement; the host prepares the launch while the device sleeps."""
    return milliseconds(partial(measure, x), x.device, sleep=1_000_000)


def table(shape: tuple[int, int], tensors: int, rounds: int, device: torch.device) -> list[str]:
    """Lines of the table for one shape."""
    several = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(tensors)]
    measures = variants(shape[1], device)
    times: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        for x in several[:3]:
            time_of(measure, x)
    for number in range(rounds):
        for name, measure in measures.items():
            slow = "eager" in name
            if slow and number >= 5:
                continue
            for x in several[: 2 if slow else tensors]:
                times[name].append(time_of(measure, x))
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
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs")
    arguments = parser.parse_args()
    device = arguments.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreted on a CPU"
    print(f"{name}, torch {torch.__version__}\n")
    print("| tensor, bf16 | what | GB/s | of torch.sum |\n|---|---|---|---|")
    for shape in ((4, 256),) if arguments.tiny else SHAPES:
        lines = table(shape, arguments.tensors, arguments.rounds, device)
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
