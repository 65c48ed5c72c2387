"""What every forecaster must beat: published rules and simple causal scores on the same signals.

Each gives one score per record, high = alarm; thresholds are tuned as the forecaster's are. None of
them is used to answer users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from foreshock.api.signals import SIGNALS

__all__ = ["BASELINES", "SHIPPED_RULES", "TimeOnlyHazard"]

FloatArray = npt.NDArray[np.float64]
Baseline = Callable[[FloatArray], FloatArray]

_WINDOW: Final = 128


def _signal(signals: FloatArray, name: str) -> FloatArray:
    """One signal with gaps filled by the last value."""
    values = signals[:, SIGNALS.index(name)]
    seen = np.isfinite(values)
    if not seen.any():
        return np.full(len(values), np.nan)
    last = np.maximum.accumulate(np.where(seen, np.arange(len(values)), -1))
    return np.asarray(np.where(last >= 0, values[np.maximum(last, 0)], np.nan))


def _trailing(values: FloatArray, width: int) -> FloatArray:
    """(T, width) windows of the values before each point, NaN before the start."""
    padded = np.concatenate([np.full(width, np.nan), values])[:-1]
    return np.lib.stride_tricks.sliding_window_view(padded, width)


def _quantile(windows: FloatArray, needed: int = 32) -> FloatArray:
    """Row medians, NaN where fewer than `needed` values are known."""
    ordered = np.sort(windows, axis=1)
    count = np.count_nonzero(~np.isnan(ordered), axis=1)
    rows = np.arange(len(ordered))
    last = np.maximum(count - 1, 0)
    middle = (ordered[rows, last // 2] + ordered[rows, (last + 1) // 2]) / 2
    return np.where(count >= needed, middle, np.nan)


def _robust_z(values: FloatArray) -> FloatArray:
    """0.6745 (x - median) / MAD over the 128 values before."""
    windows = _trailing(values, _WINDOW)
    median = _quantile(windows)
    mad = _quantile(np.abs(windows - median[:, None]))
    return np.asarray(0.6745 * (values - median) / (mad + 1e-9))


def _plain_z(values: FloatArray) -> FloatArray:
    windows = _trailing(values, _WINDOW)
    count = np.count_nonzero(~np.isnan(windows), axis=1)
    safe = np.maximum(count, 1)
    mean = np.nansum(windows, axis=1) / safe
    spread = np.sqrt(np.nansum(np.square(windows - mean[:, None]), axis=1) / safe)
    z = (values - mean) / (spread + 1e-9)
    return np.asarray(np.where(count >= 32, z, np.nan))


def loss_z(signals: FloatArray) -> FloatArray:
    """Robust z of the loss."""
    return _robust_z(_signal(signals, "loss"))


def gradient_z(signals: FloatArray) -> FloatArray:
    """Robust z of the log gradient norm."""
    return _robust_z(_signal(signals, "grad_norm"))


def olmo_six_sigma(signals: FloatArray) -> FloatArray:
    """OLMo-core's stability monitor: z over 128 of loss or gradient norm, whichever is larger."""
    gradient = np.exp2(_signal(signals, "grad_norm"))
    return np.fmax(_plain_z(_signal(signals, "loss")), _plain_z(gradient))


def zclip(signals: FloatArray) -> FloatArray:
    """ZClip (2504.02507): z of the gradient norm against exponential moments, alpha 0.97."""
    norm = np.exp2(_signal(signals, "grad_norm"))
    scores = np.full(len(norm), np.nan)
    mean = spread = np.nan
    for index, value in enumerate(norm):
        if not np.isfinite(value):
            continue
        if np.isnan(mean):
            mean, spread = value, value**2
            continue
        z = (value - mean) / (np.sqrt(spread) + 1e-9)
        scores[index] = z
        clipped = min(value, mean + 2.5 * np.sqrt(spread))
        spread = 0.97 * spread + 0.03 * (clipped - mean) ** 2
        mean = 0.97 * mean + 0.03 * clipped
    return scores


def megatron_ten_times(signals: FloatArray) -> FloatArray:
    """Megatron's rerun check: loss or gradient norm over the largest of the first 100 values."""
    ratios = []
    for name in ("loss", "grad_norm"):
        values = _signal(signals, name)
        values = np.exp2(values) if name == "grad_norm" else values
        first = values[:100][np.isfinite(values[:100])]
        ratio = values / first.max() if first.size else np.full(len(values), np.nan)
        ratio[:100] = np.nan
        ratios.append(ratio)
    return np.asarray(np.fmax(ratios[0], ratios[1]))


def kurtosis_slope(signals: FloatArray) -> FloatArray:
    """Slope of the worst layer's log kurtosis over 128 records, in units of its scatter."""
    values = _signal(signals, "input.kurtosis.max")
    windows = np.nan_to_num(_trailing(values, _WINDOW))
    time = np.arange(_WINDOW) - (_WINDOW - 1) / 2
    slope = windows @ time / np.square(time).sum()
    rest = windows - windows.mean(axis=1, keepdims=True) - slope[:, None] * time
    scores = slope * _WINDOW / (rest.std(axis=1) + 1e-3)
    scores[:_WINDOW] = np.nan
    scores[np.isnan(values)] = np.nan
    return np.asarray(scores)


def update_growth(signals: FloatArray) -> FloatArray:
    """Update ratio over its median of the 128 records before: sees a runaway learning rate.

    The strongest single rule where learning-rate failures are common; if it explains a win, the
    report must show it.
    """
    values = _signal(signals, "update_ratio")
    return np.asarray(np.exp2(values - _quantile(_trailing(values, _WINDOW))))


