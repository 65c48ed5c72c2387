"""Sends alerts, one thread a channel: once, again while they fire and nobody has taken them on.

Every message is a row that outlives the process, so a restart neither loses one nor sends one
twice that was delivered. Never touches the analysis; groups nothing (Alertmanager does).
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa

from foreshock.api.alert_log import AlertLog
from foreshock.api.alert_model import outranked
from foreshock.api.alert_mutes import Mute
from foreshock.api.alert_tables import alerts, deliveries
from foreshock.api.channels import Channel, DeliveryError
from foreshock.api.registry import Registry
from foreshock.api.silences import SilenceKeeper

__all__ = ["Delivery", "DeliveryOutcome", "next_page"]

logger = logging.getLogger(__name__)

DeliveryOutcome = Literal["delivered", "failed", "abandoned"]

_LONGEST_WAIT: Final = 300.0
_GIVE_UP_AFTER: Final = timedelta(hours=24)
_IDLE_WAIT: Final = 30.0
_ELSEWHERE_WAIT: Final = 1.0


class Delivery:
    """Works off the messages of the alert log, one thread a channel.

    Args:
        registry: Its database holds the messages.
        log: The alert log; its channels must be these.
        channels: Where alerts go.
        count: Called with (channel, outcome, seconds since what it tells of if it was delivered)
            after each try; must return at once.
        first_wait: Seconds before the second try; doubles up to 5 minutes, a day in all.
        remind_after: How long after a page one that still fires and that nobody has acknowledged
            pages again, where the channel does not do that by itself; None: never.
        leads: Whether this replica is the one that sends, asked before each round; None: there is
            no other.
    """

    def __init__(
        self,
        registry: Registry,
        log: AlertLog,
        channels: Sequence[Channel],
        *,
        count: Callable[[str, DeliveryOutcome, float | None], None] | None = None,
        first_wait: float = 1.0,
        remind_after: timedelta | None = None,
        leads: Callable[[], bool] | None = None,
    ) -> None:
        habits = _Habits(count or _uncounted, first_wait, remind_after, leads)
        self._workers = tuple(
            _ChannelWorker(registry, log, channel, habits) for channel in channels
        )

    def start(self) -> None:
        """Start the threads; messages left by the process before go out first."""
        for worker in self._workers:
            worker.start()

    def wake(self) -> None:
        """There is something new; returns at once."""
        for worker in self._workers:
            worker.wake()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the threads; what is not delivered stays for the next start."""
        for worker in self._workers:
            worker.stop_soon()
        for worker in self._workers:
            worker.join(timeout)


def _uncounted(channel: str, outcome: DeliveryOutcome, seconds: float | None) -> None:
    """Nobody counts."""


def next_page(told: datetime, mute: Mute | None, remind_after: timedelta | None) -> datetime | None:
    """When a firing alert that people were told of pages again; None: it does not.

    Args:
        told: When they were told last (UTC).
        mute: The newest decision about it, a snooze that is over too.
        remind_after: How long an alert that nobody has taken on stays quiet; None: for ever.
    """
    if mute is not None and mute.decision == "acknowledged":
        return None
    if mute is not None and mute.until is not None and mute.until > told:
        return mute.until
    return None if remind_after is None else told + remind_after


@dataclass(frozen=True, slots=True)
class _Habits:
    count: Callable[[str, DeliveryOutcome, float | None], None]
    first_wait: float
    remind_after: timedelta | None
    leads: Callable[[], bool] | None


