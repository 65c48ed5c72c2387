"""Draw the pictures of docs/statistics.md and docs/how-to/heatmap.md: `python -m docs.pictures`.

Every number comes from the monitor's own functions, or from a run of the trainer through a real
service. Takes a minute.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from matplotlib.figure import Figure
from tests.api.live_helpers import wait_until
from tests.api.service import Service

from foreshock.monitor.client import Client, draw
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import TensorSums
from foreshock.monitor.statistics import tensor_sums
from foreshock.trainer.faults import ScaleFault
from foreshock.trainer.loop import train
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched

__all__ = ["casts", "outliers", "run_away"]

IMAGES: Final = Path(__file__).with_name("images")
_COLOURS: Final = {"e4m3": "#0072B2", "e5m2": "#D55E00"}
_FAULT_STEP: Final = 90


def statistics_of(x: torch.Tensor, format: str, scale: float) -> dict[str, float]:
    """Statistics of one tensor under one scale; NaN where undefined."""
    sums = tensor_sums(x, format=format, scale=torch.tensor(scale))
    values = {name: value.numpy() for name, value in sums.items()}
    quantized = np.array(FORMATS[format].scaled)
    columns = TensorSums(**values, amax_rank=np.array(-1.0), quantized=quantized).statistics()
    return {name: float(column.filled(np.nan)) for name, column in columns.items()}


def casts() -> Figure:
    """SQNR, overflow and underflow of Gaussian values against headroom, for both FP8 formats."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, colour in _COLOURS.items():
        fit = FORMATS[name].largest / float(x.abs().max())
        found = [statistics_of(x, name, fit * 2.0**-room) for room in np.arange(-6, 40, 0.5)]
        headroom = [one["headroom_log2"] for one in found]
        above.plot(headroom, [one["sqnr_db"] for one in found], color=colour, label=name.upper())
        below.plot(headroom, [one["underflow_ratio"] for one in found], color=colour)
        below.plot(headroom, [one["overflow_ratio"] for one in found], color=colour, linestyle=":")
    above.set_ylabel("sqnr_db")
    above.legend()
    below.set_ylabel("share of elements")
    below.set_xlabel("headroom_log2 (solid: underflow_ratio, dotted: overflow_ratio)")
    return figure


def outliers() -> Figure:
    """Kurtosis and channel kurtosis of Gaussian values while one of 256 features grows."""
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    factors = 2.0 ** np.arange(0, 8.5, 0.25)
    found = []
    for factor in factors:
        grown = x.clone()
        grown[:, 7] *= float(factor)
        found.append(statistics_of(grown, "e4m3", 1.0))
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.loglog(factors, [one["kurtosis"] for one in found], color="#0072B2", label="kurtosis")
    axes.loglog(
        factors,
        [one["channel_kurtosis"] for one in found],
        color="#D55E00",
        linestyle="--",
        label="channel_kurtosis",
    )
    axes.set_xlabel("one feature of 256, times")
    axes.legend()
    return figure


def run_away(folder: Path) -> Figure:
    """A run of the trainer whose input scales run away, as `draw` shows it."""
    fault = ScaleFault(start=_FAULT_STEP, growth=1.05, roles=("input",))
    config = replace(debug_cpu(), name="scales", steps=180, tensor_every=2, fault=fault)
    service = Service(folder)
    service.start()
    try:
        with Client(service.url) as client:
            train(config, watch=watched(config, url=service.url, spool=folder / "spool"))
            wait_until(lambda: client.risk("scales").step == config.steps - 1, 60)
            return draw("scales", client=client, statistic="headroom_log2")
    finally:
        service.stop()


def main() -> None:
    """Write them all."""
    casts().savefig(IMAGES / "cast.svg", metadata={"Date": None})
    outliers().savefig(IMAGES / "outlier.svg", metadata={"Date": None})
    with tempfile.TemporaryDirectory() as folder:
        run_away(Path(folder)).savefig(IMAGES / "heatmap.png", dpi=90)


if __name__ == "__main__":
    main()
