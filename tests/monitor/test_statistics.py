"""Device sums against float64 references and values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreshock.monitor.statistics as statistics_module
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import FIELD_REDUCTIONS, TensorSums
from foreshock.monitor.statistics import SUM_FIELDS, packed_sums, tensor_sums

CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
COUNTS = ("numel", "nonfinite", "zeros", "flushed", "subnormal", "overflow", "sequences")


def statistics_of(
    x: torch.Tensor, *, format: str = "e4m3", scale: float | None = 1.0
) -> dict[str, float | None]:
    """The statistics of a record, None where masked."""
    in_force = None if scale is None else torch.tensor(scale)
    sums = tensor_sums(x, format=format, scale=in_force)
    values = {name: value.numpy() for name, value in sums.items()}
    quantized = np.array(FORMATS[format].scaled)
    columns = TensorSums(**values, amax_rank=np.array(-1.0), quantized=quantized).statistics()
    return {k: None if np.ma.getmaskarray(v).item() else float(v.data) for k, v in columns.items()}


def reference(x: torch.Tensor, format: str, scale: float) -> dict[str, float]:
    """The definitions, in float64, with the hardware type's own cast."""
    number_format = FORMATS[format]
    x64 = x.double().numpy()
    finite = np.isfinite(x64)
    v = x64[finite]
    scaled = torch.tensor(v).float() * torch.tensor(scale)
    largest = number_format.largest
    q = scaled.clamp(-largest, largest).to(CASTS[format]).double().numpy()
    rows = [np.where(np.isfinite(row), row, 0.0) for row in x64.reshape(-1, *x64.shape[-2:])]
    power = [(row**2).sum() for row in rows]
    sizes = finite.reshape(-1, *x64.shape[-2:]).sum((1, 2))
    each = [
        n * (row**4).sum() / p**2 for n, row, p in zip(sizes, rows, power, strict=True) if p > 0
    ]
    return {
        "numel": float(finite.sum()),
        "observations": 1.0,
        "nonfinite": float((~finite).sum()),
        "zeros": float((v == 0).sum()),
        "sum2": (v**2).sum(),
        "sum4": (v**4).sum(),
        "amax": np.abs(v).max(initial=-math.inf),
        "min_nonzero": np.abs(v[v != 0]).min(initial=math.inf),
        "sequence_kurtosis": float(sum(each)),
        "sequences": float(len(each)),
        "flushed": float(((v != 0) & (q == 0)).sum()),
        "subnormal": float(
            ((v != 0) & (scaled.abs().numpy() < number_format.smallest_normal)).sum()
        ),
        "overflow": float((np.abs(v) * scale > largest).sum()),
        "error2": ((q / scale - v) ** 2).sum(),
    }


