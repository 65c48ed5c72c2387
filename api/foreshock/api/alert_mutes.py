"""Who said "I have it" or "not now": acknowledged and snoozed alerts, which page nobody meanwhile.

The newest decision about an alert counts. Sends nothing; delivery and `/metrics` ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import sqlalchemy as sa

from foreshock.api.alert_model import AlertKind, utc
from foreshock.api.alert_tables import alerts, mutes
from foreshock.api.registry import Registry

__all__ = ["AlertMutes", "Decision", "Mute", "NotOpen", "inherit_snooze"]

Decision = Literal["acknowledged", "snoozed"]


class NotOpen(Exception):
    """The alert is in no state that could be muted; says in which it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mute:
    """A decision about an alert.

    Attributes:
        decision: acknowledged: pages nobody again; snoozed: not before `until`.
        by: Name of the token or person.
        at: When it was made (UTC).
        until: End of a snooze (UTC).
        note: What they said.
    """

    decision: Decision
    by: str
    at: datetime
    until: datetime | None = None
    note: str | None = None

    def holds(self, now: datetime) -> bool:
        """Whether it keeps pages away at this moment."""
        return self.until is None or now < self.until


class AlertMutes:
    """Decisions about the alerts of one log; safe to use from several threads.

    Args:
        registry: Its database holds the table, which the alert log makes.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def acknowledge(self, alert_id: int, *, by: str, note: str | None = None) -> Mute:
        """Somebody has taken a firing alert on; it pages nobody again.

        Raises:
            NotOpen: It is not firing.
        """
        return self._decide(alert_id, Mute(decision="acknowledged", by=by, at=_now(), note=note))

    def snooze(self, alert_id: int, *, by: str, until: datetime, note: str | None = None) -> Mute:
        """Nobody wants to hear of an alert before a moment; if it fires then, it pages again.

        Covers alerts of the same kind that the run raises meanwhile (`inherit_snooze`).

        Raises:
            NotOpen: It is resolved.
        """
        mute = Mute(decision="snoozed", by=by, at=_now(), until=until, note=note)
        return self._decide(alert_id, mute)

    def end(self, alert_id: int) -> bool:
        """Take the decision back; whether there was one."""
        with self._registry.write() as connection:
            done = connection.execute(sa.delete(mutes).where(mutes.c.alert_id == alert_id))
        return bool(done.rowcount)

    def of(self, alert_ids: Iterable[int], now: datetime | None = None) -> Mapping[int, Mute]:
        """The decisions that hold now, by alert."""
        moment = now or _now()
        return {k: mute for k, mute in self.decisions(alert_ids).items() if mute.holds(moment)}

    def decisions(self, alert_ids: Iterable[int]) -> Mapping[int, Mute]:
        """The newest decisions, snoozes that are over too, by alert."""
        query = sa.select(mutes).where(mutes.c.alert_id.in_(list(alert_ids)))
        with self._registry.engine.begin() as connection:
            return {row.alert_id: _mute(row) for row in connection.execute(query)}

    def firing(self) -> frozenset[tuple[str, str, AlertKind]]:
        """Project, run and kind of every alert that is firing and muted now."""
        query = sa.select(alerts.c.project, alerts.c.run, alerts.c.kind, mutes).where(
            alerts.c.id == mutes.c.alert_id, alerts.c.state == "firing"
        )
        now = _now()
        with self._registry.engine.begin() as connection:
            rows = connection.execute(query).all()
        return frozenset((r.project, r.run, r.kind) for r in rows if _mute(r).holds(now))

    def _decide(self, alert_id: int, mute: Mute) -> Mute:
        allowed = ("firing",) if mute.decision == "acknowledged" else ("firing", "pending")
        with self._registry.write() as connection:
            state = connection.scalar(sa.select(alerts.c.state).where(alerts.c.id == alert_id))
            if state not in allowed:
                raise NotOpen(
                    f"alert {alert_id} is {state}; only one that is {' or '.join(allowed)} "
                    f"can be {mute.decision}"
                )
            connection.execute(sa.delete(mutes).where(mutes.c.alert_id == alert_id))
            connection.execute(sa.insert(mutes).values(alert_id=alert_id, **_row(mute)))
        return mute


def inherit_snooze(connection: sa.Connection, alert_id: int, run_id: str, kind: str) -> None:
    """Let a new alert sleep as long as an earlier one of the same run and kind was to."""
    earlier = (
        sa.select(mutes)
        .join(alerts, alerts.c.id == mutes.c.alert_id)
        .where(alerts.c.run_id == run_id, alerts.c.kind == kind, mutes.c.until > _naive(_now()))
        .order_by(mutes.c.until.desc())
        .limit(1)
    )
    found = connection.execute(earlier).first()
    if found is not None:
        values = _row(_mute(found))
        connection.execute(sa.insert(mutes).values(alert_id=alert_id, **values))


def _row(mute: Mute) -> dict[str, Any]:
    return {
        "decision": mute.decision,
        "by": mute.by,
        "at": _naive(mute.at),
        "until": None if mute.until is None else _naive(mute.until),
        "note": mute.note,
    }


def _mute(row: Any) -> Mute:
    return Mute(
        decision=row.decision,
        by=row.by,
        at=row.at.replace(tzinfo=UTC),
        until=utc(row.until),
        note=row.note,
    )


def _now() -> datetime:
    return datetime.now(UTC)


def _naive(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None)
