"""Access to ClickHouse: a pool of clients, limits on every query, and a watch over hung ones.

`open_chdb` runs the engine in this process: one process per path and no fork while it is open, for
a query in a forked child hangs for ever. Knows no table.
"""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from foreshock.api.store import Limits, StoreBusy, StoreError, StoreUnreachable
from foreshock.api.store_schema import create_database
from foreshock.api.store_url import ClickHouseServer, ServersPlace
from foreshock.api.store_watch import Watch

__all__ = ["DATABASE", "Engine", "Writer", "open_chdb", "open_server"]

DATABASE: Final = "foreshock"
"""Where the tables lie, unless the address of a server names another database."""
_LOOK_SECONDS: Final = 0.05


class Writer:
    """Writes through one client."""

    def __init__(self, client: Client, watched: Callable[[], AbstractContextManager[None]]) -> None:
        self._client = client
        self._watched = watched

    def insert(self, table: str, rows: pa.Table, settings: Mapping[str, Any] | None = None) -> None:
        """Insert rows, under settings of the engine for this INSERT alone.

        Raises:
            StoreError: It failed; some of the rows may be in.
        """
        with self._watched():
            self._client.insert_arrow(table, rows, settings=dict(settings or {}))

    def command(self, sql: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Run a statement without rows.

        Raises:
            StoreError: It failed.
        """
        with self._watched():
            self._client.command(sql, parameters=dict(parameters or {}))


class Engine:
    """Clients of one place where ClickHouse runs.

    Args:
        connect: Makes a client whose queries keep the limits.
        limits: What one query may cost.
        folder: The disk to watch, where it is this machine's.
    """

    def __init__(
        self, connect: Callable[[], Client], limits: Limits, folder: Path | None = None
    ) -> None:
        """Make the clients.

        Raises:
            ClickHouseError: There is no such place (see `open_chdb` for a message to show).
        """
        self._connect_one = connect
        self._limits = limits
        self._folder = folder
        self._watch = Watch(limits.seconds)
        self._clients: list[Client] = []
        self._idle: queue.LifoQueue[Client] = queue.LifoQueue()
        try:
            for _ in range(limits.clients):
                self._idle.put(self._connect())
        except BaseException:
            self.close()
            raise

    def _connect(self) -> Client:
        client = self._connect_one()
        self._clients.append(client)
        return client

    def close(self) -> None:
        """Close every client; the folder is free afterwards."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def free_bytes(self) -> int | None:
        """Free space on the engine's disk; None if that is not this machine's."""
        return None if self._folder is None else shutil.disk_usage(self._folder).free

    def hung_seconds(self) -> float:
        """See `Watch.hung_seconds`."""
        return self._watch.hung_seconds()

    def backup(self, folder: Path) -> None:
        """Write a copy of the database into a new folder below the one that is allowed.

        Raises:
            StoreError: It failed, or this engine runs on a server.
        """
        if self._folder is None:
            raise StoreError(
                "ClickHouse servers have backups of their own: BACKUP DATABASE foreshock"
            )
        self._wait_for(f"BACKUP DATABASE {DATABASE} TO File({{folder:String}})", folder)

    def restore(self, folder: Path) -> None:
        """Bring back what `backup` wrote, into an empty database.

        Raises:
            StoreError: It failed.
        """
        self._wait_for(f"RESTORE DATABASE {DATABASE} FROM File({{folder:String}})", folder)

    def _wait_for(self, sql: str, folder: Path) -> None:
        # In the background: it takes as long as there is data, longer than a query may.
        found = self.read(f"{sql} ASYNC", {"folder": str(folder)})
        query = "SELECT toString(status) AS state, error FROM system.backups WHERE id = {id:String}"
        while True:
            state = self.read(query, {"id": found["id"][0].as_py()}).to_pylist()[0]
            if state["error"] or state["state"] in ("BACKUP_CANCELLED", "RESTORE_CANCELLED"):
                raise StoreError((state["error"] or state["state"]).splitlines()[0][:300])
            if state["state"] in ("BACKUP_CREATED", "RESTORED"):
                return
            time.sleep(_LOOK_SECONDS)

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
        with self._watch.running():
            try:
                yield
            except (ClickHouseError, RuntimeError, OSError, pa.ArrowInvalid) as error:
                raise _store_error(error) from error


def open_chdb(path: Path, limits: Limits, backups: Path | None = None) -> Engine:
    """ClickHouse in this process, over a folder of its own.

    Args:
        path: That folder.
        limits: What one query may cost.
        backups: Below it, `backup` may write and `restore` read; default: beside the store.

    Raises:
        StoreError: The folder cannot be used, usually because another process has it open.
    """
    settings = _settings(limits)
    allowed = (backups or path.parent / "backups").resolve()

    def connect(database: str | None = DATABASE) -> Client:
        return clickhouse_connect.get_client(
            interface="chdb",
            path=str(path),
            database=database,
            settings=settings,
            chdb_options={"backups.allowed_path": str(allowed)},
        )

    try:
        first = connect(None)
        try:
            first.command(create_database(DATABASE))
            return Engine(connect, limits, path)
        finally:
            first.close()
    except (ClickHouseError, RuntimeError, OSError) as error:
        raise StoreError(
            f"the store in {path} does not open; is another foreshock using it? ({_first(error)})"
        ) from error


def open_server(server: ClickHouseServer, place: ServersPlace, limits: Limits) -> Engine:
    """One of the servers of a place, over HTTP; its database is made.

    Raises:
        StoreUnreachable: It does not answer.
        StoreError: It refuses.
    """

    def connect(database: str | None = place.database) -> Client:
        return clickhouse_connect.get_client(
            host=server.host,
            port=server.port,
            username=place.user,
            password=place.password,
            secure=place.secure,
            database=database,
            settings=_settings(limits) | (_CLUSTER_SETTINGS if place.cluster else {}),
            connect_timeout=_CONNECT_SECONDS,
            # Longer than the server's own limit, which gives the better message.
            send_receive_timeout=limits.seconds + 10,
            # Clients are taken by one thread at a time, and a session would only tie them down.
            autogenerate_session_id=False,
        )

    where = f"the store at {server.host}:{server.port}"
    try:
        first = connect(None)
        try:
            first.command(create_database(place.database, place.cluster))
        finally:
            first.close()
        return Engine(connect, limits)
    except (ClickHouseError, RuntimeError, OSError) as error:
        failure = _store_error(error)
        raise type(failure)(f"{where} does not open: {failure}") from error


# Where a run's shard is known from its id, only that shard is asked, and the query that picks
# attempts stays on the shard it runs on. An INSERT returns once its shard has it.
_CLUSTER_SETTINGS: Final[dict[str, Any]] = {
    "insert_distributed_sync": 1,
    "insert_quorum": "auto",
    "optimize_skip_unused_shards": 1,
    "distributed_product_mode": "local",
}
_CONNECT_SECONDS: Final = 5


def _store_error(error: BaseException) -> StoreError:
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            break
        if isinstance(cause, NewConnectionError | ConnectTimeoutError):
            return StoreUnreachable("there is no connection")
        cause = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
    return StoreError(_first(error))


def _settings(limits: Limits) -> dict[str, Any]:
    return {"max_execution_time": limits.seconds, "max_memory_usage": limits.memory_bytes}


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
