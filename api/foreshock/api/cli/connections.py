"""uvicorn's HTTP protocol with the bounds it lacks: time, size and number of what strangers open.

uvicorn closes a connection that is idle between two requests, but waits for ever for the head of a
request, lets it grow without end, and waits for ever for a client that does not read. How slowly a
body may come is `foreshock.api.intake`'s matter.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["ConnectionLimits", "bounded_protocol"]

_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """What one client may take.

    Attributes:
        connections: Open at the same time, over all clients; more are closed at once.
        head_seconds: Longest wait for the whole head of a request.
        head_bytes: Largest head, about: what comes in one piece is taken in full.
        stall_seconds: A client that reads nothing of its answer for so long is given up.
    """

    connections: int = 1024
    head_seconds: float = 20.0
    head_bytes: int = 64 * 1024
    stall_seconds: float = 60.0


def bounded_protocol(limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """The protocol under these limits, for `uvicorn.Config(http=...)`."""

    class Bounded(_Bounded):
        bounds = limits

    return Bounded


class _Bounded(HttpToolsProtocol):
    bounds: ClassVar[ConnectionLimits]

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _head_seen = 0
    _unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or close it at once."""
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections:
            transport.abort()
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._head_is_there()
        self._cancel_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            # uvicorn stops its own clock at any byte, were it only the rest of a refused body.
            self._expect_head()
        self._head_seen += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_seen > self.bounds.head_bytes:
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head_is_there()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """The next request begins from nothing."""
        self._head_seen = 0
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered; watch whether it reads at all."""
        super().pause_writing()
        self._cancel_stall()
        self._watch()

    def resume_writing(self) -> None:
        """It has read."""
        self._cancel_stall()
        super().resume_writing()

    def _expect_head(self) -> None:
        self._head_is_there()
        self._head_seen = 0
        self._head_timer = self.loop.call_later(self.bounds.head_seconds, self._give_up)

    def _head_is_there(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.abort()

    def _watch(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self.bounds.stall_seconds, self._check_stall)

    def _check_stall(self) -> None:
        self._stall_timer = None
        if self.transport.get_write_buffer_size() >= self._unread:
            self.transport.abort()
        else:
            self._watch()

    def _cancel_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
