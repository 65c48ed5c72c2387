"""Lets a request in, or says why not: tokens, the page's cookie, guesses, rates.

Everything a request needs comes from memory where it can; `recall` never waits for the database,
`admit` may. Both are plain calls that know no HTTP beyond the answer's status.
"""

from __future__ import annotations

import hmac
import logging
import math
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa

from foreshock.api.access.audit import AuditLog
from foreshock.api.access.principal import ANYONE, NOBODY, SCOPES, Grant, Principal, Scope
from foreshock.api.access.sessions import SessionBook
from foreshock.api.access.throttle import Failures, RateLimits, Rates
from foreshock.api.access.tokens import TokenBook, digest_of, id_of
from foreshock.api.problems import Problem
from foreshock.api.registry import Registry
from foreshock.api.settings import Settings, SettingsError, is_loopback

__all__ = ["BOOTSTRAP", "Access", "Credentials", "check_reach"]

_log = logging.getLogger(__name__)

# For so long a database that does not answer keeps nobody out; then nobody is let in.
_OLDEST_SECONDS: Final = 60.0

BOOTSTRAP: Final = Principal("bootstrap", "FORESHOCK_TOKEN", Grant(frozenset(SCOPES)))
"""Whoever brings the token of the settings: every scope, every project."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a request brings.

    Attributes:
        token: From the Authorization header.
        cookie: The page's; looked at only without a token.
        address: Where the request comes from.
    """

    token: str | None = field(default=None, repr=False)
    cookie: str | None = field(default=None, repr=False)
    address: str = ""


