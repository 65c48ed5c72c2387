"""Rows on a device: what the next tensor of a kind adds, and what is left out between details."""

from __future__ import annotations

import math

import pytest
import torch

from foreshock.monitor.device_rows import DeviceRows, Known, Slot
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


def of_many_kinds() -> list[tuple[str, torch.Tensor, float | None]]:
    """Format, tensor or codes, and scale of tensors with different kernels."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    wild = normal(8, 64)
    wild[3, 5], wild[0, 0], wild[7] = float("inf"), 1e30, 0.0
    return [
        ("e4m3", normal(6, 256).bfloat16(), 3.0),
        ("e5m2", normal(2, 16, 128).bfloat16(), 8.0),
        ("e4m3", normal(48, 1024).bfloat16(), 0.5),
        ("e4m3", normal(64, 16).bfloat16().t(), 2.0),
        ("bf16", normal(3, 4, 64).bfloat16(), None),
        ("fp16", normal(5, 64).half(), None),
        ("e4m3", wild, 1.0),
        ("e4m3", normal(6, 256).bfloat16() * 1e20, 1.0),
        ("e4m3", torch.zeros(4, 128).bfloat16(), 1.0),
        ("e4m3", normal(8, 128).to(torch.float8_e4m3fn).view(torch.uint8), 0.25),
        ("e4m3", normal(70, 256).bfloat16(), 3.0),
    ]


def test_many_in_one_launch_are_to_the_bit_what_each_is_in_its_own(rows: DeviceRows) -> None:
    """Several steps: at first nothing is known, later everything."""
    kinds = [
        (format, x.to(DEVICE), None if scale is None else torch.tensor(scale, device=DEVICE))
        for format, x, scale in of_many_kinds()
    ]
    known: dict[int, Known] = {}
    for detailed in (False, True, False, False):
        rows.start_step(measuring=True, detailed=detailed)
        rows.next_micro_batch()
        for later in (False, True):
            for number, (format, x, scale) in enumerate(kinds):
                slot = slot_of(rows, format, f"{number} {later}")
                if later and number in known and not detailed:
                    assert rows.add_known(known[number], x, scale)
                    continue
                if x.dtype == torch.uint8:
                    assert scale is not None
                    one = rows.add_codes(slot, x, scale, later=later)
                else:
                    one = rows.add(slot, x, scale, later=later)
                if one is not None and not detailed:
                    known[number] = one
        entries, values, _ = rows.take()
        assert values is not None
        found = {e.identity.layer: row for e, row in zip(entries, values.cpu(), strict=True)}
        for number in range(len(kinds)):
            alone, many = found[f"{number} False"], found[f"{number} True"]
            assert torch.equal(alone.nan_to_num(nan=-7.0), many.nan_to_num(nan=-7.0)), number
            assert alone[1] == 1.0
    assert len(known) >= 9, "nearly all came together"
    assert not rows.add_known(known[0], kinds[1][1], kinds[1][2]), "another kind"
    assert not rows.take_lost()


def test_what_changes_while_it_waits_is_left_out_and_told(rows: DeviceRows) -> None:
    scale = torch.tensor(3.0, device=DEVICE)
    kept, overwritten, freed = (x.to(DEVICE) for x in tensors(3))
    expected = kept.cpu()
    for step in range(3):
        rows.start_step(measuring=True, detailed=False)
        for layer, x in (("kept", kept), ("overwritten", overwritten), ("freed", freed)):
            rows.add(slot_of(rows, "e4m3", layer), x, scale, later=True)
        if step == 1:
            overwritten.mul_(2)
            freed.data = torch.empty(0, device=DEVICE)
        _, values, _ = rows.take()
        assert values is not None
        check(values[0].cpu(), [expected], error=False)
        lost = {("overwritten", "input"), ("freed", "input")}
        assert rows.take_lost() == (lost if step == 1 else set())
        if step == 1:
            assert values[1:, 1].tolist() == [0.0, 0.0]
            freed.data = expected.to(DEVICE)
        else:
            assert values[:, 1].tolist() == [1.0] * 3


def test_what_waits_is_measured_before_the_next_micro_batch_begins(rows: DeviceRows) -> None:
    x = torch.full((4, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    for step in range(2):
        rows.start_step(measuring=True, detailed=False)
        for micro_batch in range(3):
            rows.next_micro_batch()
            if micro_batch:
                rows.add(slot_of(rows, "bf16"), x, None, later=True)
        _, values, _ = rows.take()
        assert values is not None
        assert values[0, -1] == 1.0, step


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
