"""Casts with many scales against references that go block by block in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foreshock.monitor import statistics
from foreshock.monitor.blocks import block_sums, histogram, independent_sums
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.statistics import SUM_FIELDS, packed_sums

Array = np.ndarray[Any, Any]

KINDS = (
    ("mxfp8_e4m3", "block", False),
    ("block128_e4m3", "block", False),
    ("block128_e4m3", "block", True),
    ("nvfp4", "block", False),
    ("e4m3", "row", False),
    ("e5m2", "row", True),
    ("e4m3", "tensor", False),
    ("e5m2", "tensor", False),
)
SIZES = {"mxfp8_e4m3": 32, "block128_e4m3": 128, "nvfp4": 16}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SPECIALS = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 3e38, -(2.0**-126), 448.0, 449.0)


def make(seed: int, shape: tuple[int, ...], spread: float, center: float, odd: float) -> Array:
    """Magnitudes over many powers of two, blocks of zeros, and odd values here and there."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        x = rng.normal(size=shape) * np.exp2(center + spread * rng.normal(size=(*shape[:-1], 1)))
        x = (x * np.exp2(spread * rng.normal(size=shape))).astype(np.float32)
    x[rng.random(shape) < odd] = 0.0
    at = rng.random(shape) < odd / 4
    x[at] = rng.choice(np.array(SPECIALS, dtype=np.float32), size=int(at.sum()))
    if rng.random() < odd:
        x[..., : shape[-1] // 2] = 0.0
    return x


TENSORS = st.builds(
    make,
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 140))
    | st.tuples(st.integers(1, 5), st.integers(1, 300))
    | st.tuples(st.integers(1, 300)),
    st.sampled_from([0.0, 1.0, 4.0, 12.0]),
    st.sampled_from([0.0, -110.0, 100.0, 7.5]),
    st.sampled_from([0.0, 0.2, 0.9]),
)


def blocks(x: Array, format: str, granularity: str, weight: bool) -> Iterator[Array]:
    if granularity == "tensor":
        yield x.reshape(-1)
        return
    width = SIZES.get(format, x.shape[-1])
    square = format == "block128_e4m3" and weight and x.ndim > 1
    height = width if square else 1
    rows = x.shape[-2] if square else 1
    for matrix in x.reshape(-1, rows, x.shape[-1]):
        for top in range(0, rows, height):
            for left in range(0, x.shape[-1], width):
                yield matrix[top : top + height, left : left + width].reshape(-1)


def scale_of(amax: float, whole: float, format: str, granularity: str) -> np.float32 | None:
    """The scale in force, from the definitions; None where a block has none."""
    if amax == 0:
        return np.float32(1.0) if granularity == "tensor" else None
    top = np.float32(np.finfo(np.float32).max)
    one = np.float32(1.0)
    with np.errstate(over="ignore", divide="ignore"):
        if format == "nvfp4":
            factor = min(np.float32(2688.0) / np.float32(whole), top)
            stored = min(np.float32(amax) / np.float32(6.0) * factor, np.float32(448.0))
            as_e4m3 = torch.tensor(stored).to(torch.float8_e4m3fn).float().item()
            if as_e4m3 == 0:
                return None
            return min(one / (np.float32(as_e4m3) * (one / factor)), top)
        if granularity != "block":
            return min(np.float32(FORMATS[format].largest) / np.float32(amax), top)
    power = 127
    while math.ldexp(amax, power) > 448:
        power -= 1
    return np.float32(2.0**power)


def cast(scaled: Array, format: str) -> Array:
    """Saturate, then round: torch's FP8 casts, or the nearest E2M1 number with ties to even."""
    limited = np.clip(scaled, -FORMATS[format].largest, FORMATS[format].largest)
    if format == "nvfp4":
        grid = np.array(E2M1)
        distance = np.abs(np.abs(limited)[:, None].astype(np.float64) - grid)
        nearest = [min((d, k % 2, k) for k, d in enumerate(row))[2] for row in distance.tolist()]
        signed: Array = grid[nearest] * np.sign(limited)
        return signed
    dtype = torch.float8_e5m2 if format == "e5m2" else torch.float8_e4m3fn
    rounded: Array = torch.from_numpy(limited).to(dtype).double().numpy()
    return rounded


