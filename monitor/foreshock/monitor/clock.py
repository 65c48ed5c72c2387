"""How long steps take, and how much of it is the monitor's."""

from __future__ import annotations

import time

from foreshock.monitor.containment import Containment

__all__ = ["Clock"]


class Clock:
    """Times steps, and what of them the monitor's hooks take.

    Args:
        guard: Around every hook.
    """

    def __init__(self, guard: Containment) -> None:
        self._guard = guard
        self._mark: float | None = None
        self._guarded = 0.0

    def start(self) -> None:
        """The first step begins; later ones begin where the last one ended."""
        if self._mark is None:
            self._mark = time.perf_counter()
            self._guarded = self._guard.seconds_until(self._mark)

    def step(self, kernel_seconds: float) -> dict[str, float]:
        """A step ends: its step_seconds and overhead_ratio, if its beginning was seen.

        Args:
            kernel_seconds: Time of the monitor's kernels on the device.
        """
        now = time.perf_counter()
        mark, self._mark = self._mark, now
        before, self._guarded = self._guarded, self._guard.seconds_until(now)
        if mark is None:
            return {}
        inside = self._guarded - before + kernel_seconds
        ratio = inside / max(now - mark - inside, 1e-9)
        return {"step_seconds": now - mark, "overhead_ratio": ratio}
