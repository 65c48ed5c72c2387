"""ClickHouse in this process: a pool of clients, limits on every query, and a watch over hung ones.

One process per path and no fork while it is open: a query in a forked child hangs for ever. Knows
no table.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError

__all__ = ["Engine", "Limits", "StoreBusy", "StoreError", "Writer"]

_GRACE_SECONDS: Final = 10.0


class StoreError(Exception):
    """The engine refused or failed; nothing may be acknowledged on its account."""


class StoreBusy(StoreError):
    """Every client has been in use for too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one query may cost.

    Attributes:
        seconds: Run time after which the engine ends it.
        memory_bytes: Memory after which the engine ends it.
        clients: Queries at the same time; more wait for their turn.
    """

    seconds: int = 30
    memory_bytes: int = 2 * 1024**3
    clients: int = 4


class Writer:
    """Writes through one client."""

    def __init__(self, client: Client, watched: Callable[[], AbstractContextManager[None]]) -> None:
        self._client = client
        self._watched = watched

    def insert(self, table: str, rows: pa.Table) -> None:
        """Insert rows.

        Raises:
            StoreError: It failed; some of the rows may be in.
        """
        with self._watched():
            self._client.insert_arrow(table, rows)

    def command(self, sql: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Run a statement without rows.

        Raises:
            StoreError: It failed.
        """
        with self._watched():
            self._client.command(sql, parameters=dict(parameters or {}))


class Engine:
    """The engine under one folder."""

    def __init__(self, path: Path, limits: Limits) -> None:
        """Open the engine.

        Raises:
            StoreError: The folder cannot be used, usually because another process has it open.
        """
        self._limits = limits
        self._path = path
        self._running: dict[int, float] = {}
        self._lock = threading.Lock()
        self._clients: list[Client] = []
        self._idle: queue.LifoQueue[Client] = queue.LifoQueue()
        try:
            for _ in range(limits.clients):
                self._idle.put(self._connect())
        except (ClickHouseError, RuntimeError, OSError) as error:
            self.close()
            raise StoreError(
                f"the store in {path} does not open; is another foreshock using it? "
                f"({_first(error)})"
            ) from error

    def _connect(self) -> Client:
        client = clickhouse_connect.get_client(
            interface="chdb",
            path=str(self._path),
            settings={
                "max_execution_time": self._limits.seconds,
                "max_memory_usage": self._limits.memory_bytes,
            },
        )
        self._clients.append(client)
        return client

    def close(self) -> None:
        """Close every client; the folder is free afterwards."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def hung_seconds(self) -> float:
        """How far the oldest running query is past the limit that should have ended it; 0 if none.

        Anything above 0 means that the engine no longer keeps its own limits.
        """
        with self._lock:
            oldest = min(self._running.values(), default=None)
        if oldest is None:
            return 0.0
        return max(0.0, time.monotonic() - oldest - self._limits.seconds - _GRACE_SECONDS)

    def read(self, sql: str, parameters: Mapping[str, Any]) -> pa.Table:
        """Run a query with bound parameters.

        Raises:
            StoreError: It failed or passed a limit.
        """
        try:
            client = self._idle.get(timeout=self._limits.seconds)
        except queue.Empty:
            raise StoreBusy("the store is busy; try again") from None
        try:
            with self.watched():
                table: pa.Table = client.query_arrow(sql, parameters=dict(parameters))
        finally:
            self._idle.put(client)
        return table

    def writer(self) -> Writer:
        """A way to write with a client of its own; one thread at a time may use it."""
        return Writer(self._connect(), self.watched)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count a query as running and turn the engine's errors into `StoreError`."""
        token = object()
        with self._lock:
            self._running[id(token)] = time.monotonic()
        try:
            yield
        except (ClickHouseError, RuntimeError, OSError, pa.ArrowInvalid) as error:
            raise StoreError(_first(error)) from error
        finally:
            with self._lock:
                del self._running[id(token)]


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
