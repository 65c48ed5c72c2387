"""Where the store is: `FORESHOCK_STORE` read and checked. Opens nothing.

chdb:///path        ClickHouse in this process, over a folder (the default, in the data folder)
    sqlite:///path      one SQLite file
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

__all__ = ["ChdbPlace", "SqlitePlace", "StorePlace", "StoreUrlError", "parse_store"]


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


StorePlace = ChdbPlace | SqlitePlace

_ALLOWED: Final = "allowed: chdb:///path, sqlite:///path"


def parse_store(url: str, data_dir: Path) -> StorePlace:
    """Read the address of a store.

    Args:
        url: The address; empty for the default.
        data_dir: Folder of the default.

    Raises:
        StoreUrlError: It is none.
    """
    if not url:
        return ChdbPlace(data_dir / "store")
    parts = urlsplit(url)
    if parts.scheme == "chdb":
        return ChdbPlace(_path(url))
    if parts.scheme == "sqlite":
        return SqlitePlace(_path(url))
    # The rest of the address may hold a password.
    raise StoreUrlError(f"the store is {parts.scheme or 'no address'}://...; {_ALLOWED}")


def _path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc or len(parts.path) < 2:
        raise StoreUrlError(
            f"{parts.scheme}:// needs three slashes and an absolute path, e.g. "
            f"{parts.scheme}:///var/lib/foreshock/store"
        )
    return Path(unquote(parts.path))
