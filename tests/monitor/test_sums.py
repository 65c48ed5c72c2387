"""Merging sums gives the statistics of the concatenated tensor, at any magnitude."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foreshock.monitor.formats import format_named
from foreshock.monitor.record import FIELD_REDUCTIONS, STATISTICS, TensorSums

FEATURES = 4
SCALE = 2.0
E4M3 = format_named("e4m3")

ELEMENTS = (
    st.floats(1e-30, 1e30)
    | st.floats(-1e30, -1e-30)
    | st.sampled_from([0.0, -0.0, 1e-30, -1e-30, np.nan, np.inf, -np.inf, 224.0, 224.5, 2.0**-11])
)
TENSORS = hnp.arrays(np.float64, st.tuples(st.integers(0, 6), st.just(FEATURES)), elements=ELEMENTS)


def cast(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A stand-in for an FP8 cast: saturate, flush, else keep: exact arithmetic for the tests."""
    scaled = np.clip(x * SCALE, -E4M3.largest, E4M3.largest)
    return np.where(np.abs(scaled) <= E4M3.flush_threshold, 0.0, scaled)


def sums_of(tensor: np.ndarray[Any, Any], rank: int = 0) -> TensorSums:
    """Sums by their definitions, one tensor = one sequence."""
    finite = np.isfinite(tensor)
    x = tensor[finite]
    a = np.abs(x)
    scaled = a * SCALE
    sum2 = float(np.sum(x**2))
    sequences = float(sum2 > 0)
    values = {
        "numel": x.size,
        "observations": 1,
        "nonfinite": tensor.size - x.size,
        "zeros": np.sum(x == 0),
        "sum2": sum2,
        "sum4": np.sum(x**4),
        "amax": a.max(initial=-np.inf),
        "min_nonzero": a[a > 0].min(initial=np.inf),
        "sequence_kurtosis": x.size * np.sum(x**4) / sum2**2 if sequences else 0.0,
        "sequences": sequences,
        "flushed": np.sum((x != 0) & (cast(x) == 0)),
        "subnormal": np.sum((scaled > 0) & (scaled < E4M3.smallest_normal)),
        "overflow": np.sum(scaled > E4M3.largest),
        "error2": np.sum((cast(x) / SCALE - x) ** 2),
        "headroom_log2": np.log2(E4M3.largest / (a.max() * SCALE)) if np.any(a > 0) else np.inf,
        "scale_log2": np.log2(SCALE),
        "scale_log2_max": np.log2(SCALE),
    }
    assert set(values) == set(FIELD_REDUCTIONS)
    return TensorSums(
        **{k: np.asarray(float(v)) for k, v in values.items()},
        amax_rank=np.asarray(float(rank)),
        quantized=np.asarray(True),
        channel_sum2=np.sum(np.where(finite, tensor, 0.0) ** 2, axis=0),
    )


def assert_close(a: TensorSums, b: TensorSums) -> None:
    one, other = a.statistics(), b.statistics()
    for name, values in one.items():
        if name == "top_channel":  # equal shares may be told apart by rounding
            continue
        assert np.array_equal(np.ma.getmaskarray(values), np.ma.getmaskarray(other[name])), name
        # A logarithm of nearly 1 has no relative precision.
        least = 1e-9 if name == "sqnr_db" else 0.0
        np.testing.assert_allclose(
            values.filled(0), other[name].filled(0), rtol=1e-9, atol=least, err_msg=name
        )


@given(TENSORS, TENSORS)
def test_merge_equals_one_pass(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    merged = sums_of(a).merge(sums_of(b)).statistics()
    whole = sums_of(np.concatenate([a, b])).statistics()
    per_sequence = {"kurtosis_sequence_mean", "observations", "top_channel"}
    for name in set(whole) - per_sequence:
        assert np.array_equal(np.ma.getmaskarray(merged[name]), np.ma.getmaskarray(whole[name])), (
            name
        )
        # Decibels near 0 are differences of nearly equal sums.
        np.testing.assert_allclose(
            merged[name].filled(0), whole[name].filled(0), rtol=1e-9, atol=1e-12, err_msg=name
        )
    assert int(merged["observations"]) == 2


@given(TENSORS, TENSORS, TENSORS)
def test_merge_is_associative_and_has_a_neutral_element(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], c: np.ndarray[Any, Any]
) -> None:
    x, y, z = (sums_of(t, rank) for rank, t in enumerate((a, b, c)))
    assert_close(x.merge(y).merge(z), x.merge(y.merge(z)))
    assert_close(TensorSums.empty(quantized=True).merge(x), x)
    assert_close(x.merge(TensorSums.empty(quantized=True)), x)


