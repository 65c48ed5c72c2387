"""Tokens: made, kept as digests, checked, rotated and revoked.

A token is `fsk_<id>_<secret>`: the id finds its row, the secret is 32 bytes from the system's
random source. Its SHA-256 is what is stored. A slow password hash would add nothing: it protects
secrets that a dictionary holds, and nobody searches 2**256; it would only make every request of a
training job slow.

Checks come from memory, refreshed from the database at most every `REFRESH_SECONDS`, so that a
revocation by another process is in force within that time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from foreshock.api.access.principal import SCOPES, Grant, GrantError
from foreshock.api.access.tables import tokens
from foreshock.api.registry import Registry, metadata

__all__ = [
    "REFRESH_SECONDS",
    "IssuedToken",
    "Token",
    "TokenBook",
    "UnknownToken",
    "digest_of",
    "id_of",
]

REFRESH_SECONDS: Final = 2.0
_FLUSH_SECONDS: Final = 60.0
_FORM: Final = re.compile(r"fsk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_SECRET_BYTES: Final = 32
_LONGEST_NAME: Final = 128
# Compared with when there is no such token, so that the time does not tell which ids exist.
_NO_DIGEST: Final = "0" * 64


class UnknownToken(LookupError):
    """There is no token of this id that can be changed."""


def digest_of(text: str) -> str:
    """SHA-256 of a secret, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def id_of(text: str) -> str | None:
    """The id in a token made here; None for any other text."""
    found = _FORM.fullmatch(text)
    return None if found is None else found[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token as the service knows it; its secret is not here.

    Attributes:
        id: Public; stands in the token, the audit log and `foreshock token list`.
        name: For people.
        grant: What it allows.
        created_by: Name of the token, or of the account on the service's machine, that made it.
        issued_at: When its present secret was made.
        expires_at: None = never.
        revoked_at: None = in force.
        previous_until: Until when the secret before the last rotation is taken.
        last_used: To the minute or so; None = never.
    """

    id: str
    name: str
    grant: Grant
    created_at: datetime
    created_by: str
    issued_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    previous_until: datetime | None
    last_used: datetime | None
    digest: str = field(repr=False)
    previous_digest: str | None = field(repr=False)

    def holds(self, digest: str, now: datetime) -> bool:
        """Whether a digest is that of a secret of this token, expired and revoked ones too."""
        present = hmac.compare_digest(digest, self.digest)
        earlier = hmac.compare_digest(digest, self.previous_digest or _NO_DIGEST)
        return present or (
            earlier and self.previous_until is not None and now < self.previous_until
        )

    def lapsed(self, now: datetime) -> str | None:
        """Why it is not in force; None while it is."""
        if self.revoked_at is not None:
            return "was revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "has expired"
        return None


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A token with its secret, which is shown once and kept nowhere."""

    token: Token
    secret: str = field(repr=False)


class TokenBook:
    """The tokens of one service; safe to use from any thread.

    Args:
        registry: Its database holds the table, which is made if it is missing.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._known: Mapping[str, Token] = {}
        self._read_at = -float("inf")
        self._used: dict[str, datetime] = {}
        self._flushed_at = time.monotonic()
        with registry.write() as connection:
            metadata.create_all(connection, tables=[tokens])
        self.refresh()

    @property
    def stale(self) -> bool:
        """Whether `refresh` is due."""
        return time.monotonic() - self._read_at >= REFRESH_SECONDS

    @property
    def age(self) -> float:
        """Seconds since the table was read."""
        return time.monotonic() - self._read_at

    @property
    def empty(self) -> bool:
        """Whether no token was ever made; revoked and expired ones count."""
        return not self._known

    def in_force(self, now: datetime) -> bool:
        """Whether there is a token that is neither revoked nor expired."""
        return any(token.lapsed(now) is None for token in self._known.values())

    def refresh(self) -> None:
        """Read the table; of several callers at a time only one does."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._load()
            if time.monotonic() - self._flushed_at >= _FLUSH_SECONDS:
                self._flush()
        finally:
            self._lock.release()

    def flush(self) -> None:
        """Write down when the tokens were last used."""
        with self._lock:
            self._flush()

    def list(self) -> list[Token]:
        """All tokens as they are in the database, oldest first."""
        with self._lock:
            self._load()
            return list(self._known.values())

    def find(self, token_id: str) -> Token | None:
        """A token by id, from memory."""
        return self._known.get(token_id)

    def match(self, text: str, now: datetime) -> Token | None:
        """The token whose secret this is, in force or not; as slow for any wrong one."""
        token = self._known.get(id_of(text) or "")
        digest = digest_of(text)
        if token is None:
            hmac.compare_digest(digest, _NO_DIGEST)
            return None
        return token if token.holds(digest, now) else None

    def used(self, token_id: str, now: datetime) -> None:
        """Note a use in memory; written with the next flush, not per request."""
        self._used[token_id] = now

    def create(
        self, name: str, grant: Grant, *, by: str, lifetime: timedelta | None = None
    ) -> IssuedToken:
        """Make a token.

        Args:
            name: For people; need not be unique.
            grant: What it allows.
            by: Who makes it.
            lifetime: Until it expires; None = never.

        Raises:
            GrantError: The name is empty or too long, or the lifetime is not positive.
        """
        if not 1 <= len(name.strip()) <= _LONGEST_NAME or not name.isprintable():
            raise GrantError(f"a token's name has 1 to {_LONGEST_NAME} printable characters")
        _check_lifetime(lifetime)
        now = datetime.now(UTC)
        token_id, secret = _new_secret()
        row = {
            "id": token_id,
            "name": name.strip(),
            "digest": digest_of(secret),
            "scopes": _scopes_text(grant),
            "projects": None if grant.projects is None else json.dumps(sorted(grant.projects)),
            "created_at": now,
            "created_by": by[:256],
            "issued_at": now,
            "expires_at": None if lifetime is None else now + lifetime,
        }
        with self._lock, self._registry.write() as connection:
            connection.execute(tokens.insert().values(row))
        return IssuedToken(self._read(token_id), secret)

    def revoke(self, token_id: str) -> Token:
        """End a token at once, whatever secret of it is used.

        Raises:
            UnknownToken: There is none; a second revocation changes nothing and is no error.
        """
        self._read(token_id)
        change = tokens.update().where(tokens.c.id == token_id, tokens.c.revoked_at.is_(None))
        with self._lock, self._registry.write() as connection:
            connection.execute(change.values(revoked_at=datetime.now(UTC)))
        return self._read(token_id)

    def rotate(self, token_id: str, *, grace: timedelta) -> IssuedToken:
        """Give a token a new secret; the one before is taken for the grace period.

        A token with an end gets the same lifetime anew.

        Args:
            token_id: Which.
            grace: How long the secret before is taken; zero ends it at once.

        Raises:
            UnknownToken: There is none, or it was revoked.
            GrantError: The grace period is negative.
        """
        if grace < timedelta(0):
            raise GrantError("the grace period is negative; allowed: 0 or more")
        now = datetime.now(UTC)
        _, secret = _new_secret(token_id)
        with self._lock, self._registry.write() as connection:
            query = sa.select(tokens).where(tokens.c.id == token_id)
            row = connection.execute(query).one_or_none()
            if row is None or row.revoked_at is not None:
                raise UnknownToken(f"there is no token {token_id!r} in force")
            old = _token(row)
            ends = now + grace
            values: dict[str, Any] = {"digest": digest_of(secret), "issued_at": now}
            if old.expires_at is not None:
                ends = min(ends, old.expires_at)
                values["expires_at"] = now + (old.expires_at - old.issued_at)
            values |= {"previous_digest": old.digest, "previous_until": ends}
            connection.execute(tokens.update().where(tokens.c.id == token_id).values(values))
        return IssuedToken(self._read(token_id), secret)

    def _read(self, token_id: str) -> Token:
        with self._lock:
            self._load()
        found = self._known.get(token_id)
        if found is None:
            raise UnknownToken(f"there is no token {token_id!r}")
        return found

    def _load(self) -> None:
        query = sa.select(tokens).order_by(tokens.c.created_at, tokens.c.id)
        with self._registry.engine.begin() as connection:
            rows = connection.execute(query).all()
        self._known = {row.id: _token(row) for row in rows}
        self._read_at = time.monotonic()

    def _flush(self) -> None:
        used, self._used = self._used, {}
        self._flushed_at = time.monotonic()
        if not used:
            return
        rows = [{"of_id": token_id, "at": at} for token_id, at in used.items()]
        with self._registry.write() as connection:
            connection.execute(_TOUCH, rows)


_TOUCH: Final = (
    tokens.update()
    .where(tokens.c.id == sa.bindparam("of_id"))
    .values(last_used=sa.bindparam("at", type_=sa.DateTime(timezone=True)))
)


def _check_lifetime(lifetime: timedelta | None) -> None:
    if lifetime is not None and lifetime <= timedelta(0):
        raise GrantError("the lifetime is not positive; leave it out for a token without an end")


def _new_secret(token_id: str | None = None) -> tuple[str, str]:
    token_id = token_id or secrets.token_hex(6)
    return token_id, f"fsk_{token_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"


def _scopes_text(grant: Grant) -> str:
    return " ".join(scope for scope in SCOPES if scope in grant.scopes)


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


def _maybe_utc(value: datetime | None) -> datetime | None:
    return None if value is None else _utc(value)


def _token(row: Any) -> Token:
    projects = None if row.projects is None else frozenset(json.loads(row.projects))
    return Token(
        id=row.id,
        name=row.name,
        grant=Grant(frozenset(row.scopes.split()), projects),
        created_at=_utc(row.created_at),
        created_by=row.created_by,
        issued_at=_utc(row.issued_at),
        expires_at=_maybe_utc(row.expires_at),
        revoked_at=_maybe_utc(row.revoked_at),
        previous_until=_maybe_utc(row.previous_until),
        last_used=_maybe_utc(row.last_used),
        digest=row.digest,
        previous_digest=row.previous_digest,
    )
