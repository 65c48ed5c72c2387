"""Rows on a device: what the next tensor of a kind adds, and what is left out between details."""

from __future__ import annotations

import math

import pytest
import torch

from foreshock.monitor.device_rows import DeviceRows, Slot
from foreshock.monitor.entry import Entry
from foreshock.monitor.record import TensorIdentity
from foreshock.monitor.statistics import SUM_FIELDS, packed_sums
from tests.gpu.devices import DEVICE

# It comes with torch's CUDA builds only.
pytest.importorskip("triton")
from foreshock.monitor import kernels

pytestmark = pytest.mark.gpu
ERROR = SUM_FIELDS.index("error2")


@pytest.fixture
def rows() -> DeviceRows:
    return DeviceRows(DEVICE, kernels)


def slot_of(rows: DeviceRows, format: str, layer: str = "layer") -> Slot:
    return rows.slot(Entry(TensorIdentity(layer, "input", format), None))


def tensors(count: int, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 256, generator=generator).bfloat16() for _ in range(count)]


def check(row: torch.Tensor, given: list[torch.Tensor], *, error: bool) -> None:
    every = [packed_sums(x, format="e4m3", scale=torch.tensor(3.0))[0] for x in given]
    for name, ours, *theirs in zip(
        SUM_FIELDS, row.tolist(), *(e.tolist() for e in every), strict=False
    ):
        if name == "error2" and not error:
            assert math.isnan(ours), "nobody took it"
        elif name == "amax":
            assert ours == max(theirs)
        elif name in ("min_nonzero", "headroom_log2", "scale_log2"):
            assert ours == pytest.approx(min(theirs), rel=1e-6)
        elif name == "scale_log2_max":
            assert ours == pytest.approx(max(theirs), rel=1e-6)
        else:
            assert ours == pytest.approx(sum(theirs), rel=2e-5), name


@pytest.mark.parametrize("detailed", [True, False])
def test_the_next_tensors_of_a_kind_add_up(rows: DeviceRows, detailed: bool) -> None:
    """The first is launched by Triton, the others from what it left."""
    given = tensors(3)
    scale = torch.tensor(3.0, device=DEVICE)
    for step in range(2):
        rows.start_step(measuring=True, detailed=detailed)
        for x in given:
            rows.next_micro_batch()
            rows.add(slot_of(rows, "e4m3"), x.to(DEVICE), scale)
        entries, values, channels = rows.take()
        assert len(entries) == 1
        assert values is not None
        check(values[0].cpu(), given, error=detailed)
        assert len(channels) == (1 if detailed else 0), step
        if detailed:
            want = sum(x.double().square().sum(0) for x in given)
            torch.testing.assert_close(channels[0][1].cpu(), want, rtol=2e-5, atol=0)


def test_steps_off_the_cadence_leave_nothing(rows: DeviceRows) -> None:
    (x,) = tensors(1)
    scale = torch.tensor(3.0, device=DEVICE)
    rows.start_step(measuring=True)
    rows.add(slot_of(rows, "e4m3"), x.to(DEVICE), scale)
    rows.start_step(measuring=False)
    rows.start_step(measuring=False)
    # As a graph does whose replays know no cadence.
    rows.add(slot_of(rows, "e4m3"), x.to(DEVICE), scale)
    rows.start_step(measuring=True)
    rows.add(slot_of(rows, "e4m3"), x.to(DEVICE), scale)
    _, values, _ = rows.take()
    assert values is not None
    check(values[0].cpu(), [x], error=True)
    assert rows.bytes > 0


def test_rows_that_move_keep_what_they_hold(rows: DeviceRows) -> None:
    first, second = tensors(2)
    scale = torch.tensor(3.0, device=DEVICE)
    rows.start_step(measuring=True, detailed=False)
    slot = slot_of(rows, "e4m3")
    rows.add(slot, first.to(DEVICE), scale)
    for number in range(70):
        slot_of(rows, "e4m3", f"layer {number}")
    rows.add(slot, second.to(DEVICE), scale)
    _, values, _ = rows.take()
    assert values is not None
    check(values[0].cpu(), [first, second], error=False)
