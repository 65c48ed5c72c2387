"""The panels of the numerics dashboard, as tables of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from dashboards.infinity import Column, Read, matrix
from dashboards.step_panels import (
    RUN_PATH,
    STEP,
    STEPS,
    Heatmap,
    Listing,
    Trend,
    layer_series,
    newest,
    scalar,
)

from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import HORIZONS

__all__ = ["ROWS"]

_GEMM: Final = ("input", "weight", "grad_output")


def _map(title: str, description: str, unit: str, statistic: str, **more: Any) -> Heatmap:
    text = f"{description} Worst of each layer and bucket of steps, for the chosen role."
    return Heatmap(title=title, description=text, unit=unit, statistic=statistic, **more)


def _by_role(title: str, description: str, unit: str, statistic: str) -> Trend:
    reads = tuple(layer_series(statistic, role, role) for role in _GEMM)
    text = f"{description} Of the chosen layer, per operand of its GEMMs."
    return Trend(title=title, description=text, unit=unit, reads=reads)


_RISK: Final = Read(
    path=f"{RUN_PATH}/risk/history",
    parameters={**STEPS, "points": "1000"},
    columns=(
        STEP,
        *(Column(f"probability_{horizon}", f"{horizon} steps") for horizon in HORIZONS),
    ),
)
_OVERVIEW: Final = (
    Trend(
        title="Loss",
        description="Training loss: mean of each bucket of steps, between its smallest and its "
        "largest value.",
        unit="none",
        reads=(scalar("loss", "loss"),),
        band=True,
    ),
    Trend(
        title="Risk",
        description="Probability that the loss starts to diverge within so many steps. A horizon "
        "that the forecaster cannot support has no line.",
        unit="percentunit",
        reads=(_RISK,),
    ),
    Trend(
        title="Gradient norm",
        description="Norm of the gradient before clipping, likewise.",
        unit="none",
        reads=(scalar("grad_norm", "gradient norm"),),
        band=True,
    ),
    Listing(
        title="Likely causes",
        description="What the service thinks is wrong as of the newest record, with the evidence "
        "and what to do.",
        unit="none",
        width=14,
        layer="Worst layer",
        reads=(
            Read(
                path=f"{RUN_PATH}/diagnosis",
                parameters={"project": "${project}"},
                root="causes",
                columns=(
                    Column("name", "Cause", "string"),
                    Column("probability", "Probability"),
                    Column("layers.0", "Worst layer", "string"),
                    Column("since_step", "Since step"),
                    Column("evidence", "Evidence", "string"),
                    Column("remedy", "Remedy", "string"),
                ),
            ),
        ),
        units=(("Probability", "percentunit"),),
    ),
    Listing(
        title="Alarms",
        description="Alerts of this run, newest first, with the step each fired at.",
        unit="none",
        width=10,
        reads=(
            Read(
                path="/alerts",
                parameters={"run": "${run}", "project": "${project}", "limit": "50"},
                root="alerts",
                columns=(
                    Column("starts_at", "Since", "timestamp"),
                    Column("step", "Step"),
                    Column("kind", "Kind", "string"),
                    Column("state", "State", "string"),
                    Column("summary", "Summary", "string"),
                ),
            ),
        ),
    ),
)
_OUTLIERS: Final = (
    _map("Kurtosis", "About zero, over all elements; Gaussian is 3.", "none", "kurtosis"),
    _map(
        "Kurtosis, mean over sequences",
        "Mean of each sequence's own: one sink token moves it far less.",
        "none",
        "kurtosis_sequence_mean",
    ),
    _map("Channel kurtosis", "1 without an outlier channel.", "none", "channel_kurtosis"),
    _map(
        "Share of the largest channel",
        "What part of all squares one channel holds.",
        "percentunit",
        "top_channel_share",
    ),
    _map("Largest magnitude", "Largest absolute element.", "none", "amax"),
    _map("Root mean square", "Usual size of an element.", "none", "rms"),
)
_CAST: Final = (
    _map(
        "Headroom",
        "Binades between the largest element and the format's largest value; below 0 it saturates.",
        "none",
        "headroom_log2",
    ),
    _map("SQNR", "Signal to quantization noise of the cast.", "dB", "sqnr_db"),
    _map("Underflow", "Share of elements flushed to zero.", "percentunit", "underflow_ratio"),
    _map(
        "Subnormal",
        "Share of elements below the smallest normal value, flushed ones included.",
        "percentunit",
        "subnormal_ratio",
    ),
    _map("Overflow", "Share of elements beyond the format.", "percentunit", "overflow_ratio"),
    _map("Zeros", "Share of elements that are zero before the cast.", "percentunit", "zero_ratio"),
    _map("Non-finite elements", "NaN and infinities.", "none", "nonfinite_count"),
    _map("Smallest non-zero magnitude", "What underflows first.", "sci", "min_nonzero"),
)
_SCALES: Final = (
    _by_role("Amax history", "Largest absolute element.", "none", "amax"),
    _by_role("Scale", "Binary logarithm of the scale in force.", "none", "scale_log2"),
    _by_role(
        "Headroom of the layer", "Binades left above the largest element.", "none", "headroom_log2"
    ),
    Trend(
        title="Scales within the tensor",
        description="Binary logarithm of the scales of rows or blocks of the chosen layer, role "
        "and format: smallest, quantiles, largest. One scale per tensor has no spread.",
        unit="none",
        width=24,
        reads=tuple(
            layer_series(statistic, "${role}", text, "${format}")
            for statistic, text in (
                ("scale_log2", "smallest"),
                ("scale_log2_p01", "1 %"),
                ("scale_log2_p50", "median"),
                ("scale_log2_p99", "99 %"),
                ("scale_log2_max", "largest"),
            )
        ),
    ),
    _map("Scale by layer", "Binary logarithm of the smallest scale.", "none", "scale_log2"),
    _map("Largest scale by layer", "Of rows or blocks.", "none", "scale_log2_max"),
)
_IDENTITY: Final = (
    Column("layer", "Layer", "string"),
    Column("format", "Format", "string"),
)
_CHANNELS: Final = (
    Listing(
        title="Outlier channels",
        description="Layers whose largest channel holds most of the squares, as measured last: "
        "which channel, how much, and the rank with the largest element.",
        unit="none",
        width=24,
        layer="Layer",
        reads=(
            newest(
                "top_channel_share",
                "${role}",
                (
                    *_IDENTITY,
                    Column("top_channel", "Channel"),
                    Column("top_channel_share", "Share"),
                    Column("channel_kurtosis", "Channel kurtosis"),
                    Column("kurtosis", "Kurtosis"),
                    Column("amax", "Amax"),
                    Column("amax_rank", "Rank of amax"),
                    Column("step", "Step"),
                ),
                100,
            ),
        ),
        units=(("Share", "percentunit"),),
    ),
    Trend(
        title="Which channel",
        description="Number of the largest channel of the chosen layer and role; it wanders while "
        "there is no outlier, and stays once there is one.",
        unit="none",
        width=12,
        points=True,
        reads=(layer_series("top_channel", "${role}", "channel"),),
    ),
    Trend(
        title="Its share",
        description="What part of all squares that channel holds.",
        unit="percentunit",
        width=12,
        reads=(layer_series("top_channel_share", "${role}", "share"),),
    ),
)
_STATES: Final = (
    _map("First moment: root mean square", "Adam's mean.", "sci", "rms", role="exp_avg"),
    _map("Second moment: root mean square", "Adam's square.", "sci", "rms", role="exp_avg_sq"),
    _map(
        "First moment: kurtosis",
        "Heavy tails ask for more range than FP8 has.",
        "none",
        "kurtosis",
        role="exp_avg",
    ),
    _map(
        "Second moment: zeros",
        "An element of 0 makes its update infinite but for epsilon.",
        "percentunit",
        "zero_ratio",
        role="exp_avg_sq",
    ),
    _map("Weight gradient: amax", "As it is reduced.", "sci", "amax", role="grad_weight"),
    _map(
        "Automatic gradient scale mu",
        "The factor of FP8 gradients before they are reduced (FP8-LM).",
        "none",
        "mu",
        role="grad_reduced",
    ),
    Trend(
        title="Optimizer states of the layer",
        description="Root mean square of what the optimizer holds for the chosen layer.",
        unit="sci",
        width=24,
        reads=tuple(
            layer_series("rms", role, role)
            for role in ("grad_weight", "exp_avg", "exp_avg_sq", "master_weight")
        ),
    ),
)
_WHAT_IF: Final = (
    Listing(
        title="SQNR by format",
        description="Signal to quantization noise in dB of each layer under the format it uses and "
        "under those it does not, as measured last, for the chosen role.",
        unit="dB",
        width=12,
        layer="layer\\format",
        reads=(
            newest(
                "sqnr_db",
                "${role}",
                (
                    Column("layer", "layer", "string"),
                    Column("format", "format", "string"),
                    Column("sqnr_db", "value"),
                ),
                20_000,
            ),
        ),
        transformations=tuple(matrix("layer", "format", "value", numeric_rows=False)),
    ),
    Trend(
        title="SQNR of the layer by format",
        description="The chosen layer and role under every format that was measured.",
        unit="dB",
        width=12,
        reads=tuple(layer_series("sqnr_db", "${role}", name, name) for name in FORMATS),
    ),
    _map(
        "SQNR under the format",
        "What the chosen format does or would do.",
        "dB",
        "sqnr_db",
        number_format="${format}",
    ),
    _map(
        "Underflow under the format",
        "What the chosen format flushes or would flush to zero.",
        "percentunit",
        "underflow_ratio",
        number_format="${format}",
    ),
)

Panels = Sequence[Trend | Heatmap | Listing]
ROWS: Final[tuple[tuple[str, Panels], ...]] = (
    ("The run on its step axis", _OVERVIEW),
    ("Layers by steps: outliers", _OUTLIERS),
    ("Layers by steps: the cast", _CAST),
    ("Outlier channels", _CHANNELS),
    ("Scales and amax histories", _SCALES),
    ("Optimizer states", _STATES),
    ("What other formats would do", _WHAT_IF),
)
"""Title and panels of each row; the first two are open."""
