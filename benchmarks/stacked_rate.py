"""Model-steps per second of a stack on a device: sizes, with and without statistics and graphs.

python -m benchmarks.stacked_rate --device cuda --seconds 3
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from foreshock.api.cli.device_signals import fold_on_device
from foreshock.api.signals import TENSOR_SIGNALS
from foreshock.trainer.config import DataConfig, ModelConfig, RunConfig
from foreshock.trainer.corpus_plan import RECIPES_OF_PLAN
from foreshock.trainer.stacked_device import train_windows

GRID = ((64, 64), (128, 64), (256, 64), (64, 128), (128, 128), (16, 256), (32, 256))


def rate(
    models: int,
    width: int,
    *,
    device: str,
    seconds: float,
    every: int,
    graph: bool,
    recipe: str = "fp8_delayed16",
    architecture: str = "llama3",
    data: DataConfig | None = None,
) -> tuple[float, float, bool]:
    """Model-steps per second once it runs, seconds until then, and whether a graph ran."""
    base = RunConfig(
        name="rate",
        model=ModelConfig(
            architecture=architecture,  # type: ignore[arg-type]
            width=width,
            heads=max(2, width // 32),
        ),
        data=data or DataConfig(sequence_length=128, batch_size=8),
        precision=RECIPES_OF_PLAN[recipe],
        steps=100_000,
        tensor_every=every,
    )
    configs = [replace(base, seed=seed) for seed in range(models)]
    began = time.monotonic()
    windows = train_windows(
        configs,
        fold=fold_on_device,
        folded=len(TENSOR_SIGNALS),
        device=device,
        window=12,
        graph=graph,
    )
    next(windows)
    ready = time.monotonic() - began
    next(windows)
    taken, captured = 0, False
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        window = next(windows)
        taken += window.scalars.shape[0] * models
        captured = window.graph
    return taken / (time.monotonic() - began), ready, captured


def main() -> None:
    """Print a line per size and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tiny", action="store_true", help="Whether it runs, and no more.")
    options = parser.parse_args()
    print(f"{options.device}, torch {torch.__version__}", flush=True)
    small = DataConfig(sequence_length=32, batch_size=2) if options.tiny else None
    short = DataConfig(sequence_length=64, batch_size=8) if not options.tiny else small
    cases: list[tuple[int, int, int, bool, str, str, DataConfig | None]] = []
    for models, width in ((2, 32),) if options.tiny else GRID:
        cases.append((models, width, 1, True, "fp8_delayed16", "llama3", small))
    first = (2, 32) if options.tiny else (64, 64)
    cases += [
        (*first, 1, False, "fp8_delayed16", "llama3", small),
        (*first, 4, True, "fp8_delayed16", "llama3", small),
        (*first, 1, True, "fp8_delayed16", "llama3", short),
        (*first, 1, True, "fp8_delayed1024", "olmo2", short),
        (*first, 1, True, "fp8_dpa", "fog_flash", short),
        (*first, 1, True, "bf16", "op", short),
        (*first, 2, True, "mxfp8", "llama3", short),
        (*first, 2, True, "nvfp4", "llama3", short),
    ]
    for models, width, every, graph, recipe, architecture, data in cases:
        name = f"E {models:3d}, width {width:3d}, {architecture}, {recipe}, statistics 1/{every}"
        name += f", {'graph' if graph else 'eager'}, {data or 'tokens 128 x 8'}"
        try:
            speed, ready, captured = rate(
                models,
                width,
                device=options.device,
                seconds=options.seconds,
                every=every,
                graph=graph,
                recipe=recipe,
                architecture=architecture,
                data=data,
            )
        except (RuntimeError, ValueError) as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        held = ""
        if options.device.startswith("cuda"):
            held = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()
        print(
            f"{name}: {speed:.0f} model-steps/s (ready in {ready:.1f} s, graph {captured}{held})",
            flush=True,
        )


if __name__ == "__main__":
    main()