class Access:
    """The admission of one service; safe to use from any thread.

    Attributes:
        tokens: Its tokens.
        sessions: Sessions of the page.
        audit: The audit log.
        rates: Requests and bytes of each token.

    Args:
        registry: Its database holds the tables.
        settings: Bootstrap token, lifetimes and limits.
    """

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self.tokens = TokenBook(registry)
        self.sessions = SessionBook(registry)
        self.audit = AuditLog(registry, retention_days=settings.audit_days)
        self.rates = Rates(RateLimits(settings.token_requests, settings.token_bytes))
        self._failures = Failures()
        self._bootstrap = None if settings.token is None else digest_of(settings.token)
        self._session_lifetime = timedelta(hours=settings.session_hours)

    @property
    def open(self) -> bool:
        """Whether no token was ever set or made: whoever reaches the service may do everything."""
        return self._bootstrap is None and self.tokens.empty

    @property
    def usable(self) -> bool:
        """Whether somebody holds a token in force."""
        return self._bootstrap is not None or self.tokens.in_force(datetime.now(UTC))

    def close(self) -> None:
        """Write down what is only in memory."""
        self.tokens.flush()

    def recall(self, given: Credentials) -> Principal | None:
        """Who it is, if memory alone can tell; None says nothing yet."""
        if self.tokens.stale:
            return None
        if self.open:
            return replace(ANYONE, address=given.address)
        return None if given.token is None else self._by_token(given)

    def admit(self, given: Credentials) -> Principal:
        """Who it is.

        Raises:
            Problem: 401 without a token in force, 429 after too many wrong ones, 503 when the
                database has not answered for a minute.
        """
        self._refresh()
        known = self.recall(given)
        if known is not None:
            return known
        if self.open:
            return replace(ANYONE, address=given.address)
        if given.token is None and given.cookie is None:
            raise _unauthorized("this service needs a token: Authorization: Bearer <token>")
        principal = self._by_token(given) if given.token is not None else self._by_cookie(given)
        if principal is not None:
            return principal
        raise self._refused(given)

    def sign_in(self, text: str, scopes: frozenset[Scope], address: str) -> tuple[str, Principal]:
        """Open a session of the page.

        Args:
            text: A token.
            scopes: What the page may do; the token has to hold each.
            address: Where the request comes from.

        Returns:
            The cookie's value, and the principal of the session.

        Raises:
            Problem: As `admit`; 403, the token lacks one of the scopes.
        """
        principal = self.admit(Credentials(text, None, address))
        missing = [scope for scope in SCOPES if scope in scopes and not principal.may(scope)]
        if missing:
            raise Problem(403, f"this token has not the scope {missing[0]}")
        until = datetime.now(UTC) + self._session_lifetime
        cookie = self.sessions.open(principal.id, digest_of(text), scopes, until)
        self.audit.add("page.sign_in", principal, detail={"scopes": sorted(scopes)})
        return cookie, replace(principal, session=True, until=until)

    def sign_out(self, cookie: str, address: str) -> None:
        """End a session of the page, if it is one."""
        principal = self._by_cookie(Credentials(None, cookie, address))
        self.sessions.close(cookie)
        if principal is not None:
            self.audit.add("page.sign_out", principal)

    def holds(self, principal: Principal) -> bool:
        """Whether somebody let in earlier would still be let in; from memory."""
        now = datetime.now(UTC)
        if principal.until is not None and now >= principal.until:
            return False
        if principal.id in (ANYONE.id, BOOTSTRAP.id):
            return principal.id == BOOTSTRAP.id or self.open
        token = self.tokens.find(principal.id)
        return token is not None and token.lapsed(now) is None

    def refresh(self) -> None:
        """Notice what another process changed, if that is due."""
        self._refresh()

    def _refresh(self) -> None:
        if not self.tokens.stale:
            return
        try:
            self.tokens.refresh()
        except sa.exc.SQLAlchemyError as error:
            _log.error("the tokens could not be read: %s", type(error).__name__)
            if self.tokens.age > _OLDEST_SECONDS:
                problem = Problem(503, "the service cannot check tokens now")
                problem.headers["Retry-After"] = "1"
                raise problem from None

    def _by_token(self, given: Credentials) -> Principal | None:
        text = given.token or ""
        now = datetime.now(UTC)
        token = self.tokens.match(text, now)
        if token is not None:
            reason = token.lapsed(now)
            if reason is not None:
                # Told only to whoever has the secret.
                raise _unauthorized(f"token {token.id} ({token.name}) {reason}")
            self.tokens.used(token.id, now)
            return Principal(token.id, token.name, token.grant, given.address)
        # A made token cannot be guessed, so that a right one is let in at any time. A chosen one
        # might be: while its address has to wait, it is not even looked at.
        if self._bootstrap is None or self._failures.wait(given.address):
            return None
        if hmac.compare_digest(digest_of(text), self._bootstrap):
            return replace(BOOTSTRAP, address=given.address)
        return None

    def _by_cookie(self, given: Credentials) -> Principal | None:
        session = self.sessions.find(given.cookie or "")
        if session is None:
            return None
        holder = self._holder(session.token_id)
        if holder is None or not any(
            session.opened_with(given.cookie or "", digest) for digest in holder[1]
        ):
            return None
        name, grant = holder[0].name, holder[0].grant
        if grant is None:
            return None
        scopes = frozenset(scope for scope in session.scopes if grant.may(scope))
        if not scopes:
            return None
        return Principal(
            session.token_id,
            name,
            Grant(scopes, grant.projects),
            given.address,
            session=True,
            until=session.expires_at,
        )

    def _holder(self, token_id: str) -> tuple[Principal, tuple[str, ...]] | None:
        """Whom a session's token stands for, and the digests of its secrets that are in force."""
        if token_id == BOOTSTRAP.id:
            return None if self._bootstrap is None else (BOOTSTRAP, (self._bootstrap,))
        now = datetime.now(UTC)
        token = self.tokens.find(token_id)
        if token is None or token.lapsed(now) is not None:
            return None
        digests = (token.digest, token.previous_digest or "")
        return (
            Principal(token.id, token.name, token.grant),
            tuple(digest for digest in digests if digest and token.holds(digest, now)),
        )

    def _refused(self, given: Credentials) -> Problem:
        """Count a wrong secret; what to answer."""
        if (wait := self._failures.wait(given.address)) > 0:
            return _too_many(wait)
        secret = given.cookie if given.token is None else given.token
        verdict = self._failures.add(given.address, digest_of(secret or ""))
        stranger = replace(NOBODY, address=given.address)
        if verdict.fresh:
            means = "cookie" if given.token is None else "token"
            claimed = "" if given.token is None else (id_of(given.token) or "")
            self.audit.add_failure("auth.failed", stranger, means=means, claimed_id=claimed)
        if verdict.locked:
            self.audit.add_failure("auth.locked", stranger)
        if given.token is None:
            return _unauthorized("the session has ended; sign in again")
        return _unauthorized("that is not a token of this service")


def check_reach(settings: Settings, access: Access | None) -> None:
    """Refuse an address that others reach while nobody needs a token.

    Args:
        settings: With the address.
        access: None before there is a database.

    Raises:
        SettingsError: Says how to get a token.
    """
    if is_loopback(settings.host) or settings.token is not None:
        return
    if access is None or not access.usable:
        raise SettingsError(
            f"refusing to listen on {settings.host} without a token: anyone could read and write. "
            "Set FORESHOCK_TOKEN, make one with `foreshock token create`, or listen on 127.0.0.1"
        )


def _unauthorized(detail: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": "Bearer"})


def _too_many(wait: float) -> Problem:
    return Problem(
        429,
        "too many wrong tokens from this address",
        headers={"Retry-After": str(math.ceil(wait))},
    )
