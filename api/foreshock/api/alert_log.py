"""The alerts of every run, in SQL: what fired, why, when it ended, and whether people agreed.

Follows the state that the scorer's state machine gives; decides no threshold and sends nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from foreshock.api.alert_feedback import RuleFeedback, feedback_by_rule
from foreshock.api.alert_model import (
    ALERT_NAMES,
    OF_RISK,
    OUTRANKS,
    SEVERITIES,
    Alert,
    AlertContent,
    AlertKind,
    AlertSubject,
    LoggedState,
    Transition,
    alert_of,
    dump_content,
    subject_of,
    utc,
)
from foreshock.api.alert_mutes import AlertMutes, inherit_snooze
from foreshock.api.alert_tables import alerts, deliveries, mutes, silences
from foreshock.api.registry import Registry, metadata
from foreshock.monitor.record import Risk

__all__ = [
    "ALERT_NAMES",
    "SEVERITIES",
    "Alert",
    "AlertContent",
    "AlertKind",
    "AlertLog",
    "AlertSubject",
    "LoggedState",
    "Transition",
    "UnknownAlert",
    "deliveries",
]


class UnknownAlert(LookupError):
    """There is no alert of this id."""


_Key = tuple[str, int]


@dataclass(slots=True)
class _Open:
    id: int
    state: LoggedState
    subject: AlertSubject


class AlertLog:
    """Keeps alerts in step with the states of the runs; safe to use from several threads.

    Args:
        registry: Its database holds the tables; they are made if they are missing.
        channels: Names of the channels that every firing and resolved alert goes to.

    Attributes:
        mutes: People's decisions that an alert is to page nobody.
    """

    def __init__(self, registry: Registry, channels: Sequence[str] = ()) -> None:
        self._registry = registry
        self._channels = tuple(channels)
        self.mutes = AlertMutes(registry)
        self._lock = threading.Lock()
        self._open: dict[_Key, dict[AlertKind, _Open]] = {}
        with registry.write() as connection:
            metadata.create_all(connection, tables=[alerts, deliveries, mutes, silences])
            for row in connection.execute(sa.select(alerts).where(alerts.c.state != "resolved")):
                kinds = self._open.setdefault((row.run_id, row.attempt), {})
                kinds[row.kind] = _Open(row.id, row.state, subject_of(row))

    def fires(self, subject: AlertSubject, risk: Risk, *, lost: bool = False) -> bool:
        """Whether `follow` would start an alert with this risk, which then says why."""
        with self._lock:
            return risk.state == "firing" and not self._known(subject, risk, _kind(risk, lost))

    def _known(self, subject: AlertSubject, risk: Risk, kind: AlertKind) -> bool:
        found = self._open.get((subject.run_id, subject.attempt), {})
        if any(kind in OUTRANKS.get(k, ()) and o.state == "firing" for k, o in found.items()):
            return True
        known = found.get(kind)
        return known is not None and known.state in (risk.state, "firing", "resolved")

    def follow(
        self,
        subject: AlertSubject,
        risk: Risk,
        explain: Callable[[], AlertContent],
        *,
        lost: bool = False,
    ) -> tuple[Alert, ...]:
        """Bring the log to the state of a risk.

        A run has at most one open alert of each kind. A pending one that goes quiet is forgotten;
        a firing forecast stays when a worse one joins it, and all end together. While a worse one
        fires no lesser one begins.

        Args:
            subject: Whose risk it is.
            risk: The answer for the newest step.
            explain: Called only when an alert starts to fire.
            lost: Whether the loss of that step is not finite.

        Returns:
            The alerts that changed.
        """
        with self._lock:
            if risk.state in ("ok", "resolved"):
                return self._settle(subject, risk.step, "risk is back to normal", OF_RISK)
            kind = _kind(risk, lost)
            if self._known(subject, risk, kind):
                return ()
            if risk.state == "firing":
                content = explain()
            else:
                content = AlertContent(step=risk.step, probability=risk.probability)
            state: LoggedState = "firing" if risk.state == "firing" else "pending"
            return self._advance(subject, kind, state, content)

    def close(self, subject: AlertSubject, step: int, reason: str) -> tuple[Alert, ...]:
        """End the open alerts of an attempt, e.g. because a newer attempt has begun."""
        with self._lock:
            return self._settle(subject, step, reason, tuple(ALERT_NAMES))

    def silence(self, subject: AlertSubject, step: int) -> tuple[Alert, ...]:
        """A run fell silent after this step."""
        with self._lock:
            if "silence" in self._open.get((subject.run_id, subject.attempt), {}):
                return ()
            return self._advance(subject, "silence", "firing", AlertContent(step=step))

    def end_silence(self, subject: AlertSubject, step: int, reason: str) -> tuple[Alert, ...]:
        """The run is back, or ended properly."""
        with self._lock:
            return self._settle(subject, step, reason, ("silence",))

    def delete(self, run_id: str) -> None:
        """Forget every alert of a run, and the messages about them."""
        with self._lock:
            for key in [key for key in self._open if key[0] == run_id]:
                del self._open[key]
            mine = sa.select(alerts.c.id).where(alerts.c.run_id == run_id)
            with self._registry.write() as connection:
                for table in (deliveries, mutes, silences):
                    connection.execute(sa.delete(table).where(table.c.alert_id.in_(mine)))
                connection.execute(sa.delete(alerts).where(alerts.c.run_id == run_id))

    def refresh(self) -> tuple[Alert, ...]:
        """Read anew what is open, for replicas change it too; the alerts that changed elsewhere."""
        query = sa.select(alerts).where(alerts.c.state != "resolved")
        with self._lock:
            before = {k.id: k.state for kinds in self._open.values() for k in kinds.values()}
            with self._registry.engine.begin() as connection:
                rows = connection.execute(query).all()
                self._open = {}
                for row in rows:
                    kinds = self._open.setdefault((row.run_id, row.attempt), {})
                    kinds[row.kind] = _Open(row.id, row.state, subject_of(row))
                changed = {row.id for row in rows if before.get(row.id) != row.state}
                changed |= before.keys() - {row.id for row in rows}
                found = connection.execute(sa.select(alerts).where(alerts.c.id.in_(changed))).all()
        return tuple(alert_of(row) for row in found if row.state != "pending")

    def has_open(self, run_id: str, attempt: int) -> bool:
        """Whether an alert of the attempt is pending or firing."""
        with self._lock:
            return bool(self._open.get((run_id, attempt)))

    def open_attempts(self) -> tuple[tuple[str, int], ...]:
        """Every (run_id, attempt) with a pending or firing alert."""
        with self._lock:
            return tuple(self._open)

    def open_kinds(self) -> tuple[tuple[str, int, AlertKind], ...]:
        """run_id, attempt and kind of every pending or firing alert."""
        with self._lock:
            return tuple((*key, kind) for key, kinds in self._open.items() for kind in kinds)

    def firing(self) -> frozenset[tuple[str, str, AlertKind]]:
        """Project, run and kind of every alert that is firing."""
        with self._lock:
            return frozenset(
                (known.subject.project, known.subject.run, kind)
                for kinds in self._open.values()
                for kind, known in kinds.items()
                if known.state == "firing"
            )

    def _advance(
        self, subject: AlertSubject, kind: AlertKind, state: LoggedState, content: AlertContent
    ) -> tuple[Alert, ...]:
        step = content.step
        found = self._open.setdefault((subject.run_id, subject.attempt), {})
        known = found.get(kind)
        now = _now()
        values: dict[str, Any] = {
            "state": state,
            "starts_at": now,
            "content": dump_content(content),
        }
        if state == "firing":
            values["fired_step"] = step
        with self._registry.write() as connection:
            if known is None:
                values |= asdict(subject) | {"kind": kind, "opened_step": step}
                replayed = _existing(connection, subject, kind, step)
                if replayed is not None:
                    found[kind] = _Open(replayed.id, replayed.state, subject)
                    return ()
                key = connection.execute(sa.insert(alerts).values(values)).inserted_primary_key
                known = _Open(int(key[0]) if key is not None else 0, state, subject)
                inherit_snooze(connection, known.id, subject.run_id, kind)
            else:
                connection.execute(sa.update(alerts).where(alerts.c.id == known.id).values(values))
            if state == "firing":
                self._post(connection, known.id, "firing", now)
            row = connection.execute(sa.select(alerts).where(alerts.c.id == known.id)).one()
        found[kind] = _Open(known.id, state, subject)
        return (alert_of(row),)

    def _settle(
        self, subject: AlertSubject, step: int, reason: str, kinds: Sequence[AlertKind]
    ) -> tuple[Alert, ...]:
        of_attempt = self._open.get((subject.run_id, subject.attempt), {})
        found = {kind: of_attempt.pop(kind) for kind in kinds if kind in of_attempt}
        if not found:
            return ()
        if not of_attempt:
            del self._open[subject.run_id, subject.attempt]
        changed = []
        now = _now()
        with self._registry.write() as connection:
            for known in found.values():
                if known.state == "pending":
                    connection.execute(sa.delete(mutes).where(mutes.c.alert_id == known.id))
                    connection.execute(sa.delete(alerts).where(alerts.c.id == known.id))
                if known.state != "firing":
                    continue
                connection.execute(
                    sa.update(alerts)
                    .where(alerts.c.id == known.id)
                    .values(state="resolved", resolved_step=step, ends_at=now, end_reason=reason)
                )
                untold = _drop_untold(connection, known.id, now)
                self._post(connection, known.id, "resolved", now, but=untold)
                row = connection.execute(sa.select(alerts).where(alerts.c.id == known.id)).one()
                changed.append(alert_of(row))
        return tuple(changed)

    def _post(
        self,
        connection: sa.Connection,
        alert_id: int,
        transition: Transition,
        now: datetime,
        but: frozenset[str] = frozenset(),
    ) -> None:
        rows = [
            {
                "alert_id": alert_id,
                "channel": channel,
                "transition": transition,
                "tries": 0,
                "created_at": now,
                "next_try_at": now,
            }
            for channel in self._channels
            if channel not in but
        ]
        if rows:
            connection.execute(sa.insert(deliveries), rows)

    def find(
        self,
        *,
        run_id: str | None = None,
        state: LoggedState | None = None,
        limit: int = 100,
        projects: frozenset[str] | None = None,
        before: int | None = None,
    ) -> tuple[Alert, ...]:
        """Alerts, newest first.

        Args:
            run_id: Only this run's.
            state: Only those in this state.
            limit: At most so many.
            projects: Only those of these projects; None = all.
            before: Only those with a smaller id.
        """
        query = sa.select(alerts).order_by(alerts.c.id.desc()).limit(limit)
        if run_id is not None:
            query = query.where(alerts.c.run_id == run_id)
        if state is not None:
            query = query.where(alerts.c.state == state)
        if projects is not None:
            query = query.where(alerts.c.project.in_(sorted(projects)))
        if before is not None:
            query = query.where(alerts.c.id < before)
        with self._registry.engine.begin() as connection:
            return tuple(alert_of(row) for row in connection.execute(query))

    def get(self, alert_id: int) -> Alert:
        """One alert.

        Raises:
            UnknownAlert: There is none of this id.
        """
        with self._registry.engine.begin() as connection:
            row = connection.execute(sa.select(alerts).where(alerts.c.id == alert_id)).first()
        if row is None:
            raise UnknownAlert(f"there is no alert {alert_id}")
        return alert_of(row)

    def delivered(self, alert_ids: Sequence[int]) -> Mapping[int, tuple[Mapping[str, Any], ...]]:
        """What became of each alert's messages: channel, transition, tries, delivered_at, error."""
        query = (
            sa.select(deliveries)
            .where(deliveries.c.alert_id.in_(alert_ids))
            .order_by(deliveries.c.id)
        )
        found: dict[int, list[Mapping[str, Any]]] = {alert_id: [] for alert_id in alert_ids}
        with self._registry.engine.begin() as connection:
            for row in connection.execute(query):
                found[row.alert_id].append(
                    {
                        "channel": row.channel,
                        "transition": row.transition,
                        "tries": row.tries,
                        "delivered_at": utc(row.delivered_at),
                        "abandoned": row.abandoned_at is not None,
                        "error": row.error,
                    }
                )
        return {alert_id: tuple(rows) for alert_id, rows in found.items()}

    def answer(self, alert_id: int, *, correct: bool, note: str | None) -> Alert:
        """Keep people's answer to "was this right?"; a later one replaces it.

        Raises:
            UnknownAlert: There is no alert of this id.
        """
        with self._registry.write() as connection:
            connection.execute(
                sa.update(alerts).where(alerts.c.id == alert_id).values(correct=correct, note=note)
            )
        return self.get(alert_id)

    def feedback(
        self,
        *,
        run_id: str | None = None,
        projects: frozenset[str] | None = None,
        since: datetime | None = None,
    ) -> tuple[RuleFeedback, ...]:
        """People's answers for each rule; as `feedback_by_rule`."""
        return feedback_by_rule(self._registry, run_id=run_id, projects=projects, since=since)


