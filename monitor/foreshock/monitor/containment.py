"""The one place where the monitor's own failures end: counted, logged rarely, never raised.

Under pytest they are raised, so that a broken monitor breaks its tests. Errors in the use of the
monitor (refused at attach) do not come through here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType
from typing import Self

__all__ = ["Containment"]

_LOGGER = logging.getLogger("foreshock.monitor")
_SECONDS_BETWEEN_LOGS = 60.0
_UNDER_TEST = "PYTEST_VERSION" in os.environ


class Containment:
    """A context manager around everything that runs inside somebody's training step.

    Not reentrant; one instance per thread.

    Attributes:
        errors: Failures so far.
        seconds: Time spent inside, for the overhead that the monitor reports about itself.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.errors = 0
        self.seconds = 0.0
        self._entered: float | None = None
        self._last_log = -float("inf")
        self._unreported: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._entered = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.seconds = self.seconds_until(time.perf_counter())
        self._entered = None
        if not isinstance(error, Exception):
            return False
        self._count(error)
        return not _UNDER_TEST

    def seconds_until(self, now: float) -> float:
        """Time inside until `now` (`time.perf_counter`), that in an open block included."""
        return self.seconds + (0.0 if self._entered is None else now - self._entered)

    def report(self, error: Exception) -> None:
        """Count a failure that was dealt with elsewhere."""
        self._count(error)

    def take_unreported(self) -> tuple[str, ...]:
        """Messages since the last call, for an event in the next record; at most ten are kept."""
        with self._lock:
            messages, self._unreported = tuple(self._unreported), []
        return messages

    def _count(self, error: Exception) -> None:
        self.errors += 1
        message = f"{self.where}: {type(error).__name__}: {error}"
        with self._lock:
            if len(self._unreported) < 10:
                self._unreported.append(message)
        now = time.monotonic()
        if now - self._last_log >= _SECONDS_BETWEEN_LOGS:
            self._last_log = now
            _LOGGER.warning(
                "the monitor failed and training goes on (%d failures so far): %s",
                self.errors,
                message,
                exc_info=error,
            )
