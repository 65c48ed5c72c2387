"""Launches of kernels that have been worked out and compiled, to be started again for little.

Knows addresses, not tensors, and imports nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreshock.monitor.kernels import Scratch

__all__ = ["Launch", "Prepared", "start"]


@dataclass(slots=True)
class Launch:
    """A launch worked out for tensors of one shape, and the kernels that Triton made for it.

    Triton looks at every argument of a launch to find the kernel for it; for tensors that come
    again at every step that is most of the cost, so the kernel is kept and started directly.

    Attributes:
        grid, numbers, constants: Of `accumulate_kernel`, behind its pointers.
        compiled: The kernel, once it has run.
        room: Elements that the channel sums of all programs take.
        channel_grid, channel_numbers, channel_constants, channel_compiled: Of `channels_kernel`.
    """

    grid: tuple[int, int, int]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    room: int
    channel_grid: tuple[int, int, int]
    channel_numbers: tuple[Any, ...]
    channel_constants: dict[str, Any]
    compiled: Any = None
    channel_compiled: Any = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A launch with all its arguments but the tensor and its scale.

    Addresses instead of tensors, and Triton's compiled kernel started directly: that is what costs
    the host least. All that it points to must stay where it is.

    Attributes:
        launch, scratch: Whose launch it is.
        row, control, channels, histogram: Addresses.
        scale: Address of the scale, where it is always the same.
        scaled: Whether a scale is given at all.
    """

    launch: Launch
    scratch: Scratch
    row: int
    scale: int | None
    scaled: bool
    control: int
    channels: int | None
    histogram: int | None

    @property
    def startable(self) -> bool:
        """Whether there is a kernel; Triton's interpreter leaves none."""
        return self.launch.compiled is not None

    def start(self, x: int, scale: int | None) -> None:
        """Queue it for the tensor at an address, with the scale at another."""
        launch, stream = self.launch, self.scratch.stream()
        partials, counter = self.scratch.addresses(stream)
        if self.scale is not None:
            scale = self.scale
        elif scale is None or not self.scaled:
            scale = partials
        sums = partials
        if self.channels is not None:
            sums = self.scratch.channels(launch.room).data_ptr()
        histogram = partials if self.histogram is None else self.histogram
        start(
            launch.compiled,
            launch.grid,
            stream,
            (x, self.row, scale, self.control, partials, counter, sums, histogram),
            (*launch.numbers, *launch.constants.values()),
        )
        if self.channels is not None:
            start(
                launch.channel_compiled,
                launch.channel_grid,
                stream,
                (sums, self.channels, self.control),
                (*launch.channel_numbers, *launch.channel_constants.values()),
            )


def start(
    kernel: Any,
    grid: tuple[int, int, int],
    stream: int,
    pointers: tuple[int, ...],
    rest: tuple[Any, ...],
) -> None:
    """What `kernel[grid](...)` does, without looking for hooks of Triton's profilers."""
    kernel.run(
        *grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *pointers, *rest
    )
