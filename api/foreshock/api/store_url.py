"""Where the store is: `FORESHOCK_STORE` read and checked. Opens nothing.

chdb:///path                               ClickHouse in this process (default: in the data folder)
sqlite:///path                             one SQLite file
clickhouse://user:password@host:8123/db    a ClickHouse server, over HTTP
clickhouse://user:password@h1,h2,h3/db     servers that know nothing of each other: a run is on one
clickhouse://user:password@host/db?cluster=name
                                           one endpoint of a replicated cluster
clickhouse://host/db?secure=true           over HTTPS (port 8443)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

__all__ = [
    "ChdbPlace",
    "ClickHouseServer",
    "ServersPlace",
    "SqlitePlace",
    "StorePlace",
    "StoreUrlError",
    "parse_store",
]

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PORTS: Final = {False: 8123, True: 8443}
_TRUTH: Final = {"true": True, "1": True, "false": False, "0": False}


class StoreUrlError(ValueError):
    """The address of the store does not read; the message says what is allowed."""


@dataclass(frozen=True, slots=True)
class ChdbPlace:
    """ClickHouse in this process.

    Attributes:
        path: Its folder; one process at a time.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class SqlitePlace:
    """One SQLite file.

    Attributes:
        path: The file; one process at a time.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class ClickHouseServer:
    """One HTTP endpoint of ClickHouse.

    Attributes:
        host: Name or address.
        port: TCP port.
    """

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersPlace:
    """ClickHouse servers.

    Attributes:
        servers: One server or endpoint, or several, each a shard of its own.
        database: Made if it is not there.
        user: Who signs in.
        password: With which secret.
        secure: Whether to use HTTPS.
        cluster: Name of the cluster that the one endpoint belongs to; empty for none.
    """

    servers: tuple[ClickHouseServer, ...]
    database: str = "foreshock"
    user: str = "default"
    password: str = field(default="", repr=False)
    secure: bool = False
    cluster: str = ""


StorePlace = ChdbPlace | SqlitePlace | ServersPlace

_ALLOWED: Final = (
    "allowed: chdb:///path, sqlite:///path, clickhouse://user:password@host:8123/db, several hosts "
    "with commas, ?cluster=name, ?secure=true"
)


def parse_store(url: str, data_dir: Path) -> StorePlace:
    """Read the address of a store.

    Args:
        url: The address; empty for the default.
        data_dir: Folder of the default.

    Raises:
        StoreUrlError: It is none; the message holds no password.
    """
    if not url:
        return ChdbPlace(data_dir / "store")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise StoreUrlError(f"the address of the store does not read; {_ALLOWED}") from None
    if parts.scheme == "chdb":
        return ChdbPlace(_path(parts))
    if parts.scheme == "sqlite":
        return SqlitePlace(_path(parts))
    if parts.scheme == "clickhouse":
        return _servers(parts)
    # The rest of the address may hold a password.
    raise StoreUrlError(f"the store is {parts.scheme or 'no address'}://...; {_ALLOWED}")


def _path(parts: SplitResult) -> Path:
    if parts.netloc or len(parts.path) < 2:
        raise StoreUrlError(
            f"{parts.scheme}:// needs three slashes and an absolute path, e.g. "
            f"{parts.scheme}:///var/lib/foreshock/store"
        )
    return Path(unquote(parts.path))


def _servers(parts: SplitResult) -> ServersPlace:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = set(options) - {"cluster", "secure"}
    if unknown:
        raise StoreUrlError(f"unknown options of the store: {', '.join(sorted(unknown))}")
    secure = _TRUTH.get(options.get("secure", "false").lower())
    if secure is None:
        raise StoreUrlError("secure of the store is true or false")
    signed, _, hosts = parts.netloc.rpartition("@")
    user, _, password = signed.partition(":")
    servers = tuple(_server(host, _PORTS[secure]) for host in hosts.split(","))
    database = unquote(parts.path.strip("/")) or "foreshock"
    cluster = options.get("cluster", "")
    for what, name in (("database", database), ("cluster", cluster or "none")):
        if not _NAME.fullmatch(name):
            raise StoreUrlError(f"the {what} of the store is a name of letters, digits and _")
    if cluster and len(servers) > 1:
        raise StoreUrlError("a cluster has one endpoint; several hosts are shards of their own")
    if len(set(servers)) < len(servers):
        raise StoreUrlError("a host stands twice in the address of the store")
    return ServersPlace(
        servers=servers,
        database=database,
        user=unquote(user) or "default",
        password=unquote(password),
        secure=secure,
        cluster=cluster,
    )


def _server(text: str, port: int) -> ClickHouseServer:
    found = re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?", text)
    if found is None:
        raise StoreUrlError(f"the store needs a host, or hosts with commas between; {_ALLOWED}")
    return ClickHouseServer(found[1].strip("[]"), int(found[2]) if found[2] else port)
