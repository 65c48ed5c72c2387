"""What-if rows: what other formats would have done, and nothing that no format enters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from foreshock.monitor.blocks import block_sums
from foreshock.monitor.record import FIELD_REDUCTIONS, STATISTICS, TensorSums
from foreshock.monitor.statistics import packed_sums
from foreshock.monitor.whatif import WHAT_IF_FORMATS, known_formats, what_if_rows

ALL = ["e4m3", "e5m2", "mxfp8", "block128", "nvfp4"]
DEPENDENT = {
    "underflow_ratio",
    "subnormal_ratio",
    "overflow_ratio",
    "headroom_log2",
    "sqnr_db",
    "scale_log2",
    "scale_log2_max",
}
QUANTILES = {"scale_log2_p01", "scale_log2_p50", "scale_log2_p99"}


def tensor() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(130, 200, generator=generator)
    return x * torch.exp(3 * torch.randn(1, 200, generator=generator))


def as_sums(row: torch.Tensor, scales: torch.Tensor | None) -> TensorSums:
    values: dict[str, Any] = {
        name: value.numpy() for name, value in zip(FIELD_REDUCTIONS, row.unbind(0), strict=True)
    }
    return TensorSums(
        **values,
        amax_rank=np.zeros(row.shape[1:]),
        quantized=np.ones(row.shape[1:], dtype=bool),
        block_scales=None if scales is None else scales.numpy(),
    )


def shown(sums: TensorSums, *, what_if: bool) -> dict[str, float]:
    columns = sums.statistics(what_if=what_if)
    return {name: float(v) for name, v in columns.items() if not np.ma.getmaskarray(v).all()}


def test_the_users_words_are_the_records_names() -> None:
    assert list(WHAT_IF_FORMATS) == ALL
    found = [
        (format, granularity) for format, granularity, _, _ in what_if_rows(tensor(), "x", ALL)
    ]
    assert found == [
        ("e4m3", "tensor"),
        ("e5m2", "tensor"),
        ("mxfp8_e4m3", "block"),
        ("block128_e4m3", "block"),
        ("nvfp4", "block"),
    ]
    assert what_if_rows(tensor(), "input", []) == []
    assert known_formats(["nvfp4", "e4m3", "nvfp4"]) == ("nvfp4", "e4m3")


def test_unknown_words_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'fp8'; known formats: {', '.join(ALL)}"):
        what_if_rows(tensor(), "input", ["e4m3", "fp8"])
    with pytest.raises(TypeError, match=r"such as \['e4m3'\]"):
        known_formats("e4m3")


def test_only_what_depends_on_the_format_is_shown() -> None:
    for _, granularity, row, scales in what_if_rows(tensor(), "input", ALL):
        quantiles = QUANTILES if granularity == "block" else set()
        names = set(shown(as_sums(row, scales), what_if=True))
        assert names == {"numel", "observations"} | DEPENDENT | quantiles
        assert names - {"numel", "observations"} <= set(STATISTICS)
        assert {"rms", "amax", "kurtosis"} <= set(shown(as_sums(row, scales), what_if=False))


def test_the_mask_is_per_tensor() -> None:
    (_, _, row, _), *_ = what_if_rows(tensor(), "input", ["e4m3"])
    twice = torch.stack([row, row], dim=1)
    columns = as_sums(twice, None).statistics(what_if=np.array([False, True]))
    assert np.ma.getmaskarray(columns["rms"]).tolist() == [False, True]
    assert np.ma.getmaskarray(columns["sqnr_db"]).tolist() == [False, False]


def test_finer_scales_lose_less() -> None:
    noise = {
        format: shown(as_sums(row, scales), what_if=True)["sqnr_db"]
        for format, _, row, scales in what_if_rows(tensor(), "input", ALL)
    }
    assert noise["nvfp4"] < noise["e4m3"]
    assert noise["e5m2"] < noise["mxfp8_e4m3"]


def test_weights_have_square_blocks() -> None:
    x = tensor()
    for role, square in (("weight", True), ("input", False)):
        ((_, _, row, scales),) = what_if_rows(x, role, ["block128"])
        expected = block_sums(x, format="block128_e4m3", weight=square)
        assert torch.equal(row, expected[0])
        assert scales is not None
        assert scales.sum() == (2 * 2 if square else 130 * 2)


def test_known_sums_save_a_pass_and_change_nothing() -> None:
    x = tensor()
    known = packed_sums(x, format="e4m3", scale=torch.tensor(7.0))[0]
    pairs = zip(
        what_if_rows(x, "input", ALL),
        what_if_rows(x, "input", ALL, independent=known),
        strict=True,
    )
    for (*_, alone, _), (*_, given, _) in pairs:
        torch.testing.assert_close(alone, given, rtol=1e-12, atol=0)


def test_quantiles_over_blocks() -> None:
    # 100 blocks of 32: one of them 2^40 times as large, one 2^40 times as small.
    x = torch.ones(100, 32)
    x[3], x[4] = 2.0**40, 2.0**-40
    ((_, _, row, scales),) = what_if_rows(x, "input", ["mxfp8"])
    found = shown(as_sums(row, scales), what_if=True)
    # 448 = 1.75 x 2^8, so a block of ones has s = 2^8.
    assert found["scale_log2"] == found["scale_log2_p01"] == 8.0 - 40
    assert (found["scale_log2_p50"], found["scale_log2_p99"]) == (8.0, 8.0)
    assert found["scale_log2_max"] == 8.0 + 40
    assert math.isclose(found["headroom_log2"], math.log2(1.75))
