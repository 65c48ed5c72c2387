"""The audit log: who changed what, and who was turned away; rows are only ever added.

They go when they are older than the retention. Never holds a secret: callers pass ids and names,
and of a wrong secret nothing at all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa

from foreshock.api.access.principal import Principal
from foreshock.api.access.tables import audit
from foreshock.api.registry import Registry, metadata

__all__ = ["Action", "AuditEntry", "AuditLog", "Detail"]

Action = Literal[
    "token.create",
    "token.revoke",
    "token.rotate",
    "launch.announce",
    "run.delete",
    "run.end",
    "service.backup",
    "alert.feedback",
    "alert.acknowledge",
    "alert.snooze",
    "alert.unmute",
    "page.sign_in",
    "page.sign_out",
    "auth.failed",
    "auth.locked",
]
"""What is logged."""

Detail = str | int | bool | None | list[str]
"""A value of an entry's detail."""

_PRUNE_SECONDS: Final = 3600.0
# Strangers may fill the log only so fast.
_FAILURES_PER_SECOND: Final = 2.0
_FAILURE_BURST: Final = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the log.

    Attributes:
        id: Rises in the order of writing.
        at: When.
        action: What happened.
        actor_id: Id of the token; `nobody` before one was accepted.
        actor: Its name.
        address: Where the request came from; `local` for the command line.
        project: The project it touched; None = none, or all.
        subject: What it touched: a run, an alert's or a token's id.
        detail: More, by name.
    """

    id: int
    at: datetime
    action: str
    actor_id: str
    actor: str
    address: str
    project: str | None
    subject: str | None
    detail: Mapping[str, Any]


class AuditLog:
    """The log of one service; safe to use from any thread.

    Args:
        registry: Its database holds the table, which is made if it is missing.
        retention_days: Older entries are deleted; 0 keeps them.
    """

    def __init__(self, registry: Registry, *, retention_days: int = 0) -> None:
        self._registry = registry
        self._retention = timedelta(days=retention_days)
        self._lock = threading.Lock()
        self._pruned_at = -float("inf")
        self._allowance = (_FAILURE_BURST, time.monotonic())
        self._unlogged = 0
        with registry.write() as connection:
            metadata.create_all(connection, tables=[audit])

    def add(
        self,
        action: Action,
        principal: Principal,
        *,
        project: str | None = None,
        subject: str | None = None,
        detail: Mapping[str, Detail] | None = None,
    ) -> None:
        """Add an entry; durable on return."""
        row = {
            "at": datetime.now(UTC),
            "action": action,
            "actor_id": principal.id[:32],
            "actor": principal.name[:256],
            "address": principal.address[:64],
            "project": project,
            "subject": None if subject is None else subject[:256],
            "detail": json.dumps(detail or {}),
        }
        with self._registry.write() as connection:
            connection.execute(audit.insert().values(row))
            self._prune(connection)

    def add_failure(self, action: Action, principal: Principal, **detail: str) -> None:
        """Add an entry that strangers cause; above a rate they are counted, not written."""
        with self._lock:
            left, at = self._allowance
            now = time.monotonic()
            left = min(_FAILURE_BURST, left + (now - at) * _FAILURES_PER_SECOND)
            self._allowance = (left - 1 if left >= 1 else left, now)
            if left < 1:
                self._unlogged += 1
                return
            unlogged, self._unlogged = self._unlogged, 0
        more = {"unlogged_before": unlogged} if unlogged else {}
        self.add(action, principal, detail={**detail, **more})

    def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        action: str | None = None,
        projects: frozenset[str] | None = None,
    ) -> list[AuditEntry]:
        """Entries, newest first.

        Args:
            limit: At most so many.
            before: Only those with a smaller id.
            action: Only those of this action.
            projects: Only those about these projects; None = all, those about none too.
        """
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.id < before)
        if action is not None:
            query = query.where(audit.c.action == action)
        if projects is not None:
            query = query.where(audit.c.project.in_(sorted(projects)))
        with self._registry.engine.begin() as connection:
            return [_entry(row) for row in connection.execute(query)]

    def _prune(self, connection: sa.Connection) -> None:
        now = time.monotonic()
        if not self._retention or now - self._pruned_at < _PRUNE_SECONDS:
            return
        self._pruned_at = now
        connection.execute(audit.delete().where(audit.c.at < datetime.now(UTC) - self._retention))


def _entry(row: Any) -> AuditEntry:
    at: datetime = row.at
    return AuditEntry(
        id=row.id,
        at=at.replace(tzinfo=UTC) if at.tzinfo is None else at,
        action=row.action,
        actor_id=row.actor_id,
        actor=row.actor,
        address=row.address,
        project=row.project,
        subject=row.subject,
        detail=json.loads(row.detail),
    )
