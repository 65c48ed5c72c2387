"""A run as a picture for a notebook: loss and risk over the steps, all layers below.

Needs matplotlib (`pip install 'foreshock[notebook]'`). Asks through `Client`, draws the answers.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from foreshock.monitor.client.answers import Heatmap, RiskHistory
from foreshock.monitor.client.client import Client
from foreshock.monitor.client.errors import MissingPackage

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

Steps = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_POINTS: Final = 1000
_MOST_NAMES: Final = 32
_LOGARITHMIC_SPAN: Final = 100.0
# Told apart by everybody, in print too (Okabe and Ito's blue and vermilion).
_LOSS_COLOUR: Final = "#0072B2"
_RISK_COLOUR: Final = "#D55E00"


def draw(
    run: str,
    *,
    client: Client | None = None,
    statistic: str = "kurtosis",
    role: str = "input",
    horizon: int = 100,
    **query: Any,
) -> Figure:
    """Draw a run: loss, risk with its band, alarms, and a heatmap of layers by steps.

        from foreshock.monitor.client import draw
        draw("llama-1b", statistic="headroom_log2")

    Args:
        run: run_id, or the name within the client's project.
        client: Default: one as `Client()` makes it, closed afterwards.
        statistic: Of the heatmap, e.g. kurtosis.
        role: Of the heatmap's tensors.
        horizon: Of the risk, in steps.
        query: first_step, last_step, attempt.

    Returns:
        A figure of two axes and their neighbours: `axes[0]` the loss, `axes[1]` the risk on the
        same steps, `axes[2]` the heatmap. The heatmap is left out when the run has no such
        statistic.

    Raises:
        ClientError: The service does not answer, or says no.
        MissingPackage: matplotlib is not installed.
        ValueError: The service knows no such horizon.
    """
    figure = _new_figure()
    if client is not None:
        return _fill(figure, client, run, (statistic, role), horizon, query)
    with Client() as own:
        return _fill(figure, own, run, (statistic, role), horizon, query)


def _new_figure() -> Figure:
    try:
        from matplotlib import pyplot
    except ImportError:
        needed = "pip install 'foreshock[notebook]'"
        raise MissingPackage(f"pictures need matplotlib: {needed}") from None
    # Only a figure of pyplot makes a notebook able to show one; closed, it is not shown twice.
    figure = pyplot.figure(figsize=(10, 6.5), layout="constrained")
    pyplot.close(figure)
    return figure


def _fill(
    figure: Figure,
    client: Client,
    run: str,
    shown: tuple[str, str],
    horizon: int,
    query: dict[str, Any],
) -> Figure:
    detail = client.run(run)
    history = client.risk_history(run, points=_POINTS, **query)
    if horizon not in history.probability:
        known = ", ".join(map(str, sorted(history.probability)))
        raise ValueError(f"horizon is {horizon}; this service has {known}")
    statistic, role = shown
    has_heatmap = statistic in detail.statistics and role in detail.roles
    rows = 2 if has_heatmap else 1
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[2, 3][:rows])[:, 0]
    if "loss" in detail.scalars:
        _draw_loss(axes[0], client.series_table(run, "loss", points=_POINTS, **query))
    _draw_risk(axes[0], history, horizon)
    axes[0].set_title(f"{detail.run} (project {detail.project})", loc="left")
    if has_heatmap:
        heat = client.heatmap(run, statistic, role, **query)
        _draw_heatmap(figure, axes[1], heat, f"{statistic} of {role}")
    axes[-1].set_xlabel("optimizer step")
    return figure


def _draw_loss(axes: Axes, table: pa.Table) -> None:
    """The mean of each bucket, from its smallest to its largest value, crosses where not finite."""
    step = table.column("step").to_numpy()
    low, mean, high = (_floats(table, name) for name in ("min", "mean", "max"))
    axes.fill_between(step, low, high, color=_LOSS_COLOUR, alpha=0.2, linewidth=0)
    axes.plot(step, mean, color=_LOSS_COLOUR, label="loss")
    lost = step[_floats(table, "nonfinite") > 0]
    if len(lost):
        # At the upper edge, whatever the axis: such a value has no place on it.
        axes.plot(
            lost,
            np.full(len(lost), 0.97),
            "x",
            color=_LOSS_COLOUR,
            transform=axes.get_xaxis_transform(),
            label="loss not finite",
        )
    axes.set_ylabel("loss", color=_LOSS_COLOUR)


def _floats(table: pa.Table, name: str) -> Floats:
    values = (np.nan if value is None else value for value in table.column(name).to_pylist())
    return np.fromiter(values, dtype=np.float64)


def _draw_risk(axes: Axes, history: RiskHistory, horizon: int) -> None:
    beside = axes.twinx()
    step = history.step
    beside.fill_between(
        step,
        history.low[horizon],
        history.high[horizon],
        color=_RISK_COLOUR,
        alpha=0.2,
        linewidth=0,
    )
    beside.plot(
        step,
        history.probability[horizon],
        color=_RISK_COLOUR,
        linestyle="--",
        label=f"risk within {horizon} steps",
    )
    for first, last in _firing(history):
        beside.axvspan(first, last, color="0.5", alpha=0.25, linewidth=0, label="alarm")
    beside.set_ylim(0, 1)
    beside.set_ylabel("risk", color=_RISK_COLOUR)
    # Each label once, those of both axes.
    named = dict(
        (label, handle)
        for side in (axes, beside)
        for handle, label in zip(*side.get_legend_handles_labels(), strict=True)
    )
    beside.legend(named.values(), named.keys(), loc="upper left")


def _firing(history: RiskHistory) -> list[tuple[int, int]]:
    """First and last step of each stretch with an alarm."""
    runs = groupby(range(len(history.step)), key=lambda i: history.state[i] == "firing")
    stretches = [list(indices) for firing, indices in runs if firing]
    return [(int(history.step[s[0]]), int(history.step[s[-1]])) for s in stretches]


def _draw_heatmap(figure: Figure, axes: Axes, heat: Heatmap, name: str) -> None:
    """Layers from top to bottom in model order; the brighter, the worse; grey: not measured."""
    from matplotlib.colors import LogNorm

    steps, values = _without_cadence(heat)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    spread = low > 0 and high > _LOGARITHMIC_SPAN * low
    mesh = axes.pcolormesh(
        _edges(steps),
        np.arange(len(heat.layers) + 1),
        np.ma.masked_invalid(values),
        cmap="cividis_r" if heat.worst == "min" else "cividis",
        norm=LogNorm(low, high) if spread else None,
    )
    axes.set_facecolor("0.8")
    axes.set_ylim(len(heat.layers), 0)
    every = -(-len(heat.layers) // _MOST_NAMES) or 1
    shown = range(0, len(heat.layers), every)
    axes.set_yticks([index + 0.5 for index in shown], [heat.layers[index] for index in shown])
    axes.tick_params(axis="y", labelsize="small")
    figure.colorbar(mesh, ax=axes, label=f"{name}; brighter is worse")


def _without_cadence(heat: Heatmap) -> tuple[Steps, Floats]:
    """Steps and values without the steps between two measurements, at which none was due."""
    measured = ~np.isnan(heat.values).all(axis=0)
    if measured.sum() < 2:
        return heat.steps, heat.values
    spacing = np.median(np.diff(heat.steps[measured]))
    last = np.maximum.accumulate(np.where(measured, heat.steps, -np.inf))
    kept = measured | (heat.steps - last >= spacing)
    return heat.steps[kept], heat.values[:, kept]


def _edges(steps: Steps) -> Floats:
    """Where each bucket begins, and where the last one ends if it is as wide as the one before."""
    width = float(steps[-1] - steps[-2]) if len(steps) > 1 else 1.0
    return np.append(steps.astype(np.float64), steps[-1] + width if len(steps) else 0.0)