class _ChannelWorker:
    def __init__(
        self, registry: Registry, log: AlertLog, channel: Channel, habits: _Habits
    ) -> None:
        self._registry = registry
        self._log = log
        self._channel = channel
        self._habits = habits
        silencer = channel.silencer
        self._silences = (
            None if silencer is None else SilenceKeeper(registry, log, channel, silencer)
        )
        self._resend_at = datetime.now(UTC)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"delivery-{channel.name}", daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def stop_soon(self) -> None:
        self._stop.set()
        self._wake.set()

    def join(self, timeout: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                wait = self._round()
            except Exception:
                # The worker's one guard: the next round may succeed.
                logger.exception("delivery to %s failed in an unforeseen way", self._channel.name)
                wait = _IDLE_WAIT
            self._wake.wait(wait)

    def _round(self) -> float:
        """Send what is due; seconds until the next round."""
        if self._habits.leads is not None and not self._habits.leads():
            return _ELSEWHERE_WAIT
        again = self._keep_silences() if self._silences is not None else self._remind()
        for message in self._due():
            if self._stop.is_set():
                return 0.0
            self._try(message)
        self._resend()
        return min(self._until_next(), again)

    def _keep_silences(self) -> float:
        """Bring the silences up to what people decided; seconds until that may need more."""
        assert self._silences is not None
        if datetime.now(UTC) >= self._resend_at:
            self._silences.check()
        try:
            self._silences.keep()
        except DeliveryError as error:
            logger.warning("silences of %s: %s", self._channel.name, error)
            return self._habits.first_wait
        return _IDLE_WAIT

    def _remind(self) -> float:
        """Have alerts page again that are due to; seconds until the next one."""
        firing = {alert.id: alert for alert in self._log.find(state="firing", limit=10_000)}
        told = self._told(firing)
        decisions = self._log.mutes.decisions(told)
        worse = outranked(firing.values())
        now, next_at = datetime.now(UTC), datetime.max.replace(tzinfo=UTC)
        for alert_id, at in told.items():
            again = next_page(at, decisions.get(alert_id), self._habits.remind_after)
            if again is None or alert_id in worse:
                continue
            if again <= now:
                self._post_reminder(alert_id)
            else:
                next_at = min(next_at, again)
        return min((next_at - now).total_seconds(), _IDLE_WAIT)

    def _told(self, alert_ids: Collection[int]) -> dict[int, datetime]:
        """When people were told of each alert last; without those whose message is on its way."""
        query = (
            sa.select(deliveries.c.alert_id, deliveries.c.delivered_at, deliveries.c.abandoned_at)
            .where(deliveries.c.channel == self._channel.name)
            .where(deliveries.c.alert_id.in_(list(alert_ids)))
        )
        told: dict[int, datetime] = {}
        open_: set[int] = set()
        with self._registry.engine.begin() as connection:
            for row in connection.execute(query):
                at = row.delivered_at or row.abandoned_at
                if at is None:
                    open_.add(row.alert_id)
                    continue
                at = at.replace(tzinfo=UTC)
                told[row.alert_id] = max(at, told.get(row.alert_id, at))
        return {key: at for key, at in told.items() if key not in open_}

    def _post_reminder(self, alert_id: int) -> None:
        mine = sa.and_(
            deliveries.c.alert_id == alert_id,
            deliveries.c.channel == self._channel.name,
            deliveries.c.transition == "reminder",
        )
        key = {"alert_id": alert_id, "channel": self._channel.name, "transition": "reminder"}
        fires = sa.select(alerts.c.id).where(alerts.c.id == alert_id, alerts.c.state == "firing")
        with self._registry.write() as connection:
            if connection.execute(fires).first() is None:
                return
            # One row for all of them: the newest is the one that counts.
            connection.execute(sa.delete(deliveries).where(mine))
            row = {**key, "tries": 0, "created_at": _now(), "next_try_at": _now()}
            connection.execute(sa.insert(deliveries), [row])

    def _open_messages(self) -> sa.Select[Any]:
        return (
            sa.select(deliveries)
            .where(deliveries.c.channel == self._channel.name)
            .where(deliveries.c.delivered_at.is_(None), deliveries.c.abandoned_at.is_(None))
            .order_by(deliveries.c.id)
        )

    def _due(self) -> list[Any]:
        with self._registry.engine.begin() as connection:
            rows = connection.execute(self._open_messages()).all()
        now = _now()
        first: dict[int, Any] = {}
        for row in rows:
            # "resolved" waits until "firing" has arrived, so that people read them in order.
            first.setdefault(row.alert_id, row)
        due = {key: row for key, row in first.items() if row.next_try_at <= now}
        # Where pages are grouped and repeated, a silence keeps them back: the state has to go on.
        muted = {} if self._silences is not None else self._log.mutes.of(due)
        return [row for key, row in due.items() if row.transition == "resolved" or key not in muted]

    def _try(self, message: Any) -> None:
        alert = self._log.get(message.alert_id)
        values: dict[str, Any] = {"tries": message.tries + 1}
        outcome: DeliveryOutcome = "delivered"
        try:
            self._channel.send([alert], message.transition)
            values |= {"delivered_at": _now(), "error": None}
            self._resend_soon_enough()
        except DeliveryError as error:
            logger.warning("alert %d to %s: %s", alert.id, self._channel.name, error)
            outcome = "failed"
            values |= {"error": str(error), "next_try_at": _now() + self._back_off(message.tries)}
            if _now() - message.created_at > _GIVE_UP_AFTER:
                outcome = "abandoned"
                values["abandoned_at"] = _now()
        with self._registry.write() as connection:
            connection.execute(
                sa.update(deliveries).where(deliveries.c.id == message.id).values(values)
            )
        took = (_now() - message.created_at).total_seconds()
        self._habits.count(self._channel.name, outcome, took if outcome == "delivered" else None)
        if outcome == "delivered":
            # The alert's next message, if there is one, is due now.
            self._wake.set()

    def _back_off(self, tries: int) -> timedelta:
        longest = min(self._habits.first_wait * 2.0 ** min(tries, 20), _LONGEST_WAIT)
        # Jitter, so that many services do not return to a receiver in step.
        return timedelta(seconds=longest * random.uniform(0.75, 1.0))

    def _resend_soon_enough(self) -> None:
        every = self._channel.resend_seconds
        if every is not None:
            self._resend_at = min(self._resend_at, datetime.now(UTC) + timedelta(seconds=every))

    def _resend(self) -> None:
        every = self._channel.resend_seconds
        if every is None or datetime.now(UTC) < self._resend_at:
            return
        self._resend_at = datetime.now(UTC) + timedelta(seconds=every)
        firing = self._log.find(state="firing", limit=10_000)
        if not firing:
            return
        try:
            self._channel.send(firing, "firing")
        except DeliveryError as error:
            logger.warning("firing alerts to %s: %s", self._channel.name, error)
            self._habits.count(self._channel.name, "failed", None)

    def _until_next(self) -> float:
        with self._registry.engine.begin() as connection:
            rows = connection.execute(self._open_messages()).all()
        now = _now()
        muted = {} if self._silences is not None else self._log.mutes.of(r.alert_id for r in rows)
        waits = [
            (self._held_until(row, muted.get(row.alert_id)) - now).total_seconds() for row in rows
        ]
        if self._channel.resend_seconds is not None:
            waits.append((self._resend_at - datetime.now(UTC)).total_seconds())
        # Another replica's messages wake nobody here.
        longest = _IDLE_WAIT if self._habits.leads is None else _ELSEWHERE_WAIT
        return min(max(min(waits, default=longest), 0.05), longest)

    def _held_until(self, row: Any, mute: Mute | None) -> datetime:
        if mute is None or row.transition == "resolved":
            return row.next_try_at  # type: ignore[no-any-return]
        if mute.until is None:
            return _now() + timedelta(seconds=_IDLE_WAIT)
        return mute.until.replace(tzinfo=None)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
