"""Sufficient sums of a tensor, their exact merge, and the statistics they give.

Merging over micro-batches, shards and ranks happens here and nowhere else: a record is already
merged. Every field is a float64 array, and one object may hold the sums of many tensors at once
(any leading shape), so a single run and a stack of runs share each definition.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np

__all__ = ["EXPONENTS", "FIELD_REDUCTIONS", "TensorSums"]

Array = np.ndarray[Any, np.dtype[np.float64]]

FIELD_REDUCTIONS: Final[dict[str, str]] = {
    "numel": "sum",
    "observations": "sum",
    "nonfinite": "sum",
    "zeros": "sum",
    "sum2": "sum",
    "sum4": "sum",
    "amax": "max",
    "min_nonzero": "min",
    "sequence_kurtosis": "sum",
    "sequences": "sum",
    "flushed": "sum",
    "subnormal": "sum",
    "overflow": "sum",
    "error2": "sum",
    "headroom_log2": "min",
    "scale_log2": "min",
    "scale_log2_max": "max",
}
"""How each scalar field merges: one packed SUM and one packed MAX (min is the max of negatives)."""

EXPONENTS: Final = 256
"""Entries of a histogram by biased float32 exponent."""

_BIAS: Final = 127
_QUANTILES: Final = {"scale_log2_p01": 0.01, "scale_log2_p50": 0.5, "scale_log2_p99": 0.99}

# What a row for a format that the run does not use leaves to the row of the one that it does.
_FORMAT_INDEPENDENT: Final = (
    "amax",
    "amax_rank",
    "rms",
    "kurtosis",
    "kurtosis_sequence_mean",
    "channel_kurtosis",
    "top_channel",
    "top_channel_share",
    "zero_ratio",
    "nonfinite_count",
    "min_nonzero",
)

_IDENTITY: Final = {"sum": 0.0, "max": -np.inf, "min": np.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSums:
    """Sums over the finite elements x of a tensor, q its cast under the scale s in force.

    Attributes (float64, common shape; one entry per tensor):
        numel: Number of finite elements N.
        observations: How many tensors were added up.
        nonfinite: Number of NaN and infinities; they enter nothing else.
        zeros: Number of elements equal to zero (-0.0 too).
        sum2, sum4: Sums of x^2 and x^4.
        amax: Largest abs x; -inf for no element.
        min_nonzero: Smallest non-zero abs x; +inf if there is none.
        sequence_kurtosis, sequences: Sum over sequences of each one's own N sum4 / sum2^2, and the
            number of sequences with sum2 > 0.
        flushed: Non-zero elements whose q is zero.
        subnormal: Elements with 0 < abs(x s) below the smallest normal.
        overflow: Elements with abs(x s) > M, counted before the cast.
        error2: Sum of (q/s - x)^2; NaN where nobody took it.
        headroom_log2: Smallest log2(M / (amax s)); +inf where amax is 0.
        scale_log2, scale_log2_max: Smallest and largest log2 s; +inf and -inf where unscaled.
        amax_rank: Rank that holds amax; -1 unknown.
        quantized: Whether the format has a scale, so that the cast's statistics mean anything.
        channel_sum2: Sum over tokens of x^2 per feature, shape (..., d), or None if not taken.
        block_scales: How many blocks have a scale of each biased float32 exponent, so that
            quantiles over blocks merge exactly; shape (..., 256), or None for one scale per tensor.
        exponents: How many finite non-zero elements have each biased float32 exponent, shape
            (..., 256), or None if not taken.
    """

    numel: Array
    observations: Array
    nonfinite: Array
    zeros: Array
    sum2: Array
    sum4: Array
    amax: Array
    min_nonzero: Array
    sequence_kurtosis: Array
    sequences: Array
    flushed: Array
    subnormal: Array
    overflow: Array
    error2: Array
    headroom_log2: Array
    scale_log2: Array
    scale_log2_max: Array
    amax_rank: Array
    quantized: np.ndarray[Any, np.dtype[np.bool_]]
    channel_sum2: Array | None = None
    block_scales: Array | None = None
    exponents: Array | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...] = (), *, quantized: bool = False) -> Self:
        """Neutral element of `merge`."""
        values = {k: np.full(shape, _IDENTITY[how]) for k, how in FIELD_REDUCTIONS.items()}
        return cls(
            **values,
            amax_rank=np.full(shape, -1.0),
            quantized=np.full(shape, quantized),
            channel_sum2=None,
        )

    def merge(self, other: Self) -> Self:
        """Sums of both tensors together.

        Counts and extremes are exact; sums differ from one pass by float64 rounding only.
        Channel sums add up (both saw the same features over different tokens).

        Raises:
            ValueError: The channel vectors differ in length.
        """
        combine = {"sum": np.add, "max": np.fmax, "min": np.fmin}
        merged: dict[str, Any] = {
            name: combine[how](getattr(self, name), getattr(other, name))
            for name, how in FIELD_REDUCTIONS.items()
        }
        # The first of two equal extremes keeps its rank, so that a merge in rank order is stable.
        merged["amax_rank"] = np.where(other.amax > self.amax, other.amax_rank, self.amax_rank)
        merged["quantized"] = self.quantized | other.quantized
        merged["channel_sum2"] = _merge_channels(self.channel_sum2, other.channel_sum2)
        merged["block_scales"] = _merge_counts(self.block_scales, other.block_scales)
        merged["exponents"] = _merge_counts(self.exponents, other.exponents)
        return type(self)(**merged)

    def concatenate_features(self, other: Self) -> Self:
        """As `merge`, for two shards that hold different features of the same tokens."""
        merged = self.merge(_without_channels(other)) if other.channel_sum2 is not None else None
        if merged is None or self.channel_sum2 is None or other.channel_sum2 is None:
            return self.merge(other)
        channels = np.concatenate([self.channel_sum2, other.channel_sum2], axis=-1)
        values = {f.name: getattr(merged, f.name) for f in fields(merged)}
        return type(self)(**(values | {"channel_sum2": channels}))

    def statistics(self, *, what_if: Any = False) -> dict[str, np.ma.MaskedArray[Any, Any]]:
        """The statistics of a record; masked where not measured or undefined.

        Args:
            what_if: Which tensors stand there for a format that the run does not use (one truth
                value, or one per tensor): of these only what depends on the format is shown.

        Keys: numel, observations and all of `STATISTICS` but mu.
        Formulas, x finite, N = numel, M the format's largest value, s the scale in force:

        - rms = sqrt(sum2 / N); kurtosis = N sum4 / sum2^2 (about zero, Gaussian = 3)
        - kurtosis_sequence_mean = mean over sequences of the same ratio (FOG's published value)
        - channel_kurtosis = d sum c_j^2 / (sum c_j)^2 (He et al. 2405.19279; no outlier = 1)
        - underflow_ratio = flushed / N (Transformer Engine's percentage divided by 100)
        - subnormal_ratio, overflow_ratio = their counts / N
        - headroom_log2 = log2(M / (amax s)); sqnr_db = 10 log10(sum2 / error2), exact = Infinity
        - scale_log2_p01, _p50, _p99: quantiles over blocks with a scale of floor(log2 s): the
          smallest value that at least this share of the blocks does not pass
        """
        return {
            name: np.ma.MaskedArray(values, mask=~valid)
            for name, (values, valid) in self.columns(what_if=what_if).items()
        }

    def columns(self, *, what_if: Any = False) -> dict[str, tuple[Array, Any]]:
        """As `statistics`: values, and where they are valid. Masked arrays are slow to make."""
        some = self.numel > 0
        power = some & (self.sum2 > 0)
        cast = some & self.quantized
        # Of some tensors only the extremes are known, and not a single element.
        extreme = some | (self.amax > -np.inf)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            columns = {
                "numel": _masked(self.numel, np.ones_like(some)),
                "observations": _masked(self.observations, np.ones_like(some)),
                "amax": _masked(self.amax, extreme),
                "amax_rank": _masked(self.amax_rank, extreme & (self.amax_rank >= 0)),
                "rms": _masked(np.sqrt(self.sum2 / self.numel), some),
                "kurtosis": _masked(self.numel * self.sum4 / self.sum2**2, power),
                "kurtosis_sequence_mean": _masked(
                    self.sequence_kurtosis / self.sequences, self.sequences > 0
                ),
                "underflow_ratio": _masked(self.flushed / self.numel, cast),
                "subnormal_ratio": _masked(self.subnormal / self.numel, cast),
                "overflow_ratio": _masked(self.overflow / self.numel, cast),
                "headroom_log2": _masked(
                    self.headroom_log2, self.quantized & np.isfinite(self.headroom_log2)
                ),
                "sqnr_db": _masked(
                    10 * np.log10(self.sum2 / self.error2), cast & power & ~np.isnan(self.error2)
                ),
                "scale_log2": _masked(
                    self.scale_log2, self.quantized & np.isfinite(self.scale_log2)
                ),
                "scale_log2_max": _masked(
                    self.scale_log2_max, self.quantized & np.isfinite(self.scale_log2_max)
                ),
                "zero_ratio": _masked(self.zeros / self.numel, some),
                "nonfinite_count": _masked(self.nonfinite, np.ones_like(some)),
                "min_nonzero": _masked(self.min_nonzero, np.isfinite(self.min_nonzero)),
            }
        columns |= _channel_statistics(self.channel_sum2, some)
        columns |= _scale_quantiles(self.block_scales, self.quantized)
        if np.any(what_if):
            shown = ~np.asarray(what_if)
            for name in _FORMAT_INDEPENDENT:
                values, valid = columns[name]
                columns[name] = values, valid & shown
        return columns


def _masked(values: Array, valid: Any) -> tuple[Array, Any]:
    return np.asarray(values), np.asarray(valid)


def _merge_channels(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"channel sums over {a.shape[-1]} and {b.shape[-1]} features do not add up"
        )
    return a + b


def _merge_counts(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _without_channels(sums: TensorSums) -> Any:
    values = {f.name: getattr(sums, f.name) for f in fields(sums)}
    return type(sums)(**(values | {"channel_sum2": None}))


def _channel_statistics(channels: Array | None, some: Any) -> dict[str, tuple[Array, Any]]:
    names = ("channel_kurtosis", "top_channel", "top_channel_share")
    if channels is None or channels.shape[-1] == 0:
        return {name: _masked(np.zeros(np.shape(some)), np.zeros_like(some)) for name in names}
    total = channels.sum(axis=-1)
    valid = some & (total > 0)
    safe = np.where(total > 0, total, 1.0)
    share = channels / safe[..., None]
    values = (
        channels.shape[-1] * np.square(share).sum(axis=-1),
        channels.argmax(axis=-1).astype(np.float64),
        share.max(axis=-1),
    )
    return {name: _masked(value, valid) for name, value in zip(names, values, strict=True)}


def _scale_quantiles(counts: Array | None, quantized: Any) -> dict[str, tuple[Array, Any]]:
    if counts is None or counts.shape[-1] == 0:
        none = np.zeros_like(quantized)
        return {name: _masked(np.zeros(np.shape(quantized)), none) for name in _QUANTILES}
    below = counts.cumsum(axis=-1)
    total = below[..., -1]
    values = {}
    for name, share in _QUANTILES.items():
        # A product like 0.01 x 700 may round to just above the whole number that it is.
        reached = below >= np.maximum(np.ceil(share * total - 1e-6), 1.0)[..., None]
        exponent = reached.argmax(axis=-1).astype(np.float64) - _BIAS
        values[name] = _masked(exponent, quantized & (total > 0))
    return values
