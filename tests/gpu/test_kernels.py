"""The kernel against the CPU's definition, on tensors that are easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from foreshock.monitor.record import FIELD_REDUCTIONS
from foreshock.monitor.statistics import SUM_FIELDS, packed_sums
from tests.gpu.devices import DEVICE, INTERPRETED

# It comes with torch's CUDA builds only.
pytest.importorskip("triton")
from foreshock.monitor.kernels import Scratch, accumulate, accumulate_codes

pytestmark = pytest.mark.gpu
INFINITY = float("inf")
# The interpreter needs milliseconds for what a program does to a tile.
LARGE = (9, 2048) if INTERPRETED else (2048, 4096)
ROWS = 8 if INTERPRETED else 64
MANY = 9 if INTERPRETED else 300
COUNTS = (
    "numel", "observations", "nonfinite", "zeros", "sequences", "flushed", "subnormal", "overflow",
    "amax", "min_nonzero",
)  # fmt: skip


@pytest.fixture
def scratch() -> Scratch:
    return Scratch(DEVICE)


def empty_rows(count: int = 2) -> torch.Tensor:
    neutral = {"sum": 0.0, "max": -INFINITY, "min": INFINITY}
    row = [neutral[how] for how in FIELD_REDUCTIONS.values()] + [INFINITY]
    return torch.tensor(row, dtype=torch.float64, device=DEVICE).repeat(count, 1)


def on(enabled: int = 1, micro_batch: int = 0) -> torch.Tensor:
    return torch.tensor([enabled, micro_batch], dtype=torch.int32, device=DEVICE)


def check(x: torch.Tensor, format: str, scale: float | None, scratch: Scratch) -> None:
    rows = empty_rows()
    features = x.shape[-1] if x.ndim else 1
    channels = torch.zeros(features, dtype=torch.float64, device=DEVICE)
    given = None if scale is None else torch.tensor(scale, device=DEVICE)
    accumulate(
        x, rows, 1, format=format, scale=given, control=on(), scratch=scratch, channels=channels
    )
    again = empty_rows()
    accumulate(x, again, 1, format=format, scale=given, control=on(), scratch=scratch)
    cpu = x.detach().cpu()
    want, want_channels = packed_sums(
        cpu.float() if cpu.dtype == torch.float64 else cpu,
        format=format,
        scale=None if scale is None else torch.tensor(scale),
    )
    for have in (rows, again):
        assert torch.equal(have[0], empty_rows()[0]), "another row"
        for name, ours, theirs in zip(SUM_FIELDS, have[1].tolist(), want.tolist(), strict=False):
            if name in COUNTS:
                assert ours == theirs, (name, ours, theirs)
            else:
                # An error is a difference: against the size of what it is an error of.
                least = 1e-13 * float(want[SUM_FIELDS.index("sum2")]) if name == "error2" else 0.0
                assert ours == pytest.approx(theirs, rel=2e-5, abs=least), (name, ours, theirs)
    torch.testing.assert_close(channels.cpu(), want_channels, rtol=2e-5, atol=0)


def noise(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype).to(DEVICE)


SHAPES: dict[str, Callable[[], torch.Tensor]] = {
    "matrix": lambda: noise(ROWS, 256),
    "large": lambda: noise(*LARGE),
    "ragged": lambda: noise(ROWS // 2 + 1, 129),
    "three dims": lambda: noise(3, ROWS + 1, 130),
    "four dims": lambda: noise(2, 3, 7, 96),
    "many sequences": lambda: noise(MANY, 5, 64),
    "vector": lambda: noise(1000),
    "scalar": lambda: noise(1).reshape(()),
    "one": lambda: noise(1, 1),
    "transposed": lambda: noise(ROWS, 256).t(),
    "rows left out": lambda: noise(ROWS, 256)[1::4],
    "columns left out": lambda: noise(ROWS, 256)[:, ::2],
    "a part": lambda: noise(4, ROWS, 256)[:, 3 : ROWS - 2, 16:200],
    "expanded": lambda: noise(1, 256).expand(8, 256),
    "permuted": lambda: noise(4, 6, 32).permute(1, 0, 2),
    "wide": lambda: noise(2, 2500) if INTERPRETED else noise(5, 5000),
    "fp32": lambda: noise(3, ROWS // 2 + 1, 70, dtype=torch.float32),
    "fp16": lambda: noise(ROWS, 100, dtype=torch.float16),
    "fp64": lambda: noise(3, ROWS // 2 + 1, 70, dtype=torch.float64),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("format", "scale"), [("bf16", None), ("e4m3", 3.0), ("e5m2", 0.01), ("e4m3", None)]
)
def test_any_shape_and_stride(
    shape: str, format: str, scale: float | None, scratch: Scratch
) -> None:
    check(SHAPES[shape](), format, scale, scratch)


@pytest.mark.parametrize("format", ["fp32", "e4m3", "e5m2"])
@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e37])
def test_fourth_powers_survive_any_size(size: float, format: str, scratch: Scratch) -> None:
    check(noise(ROWS, 300, dtype=torch.float32) * size, format, None, scratch)


def test_growing_and_shrinking_magnitudes(scratch: Scratch) -> None:
    steps = torch.logspace(-30, 30, 64 if INTERPRETED else 4096).reshape(-1, 1)
    for order in (steps, steps.flip(0)):
        x = noise(len(order), 64, dtype=torch.float32) * order.to(DEVICE)
        check(x, "fp32", None, scratch)


@pytest.mark.parametrize("format", ["bf16", "e4m3", "e5m2"])
def test_what_is_not_a_number(format: str, scratch: Scratch) -> None:
    x = noise(3, ROWS + 1, 130, dtype=torch.float32)
    odd = torch.tensor([float("nan"), INFINITY, -INFINITY, -0.0, 0.0, 1e-40, 1e-6, -1e-45])
    x[0, 0, : len(odd)] = odd.to(DEVICE)
    x[2, ROWS, -1] = float("nan")
    check(x, format, 3.0, scratch)
    check(torch.full((8, 8), float("nan"), device=DEVICE), format, 1.0, scratch)
    check(torch.zeros(2, 3, 4, device=DEVICE), format, None, scratch)


def test_rounding_is_the_casts_own(scratch: Scratch) -> None:
    """Every bf16 number there is, at several scales."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    if INTERPRETED:
        # Triton 3.9's interpreter reads bf16 numbers below the normal ones wrongly.
        every = torch.where(every.abs() < torch.finfo(every.dtype).smallest_normal, 0.0, every)
    for scale in (1.0, 2.0**20, 2.0**-9, 0.3):
        check(every.to(DEVICE).reshape(256, 256), "e4m3", scale, scratch)
        check(every.to(DEVICE).reshape(256, 256), "e5m2", scale, scratch)


