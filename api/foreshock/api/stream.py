"""What happens to runs, as server-sent events: a bounded buffer that any number of readers follow.

A reader holds a place in the buffer, never a queue of its own, so a slow or dead one costs nothing.
Not a log: what fell out of the buffer is told to the reader as `reset`, and it reads the API anew.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["HEARTBEAT_SECONDS", "EventKind", "EventStream", "StreamEvent"]

EventKind = Literal["step", "risk", "alert"]

HEARTBEAT_SECONDS: Final = 10.0
"""How often a quiet stream sends a comment, so that proxies and clients know it lives."""

_RETRY_MILLISECONDS: Final = 2000


def _sees_all(_: str) -> bool:
    return True


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event.

    Attributes:
        number: Rises by one per event of this stream.
        kind: step, risk or alert.
        project: Its run's project.
        run_id: The run it is about.
        data: JSON text on one line.
    """

    number: int
    kind: EventKind
    project: str
    run_id: str
    data: str


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    loop: asyncio.AbstractEventLoop
    wake: asyncio.Event


class EventStream:
    """The buffer and its readers; `publish` and `close` may be called from any thread.

    Args:
        capacity: Events kept for readers that come back with `Last-Event-ID`.
    """

    def __init__(self, capacity: int = 4096) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; allowed: 1 or more")
        # Numbers start anew with each process; the word tells a reader from before it apart.
        self._epoch = secrets.token_hex(4)
        self._events: deque[StreamEvent] = deque(maxlen=capacity)
        self._lock = threading.Lock()
        self._last = 0
        self._readers: set[_Reader] = set()
        self._closed = False

    @property
    def readers(self) -> int:
        """How many readers follow at the moment."""
        with self._lock:
            return len(self._readers)

    def publish(
        self, kind: EventKind, run_id: str, data: Mapping[str, object], *, project: str
    ) -> None:
        """Append an event and wake the readers; returns at once.

        Args:
            kind: step, risk or alert.
            run_id: The run it is about.
            data: JSON values only; non-finite numbers already encoded.
            project: Its run's project: readers kept to others do not get the event.

        Raises:
            ValueError: A number in `data` is not finite.
        """
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
        with self._lock:
            self._last += 1
            self._events.append(StreamEvent(self._last, kind, project, run_id, text))
            readers = tuple(self._readers)
        _wake(readers)

    def close(self) -> None:
        """End every reader's iteration."""
        with self._lock:
            self._closed = True
            readers = tuple(self._readers)
        _wake(readers)

    async def follow(
        self,
        *,
        run_id: str | None = None,
        sees: Callable[[str], bool] = _sees_all,
        holds: Callable[[], bool] = _always,
        last_event_id: str | None = None,
        heartbeat: float = HEARTBEAT_SECONDS,
        seconds: float = math.inf,
    ) -> AsyncIterator[str]:
        """Frames of a `text/event-stream` body, until `close`.

        Args:
            run_id: Only this run's events; None for all.
            sees: Whether the reader may see a project.
            holds: Asked before every frame; the stream ends when the reader's right has.
            last_event_id: The id a client saw last; what came after it and is still held follows
                first. What is missing is told by an event `reset`.
            heartbeat: Seconds of quiet until a comment is sent.
            seconds: End after so long.
        """
        reader = _Reader(asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._readers.add(reader)
        try:
            place, lost = self._resume(last_event_id)
            # An id before any event, so that a reader that is cut off early knows where it was.
            yield f"id: {self._epoch}-{place}\nretry: {_RETRY_MILLISECONDS}\n\n" + (
                self._reset(place, {"reason": "restart"}) if lost else ""
            )
            end = time.monotonic() + seconds
            while not self._closed and holds() and time.monotonic() < end:
                reader.wake.clear()
                events, missed = self._after(place)
                if missed:
                    place += missed
                    yield self._reset(place, {"reason": "overrun", "missed": missed})
                if events:
                    place = events[-1].number
                    wanted = (e for e in events if run_id in (None, e.run_id) and sees(e.project))
                    frames = [self._frame(event) for event in wanted]
                    if frames:
                        yield "".join(frames)
                elif not await _awoken(reader.wake, min(heartbeat, end - time.monotonic())):
                    yield ": still here\n\n"
        finally:
            with self._lock:
                self._readers.discard(reader)

    def _resume(self, last_event_id: str | None) -> tuple[int, bool]:
        with self._lock:
            if last_event_id is None:
                return self._last, False
            epoch, _, number = last_event_id.partition("-")
            if epoch != self._epoch or not number.isdecimal() or int(number) > self._last:
                return self._last, True
            return int(number), False

    def _after(self, place: int) -> tuple[list[StreamEvent], int]:
        """Events after a place, and how many between them and it are not held any more."""
        with self._lock:
            oldest = self._last - len(self._events) + 1
            fresh = self._last - max(place, oldest - 1)
            events = list(self._events)[-fresh:] if fresh else []
            return events, max(0, oldest - 1 - place)

    def _frame(self, event: StreamEvent) -> str:
        return f"id: {self._epoch}-{event.number}\nevent: {event.kind}\ndata: {event.data}\n\n"

    def _reset(self, place: int, why: Mapping[str, object]) -> str:
        return f"id: {self._epoch}-{place}\nevent: reset\ndata: {json.dumps(why)}\n\n"


def _wake(readers: tuple[_Reader, ...]) -> None:
    for reader in readers:
        # A loop that closed under its reader has nobody left to wake.
        if not reader.loop.is_closed():
            reader.loop.call_soon_threadsafe(reader.wake.set)


async def _awoken(wake: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(wake.wait(), seconds)
    except TimeoutError:
        return False
    return True