def reference(x: Array, format: str, granularity: str, weight: bool) -> dict[str, Any]:
    known = FORMATS[format]
    finite = np.where(np.isfinite(x), x, np.float32(0))
    whole = float(np.abs(finite).max(initial=0))
    found: dict[str, Any] = dict.fromkeys(("flushed", "subnormal", "overflow", "error2"), 0.0)
    rooms, scales = [], []
    for block in blocks(finite, format, granularity, weight):
        amax = float(np.abs(block).max())
        scale = scale_of(amax, whole, format, granularity)
        nonzero = block != 0
        exact = block.astype(np.float64)
        if scale is None:
            found["flushed"] += nonzero.sum()
            found["subnormal"] += nonzero.sum()
            found["error2"] += np.square(exact).sum()
            continue
        scales.append(float(scale))
        if amax:
            rooms.append(math.log2(known.largest / (amax * float(scale))))
        scaled = block * scale
        q = cast(scaled, format)
        found["flushed"] += (nonzero & (q == 0)).sum()
        found["subnormal"] += (nonzero & (np.abs(scaled) < known.smallest_normal)).sum()
        slack = 1 + 2.0**-22
        found["overflow"] += (np.abs(exact * float(scale)) > known.largest * slack).sum()
        found["error2"] += np.square(q / float(scale) - exact).sum()
    found["headroom_log2"] = min(rooms, default=math.inf)
    found["scale_log2"] = math.log2(min(scales)) if scales else math.inf
    found["scale_log2_max"] = math.log2(max(scales)) if scales else -math.inf
    found["exponents"] = np.zeros(256)
    for force in scales:
        found["exponents"][math.frexp(force)[1] - 1 + 127] += 1
    return found


def measured(x: Array, format: str, granularity: str, weight: bool) -> dict[str, Any]:
    row, exponents = block_sums(
        torch.from_numpy(x), format=format, granularity=granularity, weight=weight
    )
    assert row.dtype == exponents.dtype == torch.float64
    named = dict(zip(SUM_FIELDS, row.tolist(), strict=True))
    return named | {"exponents": exponents.numpy()}


@settings(max_examples=120, deadline=None)
@given(TENSORS, st.sampled_from(KINDS))
def test_every_sum_is_the_reference(x: Array, kind: tuple[str, str, bool]) -> None:
    found, wanted = measured(x, *kind), reference(x, *kind)
    if kind[1] == "tensor" and not np.any(np.isfinite(x) & (x != 0)):
        return  # per tensor, s is 1 there: see the test of zeros
    for name in ("flushed", "subnormal", "overflow"):
        assert found[name] == wanted[name], name
    assert np.array_equal(found["exponents"], wanted["exponents"])
    for name in ("headroom_log2", "scale_log2", "scale_log2_max"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-12, abs=1e-12), name
    # Each difference q/s - x is off by a float32 rounding of x; Cauchy-Schwarz bounds the sum.
    error2, rounding = wanted["error2"], 2.0**-22
    bound = 1e-6 * error2 + rounding * math.sqrt(error2 * found["sum2"])
    assert abs(found["error2"] - error2) <= bound + rounding**2 * found["sum2"]


@settings(max_examples=40, deadline=None)
@given(TENSORS, st.sampled_from(KINDS))
def test_what_no_format_enters_is_as_packed_sums_has_it(
    x: Array, kind: tuple[str, str, bool]
) -> None:
    row, _ = block_sums(torch.from_numpy(x), format=kind[0], granularity=kind[1])
    plain = independent_sums(torch.from_numpy(x))
    cut = SUM_FIELDS.index("flushed")
    assert torch.equal(row[:cut], plain[:cut])


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_one_scale_per_tensor_is_as_packed_sums_has_it(format: str) -> None:
    x = torch.from_numpy(make(3, (37, 200), 3.0, 0.0, 0.1))
    ours, _ = block_sums(x, format=format, granularity="tensor")
    theirs, _ = packed_sums(x, format=format, scale=None)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    counts = [SUM_FIELDS.index(name) for name in ("flushed", "subnormal", "overflow")]
    assert torch.equal(ours[counts], theirs[counts])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_are_measured_as_float32(
    dtype: torch.dtype, kind: tuple[str, str, bool]
) -> None:
    x = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    one = block_sums(x, format=kind[0], granularity=kind[1], weight=kind[2])
    other = block_sums(x.float(), format=kind[0], granularity=kind[1], weight=kind[2])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_layouts_change_nothing(
    kind: tuple[str, str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.from_numpy(make(5, (300, 260), 2.0, 0.0, 0.1))
    whole = block_sums(x, format=kind[0], granularity=kind[1], weight=kind[2])
    strided = x.t().contiguous().t()
    monkeypatch.setattr("foreshock.monitor.blocks._CACHED_ELEMENTS", 1000)
    pieces = block_sums(strided, format=kind[0], granularity=kind[1], weight=kind[2])
    torch.testing.assert_close(whole[0], pieces[0], rtol=1e-6, atol=0)
    assert torch.equal(whole[1], pieces[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), ()])
def test_nothing_and_single_numbers(kind: tuple[str, str, bool], shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 3.0)
    row, exponents = block_sums(x, format=kind[0], granularity=kind[1], weight=kind[2])
    named = dict(zip(SUM_FIELDS, row.tolist(), strict=True))
    assert named["numel"] == exponents.sum() == x.numel()
    assert named["flushed"] == named["error2"] == 0.0
    assert (named["scale_log2"] == math.inf) == (x.numel() == 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] != "tensor"])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_blocks_of_zeros_have_no_scale(kind: tuple[str, str, bool], value: float) -> None:
    found = measured(np.full((4, 130), value, dtype=np.float32), *kind)
    assert found["scale_log2"] == found["headroom_log2"] == math.inf
    assert found["scale_log2_max"] == -math.inf
    assert found["exponents"].sum() == found["flushed"] == found["error2"] == 0


