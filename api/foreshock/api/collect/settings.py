"""What a relay is told at start; frozen, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext
from typing import Final
from urllib.parse import urlsplit

from foreshock.api.settings import Settings, SettingsError

__all__ = ["CollectSettings"]

_MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """Settings of one relay.

    Attributes:
        door: Folder, address, port, token and limits, as of a service; one process per folder.
        upstream: Base address of the service, or of the next relay.
        upstream_is_relay: Then reports are joined and passed on; else they go into the records.
        upstream_token: Bearer token for it.
        authorities: Who may vouch for it; None takes the system's, or those of SSL_CERT_FILE.
        wait_seconds: Longest time that a batch waits for reports of its steps.
        interval_seconds: Time between two bundles to the next relay.
        max_bytes: Bound on batches on disk; beyond it new ones get 503.
        most_steps: Steps of a launch for which reports wait in memory.
        most_launches: Launches whose reports are in memory.

    Raises:
        SettingsError: A value is out of range.
    """

    door: Settings
    upstream: str
    upstream_is_relay: bool = False
    upstream_token: str | None = field(default=None, repr=False)
    authorities: SSLContext | None = field(default=None, repr=False)
    wait_seconds: float = 5.0
    interval_seconds: float = 1.0
    max_bytes: int = 1024 * _MEBIBYTE
    most_steps: int = 1024
    most_launches: int = 64

    @property
    def folder(self) -> Path:
        """Where batches wait."""
        return self.door.data_dir

    def __post_init__(self) -> None:
        _check_address(self.upstream)
        if not (math.isfinite(self.wait_seconds) and 0 <= self.wait_seconds <= 300):
            raise SettingsError(f"wait is {self.wait_seconds}; allowed: 0 to 300 seconds")
        if not 0.01 <= self.interval_seconds <= 60:
            raise SettingsError(f"interval is {self.interval_seconds}; allowed: 0.01 to 60 seconds")
        for name in ("max_bytes", "most_steps", "most_launches"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def _check_address(upstream: str) -> None:
    wrong = f"upstream is {upstream!r}; allowed: http://host:port or https://host:port"
    try:
        parts = urlsplit(upstream)
        port = parts.port
    except ValueError as error:
        raise SettingsError(f"{wrong} ({error})") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise SettingsError(wrong)
    if any(character.isspace() for character in upstream):
        raise SettingsError(wrong)
