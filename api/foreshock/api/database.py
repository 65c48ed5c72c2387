"""Where the registry's tables are: SQLite in the data folder, or PostgreSQL that replicas share.

One write transaction at a time in either: reading, deciding and writing in one needs no further
thought. SQLite locks its file for it, PostgreSQL takes an advisory lock, for the length of the
transaction and over all replicas. Knows no table.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError, SQLAlchemyError

__all__ = ["DATABASE_LOST", "Database", "DatabaseUrlError", "database_url"]

_SQLITE: Final = "sqlite"
_POSTGRESQL: Final = "postgresql"
_LOCK_SECONDS: Final = 30
_CONNECT_SECONDS: Final = 5


DATABASE_LOST: Final = (OperationalError, InterfaceError)
"""What is raised when the database does not answer; the same again may work a little later."""


class DatabaseUrlError(ValueError):
    """The address of the database does not read; the message says what is allowed."""


def database_url(text: str, data_dir: Path) -> sa.URL:
    """Read the address of the database.

    Args:
        text: `sqlite:////path` or `postgresql+psycopg://user:password@host/name`; empty for SQLite
            in the data folder.
        data_dir: That folder.

    Raises:
        DatabaseUrlError: It is none; the message holds no password.
    """
    if not text:
        return sa.URL.create(_SQLITE, database=str(data_dir / "registry.sqlite"))
    try:
        url = sa.make_url(text)
    except ArgumentError:
        raise DatabaseUrlError(f"the address of the database does not read; {_ALLOWED}") from None
    backend = url.get_backend_name()
    if backend == _POSTGRESQL:
        return url.set(drivername="postgresql+psycopg")
    if backend == _SQLITE and url.database:
        return url
    raise DatabaseUrlError(f"the database is {backend}://...; {_ALLOWED}")


_ALLOWED: Final = (
    "allowed: sqlite:////path/to/file, postgresql+psycopg://user:password@host:5432/name"
)


class Database:
    """Connections to the registry's database; safe to use from any thread.

    Attributes:
        engine: For reading, in `engine.begin()`.
        shared: Whether other processes may write too.
    """

    def __init__(self, url: sa.URL) -> None:
        self.shared = url.get_backend_name() == _POSTGRESQL
        if self.shared:
            # Asks a connection whether it lives before it is used: the server may have restarted.
            self.engine = sa.create_engine(
                url,
                pool_pre_ping=True,
                pool_size=16,
                max_overflow=32,
                connect_args={
                    "connect_timeout": _CONNECT_SECONDS,
                    "options": f"-c lock_timeout={_LOCK_SECONDS}s -c timezone=UTC",
                },
            )
        else:
            self.engine = sa.create_engine(url)
            sa.event.listen(self.engine, "connect", _on_connect)
            sa.event.listen(self.engine, "begin", _on_begin)
        self._lock = threading.RLock()
        self._reserved: list[sa.Connection] = []

    def answers(self) -> bool:
        """Whether the database can be asked now."""
        try:
            with self.engine.begin() as connection:
                connection.execute(sa.text("SELECT 1"))
        except SQLAlchemyError:
            return False
        return True

    def now(self) -> float:
        """Seconds since 1970 by the database's clock, which all replicas share."""
        sql = _POSTGRESQL_NOW if self.shared else _SQLITE_NOW
        with self.engine.begin() as connection:
            return float(connection.execute(sql).scalar_one())

    def close(self) -> None:
        """Give the connections back."""
        for connection in self._reserved:
            # The server frees what was taken once the connection ends, not once it is given back.
            connection.invalidate()
            connection.close()
        self._reserved.clear()
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A write transaction; one at a time, committed with a disk sync on leaving."""
        if self.shared:
            with self.engine.begin() as connection:
                _lock(connection, [_WRITERS])
                yield connection
            return
        with self._lock, self.engine.connect() as connection:
            connection = connection.execution_options(foreshock_write=True)
            with connection.begin():
                yield connection

    def reserve(self, name: str) -> bool:
        """Take a name for as long as this object lives; whether nobody else has it."""
        if not self.shared:
            return True
        connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        taken = connection.execute(
            sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": _key(name)}
        ).scalar_one()
        self._reserved.append(connection)
        return bool(taken)

    @contextmanager
    def holding(self, names: Iterable[str]) -> Iterator[None]:
        """Hold names against all replicas; returns once nobody else holds one of them.

        Without replicas nothing is held. If the connection breaks, so does the hold.
        """
        keys = sorted({_key(name) for name in names})
        if not self.shared or not keys:
            yield
            return
        with self.engine.begin() as connection:
            _lock(connection, keys)
            yield


_POSTGRESQL_NOW: Final = sa.text(
    "SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)"
)
_SQLITE_NOW: Final = sa.text("SELECT (julianday('now') - 2440587.5) * 86400.0")


def _key(name: str) -> int:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


_WRITERS: Final = _key("foreshock writers")


def _lock(connection: sa.Connection, keys: list[int]) -> None:
    # In rising order, so that two who want several never wait for each other.
    connection.execute(
        sa.text("SELECT pg_advisory_xact_lock(k) FROM unnest(CAST(:keys AS bigint[])) AS k"),
        {"keys": keys},
    )


def _on_connect(connection: Any, _: object) -> None:
    # SQLAlchemy's begin event starts the transaction, so that a writer can take its lock at once:
    # a reader that turns writer would fail at once instead of waiting.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: sa.Connection) -> None:
    writing = connection.get_execution_options().get("foreshock_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
