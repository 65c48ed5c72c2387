"""Many tensors in one launch: noted as they pass, measured together a little later.

A launch costs the host more than most tensors cost the device, so a tensor that waits costs an
entry in a list. It waits only where it stays as it is; what has changed all the same is found by
its version and its address, left out and told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import triton.language as tl

from foreshock.monitor.launches import Launch, start
from foreshock.monitor.tables import Tables
from foreshock.monitor.triton_tables import FIELDS, MEMBERS, table_kernel

__all__ = ["Group", "Member", "Together", "member_of"]

_KINDS: Final = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
# What may wait lives longer for it: this much at most.
_MOST_BYTES: Final = 2**28
_MOST_PROGRAMS: Final = 2**15
_MOST_LAYOUTS: Final = 64
_X, _SCALE = 2, 4


@dataclass(slots=True, eq=False)
class _Variant:
    """A kernel for all tensors with the same constants."""

    constants: dict[str, Any]
    registers: int | None
    compiled: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A tensor of one row in the table, but for its address and its scale's.

    Attributes:
        variant: Of the kernel.
        programs: How many share the tensor.
        entry: First program, programs, tensor, row, scale, sequences, rows, columns, stride of
            rows and of sequences, splits, tiles, and four float64 as their bits: the format's
            largest, smallest normal and flush threshold, and the anchor's factor.
        bytes: Of the tensor.
        scaled: Whether a scale must be given.
    """

    variant: _Variant
    programs: int
    entry: np.ndarray[Any, np.dtype[np.int64]]
    bytes: int
    scaled: bool


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tensors that are always noted together, but for what changes from step to step.

    Attributes:
        members, owners: One per tensor.
        programs, bytes: Of all of them.
    """

    members: tuple[Member, ...]
    owners: tuple[Any, ...]
    programs: int
    bytes: int


def member_of(
    launch: Launch,
    x: torch.Tensor,
    kind: torch.dtype,
    row: int,
    variants: dict[object, Any],
    *,
    registers: int,
) -> Member | None:
    """What a launch of one tensor is in a table; None where it takes a launch of its own.

    Args:
        launch: For tensors like x.
        x: The tensor.
        kind: As what its elements are read.
        row: Address of its row.
        variants: Those that there are; added to.
        registers: Limit for kernels of 16 bits.
    """
    constants = launch.constants
    numbers = launch.numbers
    alone = ("FROM_AMAX", "FRESH", "CHANNELS", "HISTOGRAM")
    # Columns, and the strides of rows and sequences.
    aligned = all(number % 16 == 0 for number in numbers[2:5])
    if any(constants[name] for name in alone) or not aligned or x.data_ptr() % 16:
        return None
    if kind not in _KINDS or launch.grid[0] > _MOST_PROGRAMS or max(numbers[:4]) >= 2**31:
        return None
    chosen = {"KIND": _KINDS[kind]}
    chosen |= {name: value for name, value in constants.items() if name not in alone}
    chosen |= {"FIELDS": FIELDS, "MEMBERS": MEMBERS}
    key = tuple(map(str, chosen.values()))
    variant = variants.get(key)
    if variant is None:
        limit = registers if constants["HALF"] else None
        variant = variants[key] = _Variant(chosen, limit)
    reals = np.array(numbers[7:], dtype=np.float64).view(np.int64)
    programs = launch.grid[0]
    entry = np.array([0, programs, 0, row, 0, *numbers[:7], *reals], dtype=np.int64)
    size = x.numel() * x.element_size()
    scaled = bool(constants["SCALED"])
    return Member(variant, programs, entry, size, scaled)


@dataclass(slots=True)
class _Layout:
    """Tables of the same tensors in the same order, but for addresses.

    Attributes:
        order: Positions of the members as they came, variant by variant.
        static: All entries.
        groups: Variant, first entry, number of entries, programs.
    """

    order: np.ndarray[Any, np.dtype[np.int64]]
    static: np.ndarray[Any, np.dtype[np.int64]]
    groups: list[tuple[_Variant, int, int, int]]

    @classmethod
    def of(cls, members: tuple[Member, ...]) -> _Layout:
        variants = list(dict.fromkeys(member.variant for member in members))
        order = sorted(range(len(members)), key=lambda at: variants.index(members[at].variant))
        static = np.stack([members[at].entry for at in order])
        groups = []
        for variant in variants:
            own = [i for i, at in enumerate(order) if members[at].variant is variant]
            ends = np.cumsum(static[own, 1])
            static[own, 0] = ends - static[own, 1]
            groups.append((variant, own[0], len(own), int(ends[-1])))
        return cls(np.array(order), static, groups)


@dataclass(slots=True)
class _Waiting:
    """What has been noted: members, and of each what must not change until it is measured."""

    members: list[Member] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)
    scales: list[torch.Tensor | None] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)


class Together:
    """What waits on one stream to be measured.

    Args:
        scratch: Of the kernels.
        control: As `kernels.accumulate` takes it.
    """

    def __init__(self, scratch: Any, control: torch.Tensor) -> None:
        self._scratch = scratch
        self._control = control
        self._waiting = _Waiting()
        self._programs = self._size = 0
        self._stream = 0
        self._layouts: dict[tuple[Member, ...], _Layout] = {}
        self._tables = Tables(control.device, MEMBERS, FIELDS)

    @property
    def waits(self) -> bool:
        """Whether anything does."""
        return bool(self._waiting.members)

    @property
    def bytes(self) -> int:
        """Memory on the device."""
        return self._tables.bytes

    def add(
        self,
        member: Member,
        x: torch.Tensor,
        address: int,
        scale: torch.Tensor | None,
        owner: Any,
    ) -> list[Any]:
        """Note a tensor.

        Args:
            member: Its row.
            x: Kept until it is measured.
            address: Of x.
            scale: Kept too.
            owner: Given back if the tensor has changed in the meantime.

        Returns:
            What `flush` returns, if that had to be.
        """
        lost: list[Any] = []
        stream = self._scratch.stream()
        waiting = self._waiting
        if waiting.members and (
            stream != self._stream
            or self._programs + member.programs > _MOST_PROGRAMS
            or len(waiting.members) == MEMBERS
        ):
            lost = self.flush()
        self._stream = stream
        waiting.members.append(member)
        waiting.tensors.append(x)
        waiting.scales.append(scale)
        waiting.addresses.append(address)
        waiting.versions.append(x._version)
        waiting.owners.append(owner)
        self._programs += member.programs
        self._size += member.bytes
        if self._size > _MOST_BYTES:
            lost += self.flush()
        return lost

    def group(self, members: Sequence[Member], owners: Sequence[Any]) -> Group:
        """What `add_all` takes, of far fewer tensors than `MEMBERS`."""
        programs = sum(member.programs for member in members)
        return Group(tuple(members), tuple(owners), programs, sum(m.bytes for m in members))

    def add_all(
        self,
        group: Group,
        tensors: Sequence[torch.Tensor],
        addresses: Sequence[int],
        scales: Sequence[torch.Tensor | None],
    ) -> list[Any]:
        """Note the tensors of a group, in its order; otherwise as `add`."""
        lost: list[Any] = []
        stream = self._scratch.stream()
        waiting = self._waiting
        if waiting.members and (
            stream != self._stream
            or self._programs + group.programs > _MOST_PROGRAMS
            or len(waiting.members) + len(group.members) > MEMBERS
        ):
            lost = self.flush()
        self._stream = stream
        waiting.members += group.members
        waiting.owners += group.owners
        waiting.tensors += tensors
        waiting.scales += scales
        waiting.addresses += addresses
        waiting.versions += [x._version for x in tensors]
        self._programs += group.programs
        self._size += group.bytes
        if self._size > _MOST_BYTES:
            lost += self.flush()
        return lost

    def flush(self) -> list[Any]:
        """Queue the measurement of what waits, on the stream on which it came.

        Returns:
            Owners of tensors that have changed since they were noted; they are not measured.
        """
        waiting = self._waiting
        if not waiting.members:
            return []
        lost = self._changed()
        if waiting.members:
            if self._stream == self._scratch.stream():
                self._launch()
            else:
                own = torch.cuda.ExternalStream(self._stream)  # type: ignore[no-untyped-call]
                with torch.cuda.stream(own):
                    self._launch()
        self.forget()
        return lost

    def forget(self) -> None:
        """Let go of what waits."""
        waiting = self._waiting
        for noted in (
            waiting.members,
            waiting.tensors,
            waiting.scales,
            waiting.addresses,
            waiting.versions,
            waiting.owners,
        ):
            noted.clear()
        self._programs = self._size = 0

    def _changed(self) -> list[Any]:
        waiting = self._waiting
        same = [x._version for x in waiting.tensors] == waiting.versions
        if same and [x.data_ptr() for x in waiting.tensors] == waiting.addresses:
            return []
        changed = [
            at
            for at, x in enumerate(waiting.tensors)
            if x._version != waiting.versions[at] or x.data_ptr() != waiting.addresses[at]
        ]
        lost = [waiting.owners[at] for at in changed]
        for at in reversed(changed):
            for noted in (waiting.members, waiting.scales, waiting.addresses):
                del noted[at]
        return lost

    def _launch(self) -> None:
        waiting = self._waiting
        key = tuple(waiting.members)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = _Layout.of(key)
        at = self._tables.take()
        if at is None:
            # Rather new memory than to wait for the device.
            self._tables = Tables(self._control.device, MEMBERS, FIELDS)
            at = self._tables.take()
            assert at is not None
        count = len(key)
        table = self._tables.array(at)
        table[:count] = layout.static
        table[:count, _X] = np.array(waiting.addresses)[layout.order]
        scales = [0 if scale is None else scale.data_ptr() for scale in waiting.scales]
        table[:count, _SCALE] = np.array(scales)[layout.order]
        there, address = self._tables.copy(at)
        partials, counter = self._scratch.addresses(self._stream)
        for variant, first, own, programs in layout.groups:
            grid = (programs, 1, 1)
            if variant.compiled is None:
                sums, finished, _ = self._scratch.buffers()
                limit = {} if variant.registers is None else {"maxnreg": variant.registers}
                variant.compiled = table_kernel[grid](
                    there[first:],
                    self._control,
                    sums,
                    finished,
                    own,
                    **variant.constants,
                    num_warps=4,
                    **limit,
                )
                continue
            start(
                variant.compiled,
                grid,
                self._stream,
                (address + first * FIELDS * 8, self._control.data_ptr(), partials, counter),
                (own, *variant.constants.values()),
            )