@given(TENSORS, TENSORS)
def test_counts_and_extremes_merge_exactly(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
) -> None:
    merged, whole = sums_of(a).merge(sums_of(b)), sums_of(np.concatenate([a, b]))
    for name in ("numel", "nonfinite", "zeros", "amax", "min_nonzero", "flushed", "overflow"):
        assert getattr(merged, name) == getattr(whole, name), name


@given(TENSORS)
def test_sequence_mean_is_the_mean_of_the_sequences(a: np.ndarray[Any, Any]) -> None:
    b = np.full((2, FEATURES), 3.0)
    one = sums_of(a).statistics()["kurtosis_sequence_mean"]
    assume(not np.ma.getmaskarray(one).any())
    merged = sums_of(a).merge(sums_of(b)).statistics()["kurtosis_sequence_mean"]
    assert float(merged) == pytest.approx((float(one) + 1.0) / 2)


@given(TENSORS, st.integers(1, FEATURES - 1))
def test_feature_shards_concatenate(a: np.ndarray[Any, Any], cut: int) -> None:
    whole = sums_of(a).statistics()
    shards = sums_of(a[:, :cut]).concatenate_features(sums_of(a[:, cut:])).statistics()
    for name in ("channel_kurtosis", "top_channel_share", "kurtosis", "amax"):
        np.testing.assert_allclose(
            shards[name].filled(-1), whole[name].filled(-1), rtol=1e-9, err_msg=name
        )


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_fourth_powers_survive(magnitude: float) -> None:
    x = np.array([[1.0, -1.0, 2.0, 0.0]]) * magnitude
    statistics = sums_of(x).statistics()
    assert float(statistics["kurtosis"]) == pytest.approx(4 * 18 / 36)
    assert float(statistics["rms"]) == pytest.approx(magnitude * np.sqrt(6 / 4))


def test_one_hot_channel_by_hand() -> None:
    x = np.zeros((5, FEATURES))
    x[:, 2] = 10.0
    statistics = sums_of(x).statistics()
    assert float(statistics["channel_kurtosis"]) == FEATURES
    assert int(statistics["top_channel"]) == 2
    assert float(statistics["top_channel_share"]) == 1.0
    assert float(statistics["zero_ratio"]) == 0.75
    assert float(statistics["headroom_log2"]) == pytest.approx(np.log2(448 / 20))
    assert float(statistics["sqnr_db"]) == np.inf  # the stand-in cast is exact here


def test_nothing_measured_is_masked_not_zero() -> None:
    for sums in (sums_of(np.full((2, FEATURES), np.nan)), TensorSums.empty()):
        statistics = sums.statistics()
        undefined = set(statistics) - {"numel", "observations", "nonfinite_count"}
        shown = {n for n in undefined if not np.ma.getmaskarray(statistics[n]).all()}
        assert shown <= {"amax_rank", "scale_log2", "scale_log2_max"}


def test_all_zero_tensor() -> None:
    statistics = sums_of(np.zeros((3, FEATURES))).statistics()
    assert float(statistics["amax"]) == 0.0
    assert float(statistics["underflow_ratio"]) == 0.0
    for name in ("kurtosis", "headroom_log2", "sqnr_db", "channel_kurtosis", "min_nonzero"):
        assert np.ma.getmaskarray(statistics[name]).all(), name


