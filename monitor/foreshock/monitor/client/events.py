"""Server-sent events as an iterator that goes on after a break. Parses; asks through `Http`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from typing import Final

import httpx

from foreshock.monitor.client.answers import ServiceEvent
from foreshock.monitor.client.errors import NoAnswer
from foreshock.monitor.client.http import Http

__all__ = ["EventParser", "follow"]

# The service sends a comment at least every ten seconds; three missed in a row are a dead line.
_QUIET: Final = httpx.Timeout(10.0, read=35.0)


class EventParser:
    """Reads a `text/event-stream`.

    Attributes:
        last_id: Where the stream has come to, for the one after it; None before any id.
    """

    def __init__(self, last_id: str | None = None) -> None:
        self.last_id = last_id

    def parse(self, lines: Iterable[str]) -> Iterator[ServiceEvent]:
        """Events from lines without their ends; comments are left out."""
        kind = "message"
        data: list[str] = []
        for line in lines:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if line == "":
                if data:
                    members = json.loads("\n".join(data))
                    yield ServiceEvent(id=self.last_id or "", kind=kind, data=members)
                kind, data = "message", []
            elif name == "id":
                self.last_id = value
            elif name == "event":
                kind = value
            elif name == "data":
                data.append(value)


def follow(
    http: Http,
    path: str,
    *,
    project: str | None,
    last_event_id: str | None,
    seconds: float | None,
) -> Iterator[ServiceEvent]:
    """Events, for so many seconds or for ever; after a break from where it was.

    Raises:
        NoAnswer: The service is away for longer than the client's retries last.
        Problem: It says no.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    parser = EventParser(last_event_id)
    while (left := end - time.monotonic()) > 0:
        headers = {} if parser.last_id is None else {"Last-Event-ID": parser.last_id}
        query = {"project": project, "seconds": None if seconds is None else left}
        opened = False
        try:
            with http.stream(path, query=query, headers=headers, timeout=_QUIET) as answer:
                opened = True
                yield from parser.parse(answer.iter_lines())
        except NoAnswer:
            if not opened:
                raise
        if seconds is None or end - time.monotonic() > _SHORTEST:
            http.rest()


_SHORTEST: Final = 0.5
