"""Sessions of the page: a token given once becomes a cookie that ends by itself.

The cookie is a random name of the session, not the token. A session lasts no longer than the secret
it was opened with: its row holds an HMAC of that secret's digest under the cookie, so that a
rotated, revoked or changed token ends it, and the row alone tells neither.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from foreshock.api.access.principal import SCOPES, Scope
from foreshock.api.access.tables import sessions
from foreshock.api.access.tokens import REFRESH_SECONDS, digest_of
from foreshock.api.registry import Registry, metadata

__all__ = ["Session", "SessionBook"]

_COOKIE_BYTES: Final = 32
_MOST_KEPT: Final = 1024


@dataclass(frozen=True, slots=True)
class Session:
    """One signed-in page.

    Attributes:
        token_id: The token it was opened with.
        mark: HMAC of that secret's digest under the cookie.
        scopes: What it may do, if its token still may.
        expires_at: When it ends.
    """

    token_id: str
    mark: str
    scopes: frozenset[Scope]
    expires_at: datetime

    def opened_with(self, cookie: str, digest: str) -> bool:
        """Whether it was opened with the secret of this digest."""
        return hmac.compare_digest(self.mark, _mark(cookie, digest))


class SessionBook:
    """The sessions of one service; safe to use from any thread.

    Args:
        registry: Its database holds the table, which is made if it is missing.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        # Bounded, and short-lived: signing out elsewhere has to be noticed.
        self._kept: OrderedDict[str, tuple[float, Session]] = OrderedDict()
        with registry.write() as connection:
            metadata.create_all(connection, tables=[sessions])

    def open(self, token_id: str, digest: str, scopes: frozenset[Scope], until: datetime) -> str:
        """Open a session that ends at `until`, and remove those that have ended.

        Returns:
            The cookie's value.
        """
        cookie = secrets.token_urlsafe(_COOKIE_BYTES)
        now = datetime.now(UTC)
        row = {
            "digest": digest_of(cookie),
            "token_id": token_id,
            "mark": _mark(cookie, digest),
            "scopes": " ".join(scope for scope in SCOPES if scope in scopes),
            "created_at": now,
            "expires_at": until,
        }
        with self._registry.write() as connection:
            connection.execute(sessions.delete().where(sessions.c.expires_at <= now))
            connection.execute(sessions.insert().values(row))
        return cookie

    def find(self, cookie: str) -> Session | None:
        """The session of a cookie, if it has not ended; may read the database."""
        key = digest_of(cookie)
        session = self._remembered(key)
        if session is None:
            with self._registry.engine.begin() as connection:
                query = sa.select(sessions).where(sessions.c.digest == key)
                row = connection.execute(query).one_or_none()
            if row is None:
                return None
            session = _session(row)
            self._remember(key, session)
        return session if datetime.now(UTC) < session.expires_at else None

    def close(self, cookie: str) -> None:
        """End a session."""
        key = digest_of(cookie)
        with self._lock:
            self._kept.pop(key, None)
        with self._registry.write() as connection:
            connection.execute(sessions.delete().where(sessions.c.digest == key))

    def _remembered(self, key: str) -> Session | None:
        with self._lock:
            known = self._kept.get(key)
            if known is None or time.monotonic() - known[0] >= REFRESH_SECONDS:
                return None
            return known[1]

    def _remember(self, key: str, session: Session) -> None:
        with self._lock:
            self._kept[key] = (time.monotonic(), session)
            self._kept.move_to_end(key)
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)


def _mark(cookie: str, digest: str) -> str:
    return hmac.new(cookie.encode(), digest.encode(), hashlib.sha256).hexdigest()


def _session(row: Any) -> Session:
    at: datetime = row.expires_at
    expires_at = at.replace(tzinfo=UTC) if at.tzinfo is None else at
    return Session(row.token_id, row.mark, frozenset(row.scopes.split()), expires_at)
