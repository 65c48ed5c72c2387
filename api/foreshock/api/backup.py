"""Backup of a running service, and its way back into an empty data folder.

The registry is copied before the facts: whatever it knows as acknowledged is then among them, and
facts that came in between are removed by the next start, for no ledger row names them. Clients that
send those again are new to it. Only for a service with all its data in its own folder; servers of
ClickHouse and PostgreSQL have backups of their own.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from foreshock.api.settings import Settings
from foreshock.api.store import Store, StoreError
from foreshock.api.store_open import open_store, restore_store
from foreshock.api.store_sqlite import copy_sqlite
from foreshock.api.store_url import ServersPlace

__all__ = ["BACKUPS", "Backup", "BackupError", "make_backup", "restore_backup"]

BACKUPS: Final = "backups"
"""Folder of backups, beside the store."""

_FORMAT: Final = 1
_MANIFEST: Final = "backup.json"
_REGISTRY: Final = "registry.sqlite"
_STORE: Final = "store"


class BackupError(Exception):
    """What is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A complete backup.

    Attributes:
        folder: Where it is; it may be moved as a whole.
        bytes: Its size.
        began_at: What was acknowledged before is in it.
    """

    folder: Path
    bytes: int
    began_at: datetime


def make_backup(settings: Settings, store: Store) -> Backup:
    """Copy registry and store while the service goes on.

    Runs must not be deleted meanwhile: hold `Ingest.no_deletion`.

    Raises:
        BackupError: Part of the data is elsewhere, or the copy failed; nothing is left of it.
    """
    registry, place = settings.database_place.database, settings.store_place
    if isinstance(place, ServersPlace) or not _is_file(settings):
        raise BackupError(
            "the data is not all in this service's folder; use the backups of the database and of "
            "ClickHouse, the database first"
        )
    began, began_ns = datetime.now(UTC), time.time_ns()
    name = f"{began:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    folder = place.path.resolve().parent / BACKUPS / name
    try:
        folder.mkdir(parents=True)
        copy_sqlite(Path(str(registry)), folder / _REGISTRY)
        store.backup(folder / _STORE)
        manifest = {"format": _FORMAT, "began_at": began.isoformat(), "began_ns": began_ns}
        # Last: a folder with a manifest is whole.
        (folder / _MANIFEST).write_text(json.dumps(manifest))
    except (OSError, sqlite3.Error, StoreError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise BackupError(f"the backup failed: {error}") from error
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Backup(folder, size, began)


def restore_backup(folder: Path, settings: Settings) -> datetime:
    """Bring a backup back into a data folder without data.

    Args:
        folder: As `make_backup` left it, wherever it was moved to.
        settings: The data folder, and the kind of store that was backed up.

    Returns:
        When the backup began.

    Raises:
        BackupError: It is no complete backup, does not fit the settings, or there is data already.
    """
    folder = folder.resolve()
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        began, began_ns = datetime.fromisoformat(manifest["began_at"]), int(manifest["began_ns"])
    except (OSError, ValueError, KeyError, TypeError):
        raise BackupError(f"{folder} is no complete backup: {_MANIFEST} does not read") from None
    place = settings.store_place
    if isinstance(place, ServersPlace) or not _is_file(settings):
        raise BackupError("a backup goes into a data folder; unset FORESHOCK_STORE and _DATABASE")
    registry = Path(str(settings.database_place.database))
    if registry.exists():
        raise BackupError(f"{registry} exists; restore into an empty data folder")
    try:
        restore_store(place, folder / _STORE)
        _forget_later_risks(settings, began_ns)
        # Last: without it the folder does not look like a service's.
        copy_sqlite(folder / _REGISTRY, registry)
    except (OSError, sqlite3.Error, StoreError) as error:
        raise BackupError(f"the backup does not come back: {error}") from error
    return began


def _is_file(settings: Settings) -> bool:
    return settings.database_place.get_backend_name() == "sqlite"


def _forget_later_risks(settings: Settings, began_ns: int) -> None:
    # Their alerts are not in the registry; their records are scored again, if they come again.
    store = open_store(settings.store_place, lambda _: ())
    try:
        store.drop_risks_after(began_ns)
    finally:
        store.close()
