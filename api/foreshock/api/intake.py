"""Bodies on their way in: no slower than a least rate, and bounded over all requests together.

Plain ASGI; knows no route. The size of a single body is the guard's matter.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Intake", "IntakeLimits"]

_CLOSE: Final = {"Connection": "close"}
_BUSY: Final = {"Connection": "close", "Retry-After": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeLimits:
    """What bodies may take.

    Attributes:
        seconds: Any body may take so long, ...
        bytes_per_second: ... and so much longer as its bytes need at this rate.
        held_bytes: Bodies of all requests under way, as they came in.
    """

    seconds: float = 30.0
    bytes_per_second: int = 16 * 1024
    held_bytes: int = 512 * 1024 * 1024


class Intake:
    """Counts and times what every request brings."""

    def __init__(self, app: ASGIApp, limits: IntakeLimits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(self, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._held -= body.seen

    def take(self, size: int) -> None:
        """Count bytes as held.

        Raises:
            HTTPException: 503, there would be too many.
        """
        self._held += size
        if self._held > self._limits.held_bytes:
            raise HTTPException(503, "too many bodies are on their way in; try again", _BUSY)

    @property
    def limits(self) -> IntakeLimits:
        """The limits."""
        return self._limits


class _Body:
    def __init__(self, intake: Intake, receive: Receive) -> None:
        self.seen = 0
        self._intake = intake
        self._receive = receive
        self._started: float | None = None
        self._whole = False

    async def receive(self) -> Message:
        if self._whole:
            # Now the application waits for the client to leave, however long that takes.
            return await self._receive()
        message = await self._in_time()
        self._whole = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.seen += size
        self._intake.take(size)
        return message

    async def _in_time(self) -> Message:
        limits = self._intake.limits
        now = asyncio.get_running_loop().time()
        if self._started is None:
            self._started = now
        until = self._started + limits.seconds + self.seen / limits.bytes_per_second
        try:
            async with asyncio.timeout_at(until):
                return await self._receive()
        except TimeoutError:
            raise HTTPException(
                408,
                f"the body came too slowly: {self.seen} bytes in {now - self._started:.0f} s;"
                f" {limits.bytes_per_second} a second are expected",
                _CLOSE,
            ) from None