def headroom_rule(signals: FloatArray) -> FloatArray:
    """The worst tensor's scaled amax over the format's largest value (2 to the minus headroom)."""
    roles = [f"{role}.headroom_log2.min" for role in ("input", "weight", "grad_output")]
    columns = [-_signal(signals, name) for name in roles]
    return np.asarray(np.exp2(np.fmax(np.fmax(columns[0], columns[1]), columns[2])))


def overflow_rule(signals: FloatArray) -> FloatArray:
    """Largest share of overflowing elements."""
    roles = [f"{role}.overflow_ratio.max" for role in ("input", "weight", "grad_output")]
    columns = [_signal(signals, name) for name in roles]
    return np.asarray(np.exp2(np.fmax(np.fmax(columns[0], columns[1]), columns[2])))


def above_best(signals: FloatArray) -> FloatArray:
    """Loss over its running minimum (means of 16), as a share of the progress made."""
    loss = _signal(signals, "loss")
    windows = np.nan_to_num(_trailing(loss, 16), nan=np.inf)
    mean = np.where(np.isfinite(windows).all(axis=1), windows.mean(axis=1), np.nan)
    best = np.fmin.accumulate(mean)
    progress = np.fmax.accumulate(mean) - best
    return np.asarray((mean - best) / np.maximum(progress, 1e-3))


def trainscope_cusum(signals: FloatArray) -> FloatArray:
    """Trainscope's CUSUM on the loss, two-sided, so that an improving loss fires too.

    Allowance half a sigma and threshold 5 sigma (Page 1954) against the 128 records before; a score
    of 1 is the threshold.
    """
    z = np.nan_to_num(_plain_z(_signal(signals, "loss")))
    up = down = 0.0
    scores = np.zeros(len(z))
    for index, value in enumerate(z.tolist()):
        up = max(up + value - 0.5, 0.0)
        down = max(down - value - 0.5, 0.0)
        scores[index] = max(up, down) / 5.0
        if scores[index] >= 1:
            up = down = 0.0
    return scores


def losslint_rules(signals: FloatArray) -> FloatArray:
    """Losslint's spike (10x the median of 25) and divergence (last over first tenth, 1.25x).

    Its checks look at the whole history at each poll; here a poll is every 10 records.
    """
    loss = _signal(signals, "loss")
    spike = loss / (10.0 * np.abs(_quantile(_trailing(loss, 25), needed=12)))
    ends = np.full(len(loss), np.nan)
    for count in range(50, len(loss), 10):
        tenth = count // 10
        first, last = np.nanmedian(loss[:tenth]), np.nanmedian(loss[count - tenth : count])
        ends[count : count + 10] = last / (1.25 * first) if first > 0 else np.nan
    return np.asarray(np.fmax(spike, ends))


def any_overflow(signals: FloatArray) -> FloatArray:
    """1 where any element overflows (the signal's floor is a millionth)."""
    return np.asarray((overflow_rule(signals) > 1.5e-6).astype(np.float64))


def negative_headroom(signals: FloatArray) -> FloatArray:
    """1 where the worst tensor's amax lies above what its scale can hold."""
    return np.asarray((headroom_rule(signals) > 1.0).astype(np.float64))


SHIPPED_RULES: Final[Mapping[str, Baseline]] = {
    "trainscope CUSUM, as shipped": trainscope_cusum,
    "losslint, as shipped": losslint_rules,
    "overflow > 0": any_overflow,
    "headroom < 0": negative_headroom,
}
"""As `BASELINES`, but with a threshold of their own, 1: no budget tunes them."""

BASELINES: Final[Mapping[str, Baseline]] = {
    "robust z, loss": loss_z,
    "robust z, gradient norm": gradient_z,
    "OLMo 6 sigma": olmo_six_sigma,
    "ZClip": zclip,
    "Megatron 10x": megatron_ten_times,
    "kurtosis slope": kurtosis_slope,
    "update ratio growth": update_growth,
    "headroom": headroom_rule,
    "overflow": overflow_rule,
    "loss above its best": above_best,
}
"""Signals (T, len(SIGNALS)) to scores (T,), NaN = cannot say."""


class TimeOnlyHazard:
    """P(onset within the horizon | step): what the clock alone knows.

    Args:
        width: Steps per bin.
    """

    def __init__(self, width: int = 50) -> None:
        self._width = width
        self._rates = np.zeros(1)

    def fit(self, steps: Sequence[FloatArray], events: Sequence[npt.NDArray[np.bool_]]) -> None:
        """Learn the rate per bin of steps.

        Args:
            steps: Per run, (rows,).
            events: Per run, (rows,) whether the onset comes within the horizon.
        """
        where = (np.concatenate(steps) // self._width).astype(int)
        hit = np.concatenate(events)
        bins = int(where.max()) + 1 if where.size else 1
        rows, hits = (np.bincount(where, weights=w, minlength=bins) for w in (None, hit))
        overall = float(hit.mean()) if hit.size else 0.0
        self._rates = (hits + 20 * overall) / (rows + 20)

    def predict(self, steps: FloatArray) -> FloatArray:
        """(rows,) probabilities."""
        where = (np.asarray(steps) // self._width).astype(int)
        return np.asarray(self._rates[np.minimum(where, len(self._rates) - 1)])