def _kind(risk: Risk, lost: bool) -> AlertKind:
    kind: AlertKind = risk.kind or "forecast"
    return "nonfinite" if lost and kind == "detection" and risk.state == "firing" else kind


def _existing(connection: sa.Connection, subject: AlertSubject, kind: str, step: int) -> Any:
    return connection.execute(
        sa.select(alerts.c.id, alerts.c.state).where(
            alerts.c.run_id == subject.run_id,
            alerts.c.attempt == subject.attempt,
            alerts.c.kind == kind,
            alerts.c.opened_step == step,
        )
    ).first()


def _drop_untold(connection: sa.Connection, alert_id: int, now: datetime) -> frozenset[str]:
    """Drop messages of an alert that is over; channels that were spared it altogether.

    Those of a muted alert, and reminders: what was only late for a receiver still goes out.
    """
    waiting = sa.and_(deliveries.c.alert_id == alert_id, deliveries.c.delivered_at.is_(None))
    connection.execute(sa.delete(deliveries).where(waiting, deliveries.c.transition == "reminder"))
    mute = connection.execute(sa.select(mutes).where(mutes.c.alert_id == alert_id)).first()
    if mute is None or (mute.until is not None and mute.until <= now):
        return frozenset()
    waiting = sa.and_(waiting, deliveries.c.abandoned_at.is_(None))
    untold = connection.scalars(sa.select(deliveries.c.channel).where(waiting)).all()
    spared = {"abandoned_at": now, "error": f"{mute.decision} by {mute.by} until it was over"}
    connection.execute(sa.update(deliveries).where(waiting).values(spared))
    return frozenset(untold)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