def test_unscaled_formats_have_no_cast_statistics() -> None:
    x = sums_of(np.ones((1, FEATURES)))
    values = {name: getattr(x, name) for name in FIELD_REDUCTIONS}
    plain = TensorSums(**values, amax_rank=x.amax_rank, quantized=np.asarray(False))
    for name in ("underflow_ratio", "overflow_ratio", "headroom_log2", "sqnr_db", "scale_log2"):
        assert np.ma.getmaskarray(plain.statistics()[name]).all(), name


def test_a_stack_of_tensors_is_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    tensors = rng.normal(size=(3, 5, FEATURES))
    alone = [sums_of(t) for t in tensors]
    values: dict[str, Any] = {
        name: np.stack([getattr(s, name) for s in alone]) for name in FIELD_REDUCTIONS
    }
    stack = TensorSums(
        **values,
        amax_rank=np.zeros(3),
        quantized=np.ones(3, dtype=bool),
        channel_sum2=np.stack([s.channel_sum2 for s in alone if s.channel_sum2 is not None]),
    )
    for name, column in stack.statistics().items():
        expected = [float(s.statistics()[name].filled(0)) for s in alone]
        np.testing.assert_allclose(column.filled(0), expected)


def test_statistics_cover_the_record() -> None:
    assert set(STATISTICS) - set(sums_of(np.ones((1, FEATURES))).statistics()) == {"mu"}


COUNTS = hnp.arrays(np.float64, 256, elements=st.integers(0, 50).map(float), fill=st.just(0.0))


def with_scales(counts: np.ndarray[Any, Any] | None) -> TensorSums:
    return replace(sums_of(np.ones((1, FEATURES))), block_scales=counts, exponents=counts)


@given(COUNTS, COUNTS)
def test_quantiles_over_blocks_merge_exactly(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]
) -> None:
    merged = with_scales(a).merge(with_scales(b))
    assert merged.exponents is not None
    assert np.array_equal(merged.exponents, a + b)
    found = merged.statistics()
    logs = np.repeat(np.arange(256) - 127, (a + b).astype(int))
    for name, share in (("p01", 0.01), ("p50", 0.5), ("p99", 0.99)):
        value = found[f"scale_log2_{name}"]
        if logs.size:
            assert float(value) == np.sort(logs)[-(-logs.size * round(share * 100) // 100) - 1]
        else:
            assert np.ma.getmaskarray(value).all()


def test_a_quantile_reaches_its_share_and_no_more() -> None:
    counts = np.zeros(256)
    counts[[100, 120, 140]] = 7, 686, 7  # 0.01 x 700 is a little more than 7 in float64
    found = with_scales(counts).statistics()
    assert float(found["scale_log2_p01"]) == 100 - 127
    assert float(found["scale_log2_p99"]) == 120 - 127


def test_without_block_scales_there_are_no_quantiles() -> None:
    counts = np.zeros(256)
    counts[127] = 3
    assert np.ma.getmaskarray(with_scales(None).statistics()["scale_log2_p50"]).all()
    assert with_scales(None).merge(with_scales(counts)).statistics()["scale_log2_p50"] == 0.0
    assert with_scales(counts).merge(with_scales(None)).statistics()["scale_log2_p50"] == 0.0
    unscaled = replace(with_scales(counts), quantized=np.asarray(False))
    assert np.ma.getmaskarray(unscaled.statistics()["scale_log2_p50"]).all()


def test_what_if_hides_what_no_format_enters() -> None:
    sums = sums_of(np.ones((2, FEATURES)))
    shown = {n for n, v in sums.statistics(what_if=True).items() if not np.ma.getmaskarray(v).all()}
    assert shown == {
        "numel",
        "observations",
        "underflow_ratio",
        "subnormal_ratio",
        "overflow_ratio",
        "headroom_log2",
        "sqnr_db",
        "scale_log2",
        "scale_log2_max",
    }


def test_amax_keeps_the_rank_that_holds_it() -> None:
    small, large = sums_of(np.full((1, FEATURES), 1.0), 0), sums_of(np.full((1, FEATURES), 9.0), 5)
    assert int(small.merge(large).statistics()["amax_rank"]) == 5
    assert int(large.merge(small).statistics()["amax_rank"]) == 5