def test_the_shared_exponent_is_rounded_up_so_that_nothing_saturates() -> None:
    x = torch.zeros(2, 32)
    x[0, 0] = 448.0
    x[1, 0] = torch.nextafter(torch.tensor(448.0), torch.tensor(449.0))
    row, exponents = block_sums(x, format="mxfp8_e4m3")
    named = dict(zip(SUM_FIELDS, row.tolist(), strict=True))
    assert (named["scale_log2"], named["scale_log2_max"]) == (-1.0, 0.0)
    assert exponents[126:128].tolist() == [1.0, 1.0]
    assert named["overflow"] == named["headroom_log2"] == 0.0


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_conformance_ties_to_zero_flush_and_the_next_number_does_not(format: str) -> None:
    known = FORMATS[format]
    tie = known.flush_threshold
    x = torch.tensor([known.largest, tie, tie * 1.000001, -tie, 0.0, -0.0, math.nan, math.inf])
    row, _ = block_sums(x, format=format, granularity="row")  # M gives the scale 1
    named = dict(zip(SUM_FIELDS, row.tolist(), strict=True))
    assert named["scale_log2"] == 0.0
    assert (named["flushed"], named["subnormal"], named["overflow"]) == (2.0, 3.0, 0.0)
    assert (named["zeros"], named["nonfinite"], named["numel"]) == (2.0, 2.0, 6.0)


@given(st.floats(2.0**-130, 2.0**127, width=32))
@settings(deadline=None)
def test_rounding_is_that_of_torchs_cast_at_any_scale(amax: float) -> None:
    x = torch.linspace(0, 1, 31).mul(amax)
    x = torch.cat([x, torch.tensor([amax])])
    row, _ = block_sums(x, format="mxfp8_e4m3")
    named = dict(zip(SUM_FIELDS, row.tolist(), strict=True))
    scale = torch.tensor(2.0 ** named["scale_log2"])
    q = (x * scale).to(torch.float8_e4m3fn).double() / scale.double()
    error = (q - x.double()).square().sum().item()
    assert named["error2"] == pytest.approx(error, rel=1e-5, abs=1e-12 * amax**2)


@pytest.mark.parametrize(
    ("format", "granularity"),
    [("e4m3", "block"), ("mxfp8_e4m3", "row"), ("nvfp4", "tensor"), ("bf16", "row"), ("e4m3", "x")],
)
def test_what_does_not_go_together_is_refused(format: str, granularity: str) -> None:
    with pytest.raises(ValueError, match=f"{format} by {granularity} is not measured"):
        block_sums(torch.ones(4), format=format, granularity=granularity)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="floating"):
        block_sums(torch.ones(4, dtype=torch.int32), format="nvfp4")


@settings(deadline=None)
@given(TENSORS)
def test_histogram_counts_exponents(x: Array) -> None:
    kept = np.abs(x[np.isfinite(x) & (x != 0)])
    biased = np.maximum(np.frexp(kept.astype(np.float64))[1] - 1 + 127, 0)
    expected = np.bincount(biased, minlength=256)
    assert np.array_equal(histogram(torch.from_numpy(x)).numpy(), expected)


def test_statistics_and_blocks_agree_on_the_order_of_fields() -> None:
    assert len(statistics.SUM_FIELDS) == len(independent_sums(torch.ones(3)))