def test_nothing_to_measure(scratch: Scratch) -> None:
    rows = empty_rows()
    options = {"format": "e4m3", "scale": None, "control": on(), "scratch": scratch}
    accumulate(torch.empty(0, 4, device=DEVICE), rows, 0, **options)  # type: ignore[arg-type]
    want = empty_rows()[0]
    want[1] = 1
    assert torch.equal(rows[0], want)


def test_the_flag_decides_on_the_device(scratch: Scratch) -> None:
    rows, control = empty_rows(), on(0)
    channels = torch.zeros(256, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        accumulate(
            noise(ROWS, 256), rows, 0, format="bf16", scale=None, control=control, scratch=scratch,
            channels=channels,
        )  # fmt: skip
        assert torch.equal(rows, empty_rows())
        assert not channels.any()


def test_the_same_tensor_gives_the_same_bits(scratch: Scratch) -> None:
    x = noise(*LARGE)
    found = []
    for _ in range(5):
        rows = empty_rows()
        scale = torch.tensor(3.0, device=DEVICE)
        accumulate(x, rows, 0, format="e4m3", scale=scale, control=on(), scratch=scratch)
        found.append(rows[0])
    assert all(torch.equal(found[0], other) for other in found)


def test_rows_add_up_and_remember_the_first_bad_micro_batch(scratch: Scratch) -> None:
    rows = empty_rows()
    good, bad = noise(ROWS, 256), noise(ROWS, 256, seed=1)
    bad[3, 4] = float("nan")
    for micro_batch, x in enumerate((good, bad, good, bad)):
        control = on(1, micro_batch)
        accumulate(x, rows, 0, format="bf16", scale=None, control=control, scratch=scratch)
    row = dict(zip([*SUM_FIELDS, "first"], rows[0].tolist(), strict=True))
    assert row["observations"] == 4
    assert row["nonfinite"] == 2
    assert row["numel"] == 4 * ROWS * 256 - 2
    assert row["first"] == 1


@pytest.mark.cuda
def test_replays_of_a_graph_add_up(scratch: Scratch) -> None:
    rows, control, x = empty_rows(), on(), noise(ROWS, 256)
    scale = torch.tensor(2.0, device=DEVICE)
    channels = torch.zeros(256, dtype=torch.float64, device=DEVICE)

    def measure() -> None:
        accumulate(
            x, rows, 0, format="e4m3", scale=scale, control=control, scratch=scratch,
            channels=channels,
        )  # fmt: skip

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        measure()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        measure()
    torch.cuda.synchronize()
    rows.copy_(empty_rows())
    for enabled in (1, 0, 1):
        control[0] = enabled
        x.mul_(2)
        graph.replay()
    torch.cuda.synchronize()
    assert rows[0, 1] == 2
    assert rows[0, 6] == x.abs().max()


@pytest.mark.parametrize(
    ("format", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_codes(format: str, dtype: torch.dtype, scratch: Scratch) -> None:
    """All codes, against their values in float64."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    if INTERPRETED:
        # Triton 3.9's interpreter takes codes that are no numbers for numbers, and loses those
        # that fp16 holds below its normal numbers.
        value = codes.view(dtype).float().abs()
        codes = torch.where(value.isfinite() & (value >= 2.0**-14), codes, 0)
    codes = codes.repeat(9, 3).to(DEVICE)
    inverse = torch.tensor(0.37, device=DEVICE)
    rows = empty_rows()
    accumulate_codes(
        codes, rows, 0, format=format, scale_inv=inverse, control=on(), scratch=scratch
    )
    value = codes.cpu().view(dtype).double()
    finite = value[value.isfinite()]
    x = (finite * float(inverse)).float().double()
    largest = float(torch.finfo(dtype).max)
    row = dict(zip([*SUM_FIELDS, "first"], rows[0].tolist(), strict=True))
    assert row["numel"] == len(finite)
    assert row["nonfinite"] == codes.numel() - len(finite)
    assert row["zeros"] == int((finite == 0).sum())
    assert row["overflow"] == int((finite.abs() == largest).sum())
    assert row["sum2"] == pytest.approx(float(x.square().sum()), rel=1e-6)
    assert row["sum4"] == pytest.approx(float(x.pow(4).sum()), rel=1e-6)
    assert row["amax"] == pytest.approx(float(x.abs().max()))
    small = (finite != 0) & (finite.abs() < float(torch.finfo(dtype).smallest_normal))
    assert row["subnormal"] == int(small.sum())


def test_the_histogram_counts_exponents(scratch: Scratch) -> None:
    x = noise(ROWS, 70, dtype=torch.float32)
    x[0, :3] = torch.tensor([0.0, float("inf"), 1e-40], device=DEVICE)
    counts = torch.zeros(256, dtype=torch.float64, device=DEVICE)
    accumulate(
        x, empty_rows(), 0, format="fp32", scale=None, control=on(), scratch=scratch,
        histogram=counts,
    )  # fmt: skip
    some = x.cpu().flatten()
    some = some[some.isfinite() & (some != 0)].abs()
    want = torch.bincount(some.view(torch.int32) >> 23, minlength=256)
    assert torch.equal(counts.cpu(), want.double())
