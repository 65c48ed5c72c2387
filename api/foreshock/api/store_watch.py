"""A watch over running queries: which of them outlived the limit that should have ended it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["Watch"]

_GRACE_SECONDS: Final = 10.0


class Watch:
    """Counts queries as running; safe to use from any thread.

    Args:
        seconds: The limit of a query.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[int, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count a query as running."""
        token = object()
        with self._lock:
            self._running[id(token)] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._running[id(token)]

    def hung_seconds(self) -> float:
        """How far the oldest running query is past the limit that should have ended it; 0 if none.

        Anything above 0 means that the engine no longer keeps its own limits.
        """
        with self._lock:
            oldest = min(self._running.values(), default=None)
        if oldest is None:
            return 0.0
        return max(0.0, time.monotonic() - oldest - self._seconds - _GRACE_SECONDS)
