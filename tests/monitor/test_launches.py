"""What the host hands to a kernel: the same for the next tensor of a kind, at its own address."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foreshock.monitor.device_rows import DeviceRows, Slot
from foreshock.monitor.entry import Entry
from foreshock.monitor.record import TensorIdentity

triton = pytest.importorskip("triton")

from foreshock.monitor import kernels  # noqa: E402


class Compiled:
    """What Triton leaves of a kernel; notes what it is started with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        function, metadata, *hooks = rest[:5]
        assert (function, metadata, hooks) == ("function", "metadata", [None] * 3)
        self.kernel.started.append(((x, y, z), rest[5:]))

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.kernel.started.append((grid, addresses(arguments)))


class Kernel:
    """In place of a kernel of Triton."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.started: list[tuple[tuple[int, int, int], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(
            *arguments: Any, num_warps: int = 4, maxnreg: int | None = None, **constants: Any
        ) -> Compiled:
            given = self.names[: len(arguments)] + list(constants)
            assert given == self.names, "every argument stands at its place"
            self.started.append((grid, addresses((*arguments, *constants.values()))))
            return Compiled(self)

        return launch


def addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Kernel]:
    found = {}
    for name in ("accumulate_kernel", "channels_kernel"):
        found[name] = Kernel(getattr(kernels, name).arg_names)
        monkeypatch.setattr(kernels, name, found[name])
    return found


def slot_of(rows: DeviceRows, format: str, role: str = "input") -> Slot:
    return rows.slot(Entry(TensorIdentity("layer", role, format), None))


@pytest.mark.parametrize("detailed", [True, False])
@pytest.mark.parametrize(("format", "given"), [("bf16", False), ("e4m3", True), ("e4m3", False)])
def test_the_next_tensor_is_started_like_the_first(
    started: dict[str, Kernel], format: str, given: bool, detailed: bool
) -> None:
    rows = DeviceRows(torch.device("cpu"), kernels)
    rows.start_step(measuring=True, detailed=detailed)
    tensors = [torch.randn(6, 64).bfloat16() for _ in range(3)]
    scales = [torch.tensor(float(n + 1)) for n in range(3)]
    for x, scale in zip(tensors, scales, strict=True):
        rows.add(slot_of(rows, format), x, scale if given else None)
    calls = started["accumulate_kernel"].started
    each = len(calls) // 3
    assert each == (2 if format == "e4m3" and not given else 1)
    names = started["accumulate_kernel"].names
    at = {name: names.index(name) for name in ("x_ptr", "scale_ptr")}
    for number, (x, scale) in enumerate(zip(tensors, scales, strict=True)):
        for first, own in zip(calls[:each], calls[number * each :][:each], strict=True):
            expected = list(first[1])
            expected[at["x_ptr"]] = x.data_ptr()
            if given:
                expected[at["scale_ptr"]] = scale.data_ptr()
            assert own == (first[0], tuple(expected))
    channels = started["channels_kernel"].started
    assert len(channels) == (3 if detailed else 0)
    assert len(set(channels)) == (1 if detailed else 0)


def test_codes_are_started_like_the_first(started: dict[str, Kernel]) -> None:
    rows = DeviceRows(torch.device("cpu"), kernels)
    rows.start_step(measuring=True)
    first, second = (torch.zeros(8, 128, dtype=torch.uint8) for _ in range(2))
    inverse = torch.tensor([0.5])
    for codes in (first, second):
        rows.add_codes(slot_of(rows, "e4m3"), codes, inverse)
    (grid, one), (again, two) = started["accumulate_kernel"].started
    assert (grid, one[1:]) == (again, two[1:])
    assert (one[0], two[0]) == (first.data_ptr(), second.data_ptr())


def test_another_kind_of_tensor_is_another_launch(started: dict[str, Kernel]) -> None:
    rows = DeviceRows(torch.device("cpu"), kernels)
    rows.start_step(measuring=True)
    slot = slot_of(rows, "bf16")
    for x in (torch.zeros(4, 64), torch.zeros(4, 64).bfloat16(), torch.zeros(4, 128)[:, :64]):
        rows.add(slot, x, None)
    assert len(slot.ready) == 3
    rows.add(slot, torch.zeros(4, 32), None)
    assert len(slot.ready) == 1, "its channels are others"
    grown = [slot_of(rows, "bf16", role=str(number)) for number in range(70)]
    assert not slot.ready, "the rows have moved"
    assert len({s.index for s in (slot, *grown)}) == 71


def test_a_tensor_without_elements_is_seen(started: dict[str, Kernel]) -> None:
    rows = DeviceRows(torch.device("cpu"), kernels)
    rows.start_step(measuring=True)
    rows.add(slot_of(rows, "bf16"), torch.zeros(0, 4), None)
    _, values, _ = rows.take()
    assert values is not None
    assert values[0, 1] == 1.0
    assert not started["accumulate_kernel"].started