def assert_sums(x: torch.Tensor, format: str, scale: float) -> None:
    sums = tensor_sums(x, format=format, scale=torch.tensor(scale))
    expected = reference(x, format, scale)
    # Products with the scale are rounded to float32, as the hardware's are.
    noise = 2.0**-22 * math.sqrt(expected["sum2"])
    for name, value in expected.items():
        got = float(sums[name])
        if name in (*COUNTS, "amax", "min_nonzero", "observations"):
            assert got == value, name
        elif name == "error2":
            np.testing.assert_allclose(math.sqrt(got), math.sqrt(value), rtol=2e-6, atol=noise)
        else:
            np.testing.assert_allclose(got, value, rtol=2e-6, err_msg=name)
    channels = np.nan_to_num(x.double().numpy(), nan=0, posinf=0, neginf=0) ** 2
    total = channels.reshape(-1, x.shape[-1]).sum(0)
    np.testing.assert_allclose(sums["channel_sum2"], total, rtol=2e-6, atol=1e-13 * total.sum())


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """(batch, tokens, features) with widely spread magnitudes, zeros and non-finite values."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, centre = draw(st.sampled_from((0.0, 3.0, 12.0))), draw(st.integers(-60, 60))
    x = generator.standard_normal(shape) * np.exp2(
        centre + spread * generator.standard_normal(shape)
    )
    for value in draw(st.lists(st.sampled_from((0.0, -0.0, math.nan, math.inf, -math.inf)))):
        x.flat[generator.integers(x.size)] = value
    return torch.from_numpy(x).to(draw(st.sampled_from((torch.float32, torch.bfloat16))))


@given(x=tensors(), format=st.sampled_from(sorted(CASTS)), exponent=st.integers(-60, 60))
@settings(deadline=None, max_examples=150)
def test_sums_agree_with_float64(x: torch.Tensor, format: str, exponent: int) -> None:
    assert_sums(x, format, 1.37 * 2.0**exponent)


@given(x=tensors(), format=st.sampled_from(sorted(CASTS)))
@settings(deadline=None, max_examples=50)
def test_current_scaling_never_overflows(x: torch.Tensor, format: str) -> None:
    sums = tensor_sums(x, format=format, scale=None)
    assert float(sums["overflow"]) == 0
    if float(sums["amax"]) > 0:
        assert float(sums["headroom_log2"]) == pytest.approx(0, abs=1e-6)


@given(x=tensors(), y=tensors())
@settings(deadline=None, max_examples=50)
def test_merged_micro_batches_equal_one_pass(x: torch.Tensor, y: torch.Tensor) -> None:
    features = min(x.shape[-1], y.shape[-1])
    tokens = min(x.shape[-2], y.shape[-2])
    x, y = (t[:, :tokens, :features].float() for t in (x, y))
    scale = torch.tensor(0.5)
    both = tensor_sums(torch.cat([x, y]), format="e4m3", scale=scale)
    parts = [as_sums(tensor_sums(t, format="e4m3", scale=scale)) for t in (x, y)]
    merged = parts[0].merge(parts[1])
    for name in FIELD_REDUCTIONS:
        if name != "observations":
            np.testing.assert_allclose(getattr(merged, name), both[name], rtol=2e-6, err_msg=name)


def as_sums(sums: dict[str, torch.Tensor]) -> TensorSums:
    values: dict[str, Any] = {name: value.numpy() for name, value in sums.items()}
    return TensorSums(**values, amax_rank=np.array(0.0), quantized=np.array(True))


@given(x=tensors())
@settings(deadline=None, max_examples=25)
def test_a_stack_gives_each_models_own_sums(x: torch.Tensor) -> None:
    scales = torch.tensor([0.25, 3.0])
    stack = tensor_sums(torch.stack([x, 2 * x]), format="e5m2", scale=scales, lead=1)
    for index, single in enumerate((x, 2 * x)):
        alone = tensor_sums(single, format="e5m2", scale=scales[index])
        for name, value in alone.items():
            torch.testing.assert_close(stack[name][index], value, rtol=0, atol=0, msg=name)


def test_the_fields_are_those_of_the_record() -> None:
    sums = tensor_sums(torch.ones(2, 3), format="e4m3", scale=None)
    assert set(sums) == {*FIELD_REDUCTIONS, "channel_sum2"}
    assert all(value.dtype == torch.float64 for value in sums.values())
    assert packed_sums(torch.ones(2, 3), format="e4m3", scale=None)[0].shape == (len(SUM_FIELDS),)


def test_values_by_hand() -> None:
    # 0.3 rounds to 0.3125 and 500 saturates at 448; the rest is exact in E4M3.
    x = torch.tensor([[[1.0, -2.0], [0.0, 0.3]], [[500.0, 4.0], [-0.0, 2.0**-11]]])
    got = statistics_of(x)
    assert got["numel"] == 8
    assert got["zero_ratio"] == 2 / 8
    assert got["amax"] == 500
    assert got["min_nonzero"] == 2.0**-11
    assert got["underflow_ratio"] == 1 / 8
    assert got["subnormal_ratio"] == 1 / 8
    assert got["overflow_ratio"] == 1 / 8
    assert got["headroom_log2"] == pytest.approx(math.log2(448 / 500))
    sum2 = 1 + 4 + 0.3**2 + 500**2 + 16 + 2.0**-22
    error2 = 0.0125**2 + 52**2 + 2.0**-22
    assert got["sqnr_db"] == pytest.approx(10 * math.log10(sum2 / error2), rel=1e-6)
    assert got["rms"] == pytest.approx(math.sqrt(sum2 / 8), rel=1e-6)
    first = 4 * (1 + 16 + 0.3**4) / (5 + 0.3**2) ** 2
    second = 4 * (500**4 + 4**4) / (500**2 + 16) ** 2
    assert got["kurtosis_sequence_mean"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert got["top_channel"] == 0


@pytest.mark.parametrize(("format", "threshold"), [("e4m3", 2.0**-10), ("e5m2", 2.0**-17)])
@pytest.mark.parametrize("scale", [1.0, 2.0**12, 2.0**-20])
def test_underflow_at_the_threshold(format: str, threshold: float, scale: float) -> None:
    at = np.float32(threshold / scale)
    above = np.nextafter(at, np.float32(1e9))
    x = torch.from_numpy(np.array([at, -at, above, 0.0, -0.0], np.float32))
    assert statistics_of(x, format=format, scale=scale)["underflow_ratio"] == 2 / 5


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [1.0, 2.0**9, 2.0**-30])
def test_overflow_at_the_threshold(format: str, scale: float) -> None:
    at = np.float32(FORMATS[format].largest / scale)
    above = np.nextafter(at, np.float32(math.inf))
    got = statistics_of(
        torch.from_numpy(np.array([at, above], np.float32)), format=format, scale=scale
    )
    assert got["overflow_ratio"] == 1 / 2


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_rounding_is_that_of_the_hardware_type(format: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(CASTS[format]).float()
    values = torch.unique(codes[codes.isfinite()].abs())
    middles = (values[1:] + values[:-1]) / 2
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) * 12 - 8
    x = torch.cat(
        [values, middles, middles.nextafter(values[1:]), middles.nextafter(values[:-1]), 10**noise]
    )
    largest = FORMATS[format].largest
    for magnitude in torch.split(x.clamp_max(largest), 64):
        rounded = magnitude.clone()
        statistics_module._round_to(
            rounded, FORMATS[format], statistics_module._SINGLE, torch.empty_like(rounded)
        )
        torch.testing.assert_close(rounded, magnitude.to(CASTS[format]).float(), rtol=0, atol=0)


@pytest.mark.parametrize("exponent", [-100, -30, 0, 30, 99])
def test_fourth_powers_survive_any_magnitude(exponent: int) -> None:
    x = torch.tensor([[[1.0, -1.0, 3.0]]]) * 2.0**exponent
    got = statistics_of(x, scale=None)
    assert got["kurtosis"] == pytest.approx(3 * 83 / 121, rel=1e-6)
    assert got["kurtosis_sequence_mean"] == pytest.approx(3 * 83 / 121, rel=1e-6)


def test_a_quiet_sequence_beside_a_loud_one_keeps_its_kurtosis() -> None:
    x = torch.stack([torch.eye(4) * 1e15, torch.eye(4) * 1e-15])
    assert statistics_of(x)["kurtosis_sequence_mean"] == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 0, 4)])
def test_empty_tensors_measure_nothing(shape: tuple[int, ...]) -> None:
    got = statistics_of(torch.empty(shape))
    assert got["numel"] == 0
    measured = {name for name, value in got.items() if value is not None}
    assert measured == {"numel", "observations", "nonfinite_count"}


def test_nothing_finite_is_counted_and_measures_nothing_else() -> None:
    got = statistics_of(torch.tensor([math.nan, math.inf, -math.inf]))
    assert got["nonfinite_count"] == 3
    assert got["amax"] is None
    assert got["kurtosis"] is None


def test_all_zeros() -> None:
    got = statistics_of(torch.zeros(2, 3, 4), scale=None)
    assert got["zero_ratio"] == 1
    assert got["amax"] == 0
    assert got["scale_log2"] == 0
    assert got["headroom_log2"] is None
    assert got["sqnr_db"] is None
    assert got["min_nonzero"] is None


def test_an_exact_cast_has_infinite_sqnr() -> None:
    assert statistics_of(torch.tensor([[1.0, 0.5], [-448.0, 0.0]]))["sqnr_db"] == math.inf


def test_unscaled_formats_say_nothing_about_the_cast() -> None:
    got = statistics_of(torch.randn(2, 3, 4).bfloat16(), format="bf16", scale=None)
    assert got["kurtosis"] is not None
    for name in ("underflow_ratio", "overflow_ratio", "headroom_log2", "sqnr_db", "scale_log2"):
        assert got[name] is None


def test_a_weight_has_no_sequences() -> None:
    assert statistics_of(torch.randn(5, 4))["kurtosis_sequence_mean"] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_types(dtype: torch.dtype) -> None:
    assert_sums(torch.tensor([[[1.0, 2.0, -0.25]]], dtype=dtype), "e4m3", 1.0)


def test_float64_beyond_float32() -> None:
    got = tensor_sums(torch.tensor([1e60, 1e-60], dtype=torch.float64), format="fp32", scale=None)
    assert float(got["amax"]) == 1e60
    assert float(got["min_nonzero"]) == 1e-60
    assert float(got["nonfinite"]) == 0


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(3))
    whole = tensor_sums(x, format="e4m3", scale=None)
    monkeypatch.setattr(statistics_module, "_CACHED_ELEMENTS", 100)
    pieces = tensor_sums(x, format="e4m3", scale=None)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-6, atol=0, msg=name)


def test_strided_and_broadcast_inputs() -> None:
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(4))
    strided = x.transpose(0, 1)
    expected = tensor_sums(strided.contiguous(), format="e4m3", scale=None)
    for name, value in tensor_sums(strided, format="e4m3", scale=None).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    broadcast = tensor_sums(torch.ones(()).expand(2, 3, 4), format="e4m3", scale=None)
    assert float(broadcast["sum2"]) == 24


def test_the_input_is_left_alone() -> None:
    x = torch.tensor([math.nan, -1.0, 3.0], requires_grad=True)
    before = x.detach().clone()
    tensor_sums(x, format="e4m3", scale=torch.tensor(2.0))
    torch.testing.assert_close(x.detach(), before, equal_nan=True)


@pytest.mark.parametrize(
    ("x", "format", "lead", "message"),
    [
        (torch.ones(2), "fp7", 0, "unknown format"),
        (torch.ones(2), "nvfp4", 0, "scale per block"),
        (torch.ones(2, dtype=torch.int32), "e4m3", 0, "floating"),
        (torch.ones(2), "e4m3", 2, "lead is 2"),
    ],
)
def test_wrong_use_is_refused(x: torch.Tensor, format: str, lead: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tensor_sums(x, format=format, scale=None, lead=lead)
