"""Sends alerts: to anything apprise knows, and to Alertmanager. One thread a channel.

Every message is a row that outlives the process, so a restart neither loses one nor sends one
twice that was delivered. Never touches the analysis; groups and silences nothing (Alertmanager
does).
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, Protocol
from urllib.parse import urlsplit

import apprise
import httpx
import sqlalchemy as sa

from foreshock.api.alert_log import Alert, AlertLog, Transition
from foreshock.api.alert_tables import deliveries
from foreshock.api.alert_text import alert_annotations, alert_labels, page_link
from foreshock.api.registry import Registry

__all__ = [
    "AlertmanagerChannel",
    "AppriseChannel",
    "Channel",
    "Delivery",
    "DeliveryError",
    "DeliveryOutcome",
]

logger = logging.getLogger(__name__)

DeliveryOutcome = Literal["delivered", "failed", "abandoned"]

_LONGEST_WAIT: Final = 300.0
_GIVE_UP_AFTER: Final = timedelta(hours=24)
_IDLE_WAIT: Final = 30.0
_ELSEWHERE_WAIT: Final = 1.0


class DeliveryError(Exception):
    """A message did not arrive; it is tried again."""


class Channel(Protocol):
    """Somewhere that alerts go. Its name is stable over restarts and holds no secret."""

    @property
    def name(self) -> str:
        """Names the channel in the log, in metrics and in the table of messages."""
        ...

    @property
    def resend_seconds(self) -> float | None:
        """Seconds between two sendings of a firing alert; None sends it once."""
        ...

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        """Send.

        Raises:
            DeliveryError: It did not arrive.
        """
        ...


@dataclass(frozen=True, slots=True)
class AppriseChannel:
    """One apprise URL: json:// for a plain webhook, mailto://, slack://, ntfy://, ...

    Args:
        url: The apprise URL; may hold secrets, so it is never logged or stored.
        page: Address of the service for links.

    Raises:
        ValueError: apprise does not know such a URL.
    """

    url: str = field(repr=False)
    page: str | None = None
    resend_seconds: float | None = None

    def __post_init__(self) -> None:
        if apprise.Apprise.instantiate(self.url, suppress_exceptions=True) is None:
            scheme = urlsplit(self.url).scheme or "no scheme"
            raise ValueError(
                f"apprise knows no such alert address ({scheme}://...); for a plain webhook "
                "write json://host:port/path, for others see the list of apprise"
            )

    @property
    def name(self) -> str:
        """Scheme and a digest of the URL."""
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        return f"{urlsplit(self.url).scheme}-{digest}"

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        """Send one message an alert; see `Channel.send`."""
        for alert in alerts:
            sender = apprise.Apprise()
            sender.add(self.url)
            sent = sender.notify(
                title=f"[{transition}] {alert.name} {alert.subject.run}",
                body=self._body(alert, transition),
                notify_type=_notify_type(alert, transition),
                body_format=apprise.NotifyFormat.TEXT,
            )
            if not sent:
                raise DeliveryError("apprise could not deliver; its log names the reason")

    def _body(self, alert: Alert, transition: Transition) -> str:
        facts = alert_labels(alert) | alert_annotations(alert, transition)
        summary = facts.pop("summary")
        address = page_link(self.page, alert)
        if address is not None:
            facts["link"] = address
        return "\n".join([summary, "", *(f"{name}: {text}" for name, text in facts.items())])


def _notify_type(alert: Alert, transition: Transition) -> Any:
    if transition == "resolved":
        return apprise.NotifyType.SUCCESS
    return apprise.NotifyType.FAILURE if alert.kind == "detection" else apprise.NotifyType.WARNING


@dataclass(frozen=True, slots=True)
class AlertmanagerChannel:
    """One Alertmanager, through `POST /api/v2/alerts`.

    A firing alert is sent again every `resend_seconds` and carries an end four times as far away
    (as Prometheus does it), so it ends by itself when the service dies for good.

    Args:
        url: Base address, e.g. http://localhost:9093.
        page: Address of the service for links.
        resend_seconds: How often firing alerts are sent again.
        timeout: Seconds a request may take.
    """

    url: str
    page: str | None = None
    resend_seconds: float | None = 60.0
    timeout: float = 10.0

    @property
    def name(self) -> str:
        """Host and port."""
        parts = urlsplit(self.url)
        return f"alertmanager-{parts.hostname}-{parts.port or parts.scheme}"

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        """Send all alerts in one request; see `Channel.send`."""
        body = [self._body(alert, transition) for alert in alerts]
        address = f"{self.url.rstrip('/')}/api/v2/alerts"
        try:
            response = httpx.post(address, json=body, timeout=self.timeout)
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise DeliveryError(f"{type(error).__name__}: {error}") from error

    def _body(self, alert: Alert, transition: Transition) -> dict[str, Any]:
        if transition == "resolved":
            ends_at = alert.ends_at or datetime.now(UTC)
        else:
            ends_at = datetime.now(UTC) + timedelta(seconds=4 * (self.resend_seconds or 60.0))
        body: dict[str, Any] = {
            "labels": alert_labels(alert),
            "annotations": alert_annotations(alert, transition),
            "startsAt": alert.starts_at.isoformat(),
            "endsAt": ends_at.isoformat(),
        }
        address = page_link(self.page, alert)
        if address is not None:
            body["generatorURL"] = address
            body["annotations"]["link"] = address
        return body


class Delivery:
    """Works off the messages of the alert log, one thread a channel.

    Args:
        registry: Its database holds the messages.
        log: The alert log; its channels must be these.
        channels: Where alerts go.
        count: Called with (channel, outcome) after each try; must return at once.
        first_wait: Seconds before the second try; doubles up to 5 minutes, a day in all.
        leads: Whether this replica is the one that sends, asked before each round; None: there is
            no other.
    """

    def __init__(
        self,
        registry: Registry,
        log: AlertLog,
        channels: Sequence[Channel],
        *,
        count: Callable[[str, DeliveryOutcome], None] | None = None,
        first_wait: float = 1.0,
        leads: Callable[[], bool] | None = None,
    ) -> None:
        self._workers = tuple(
            _ChannelWorker(registry, log, channel, count or _uncounted, first_wait, leads)
            for channel in channels
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


def _uncounted(channel: str, outcome: DeliveryOutcome) -> None:
    """Nobody counts."""


class _ChannelWorker:
    def __init__(
        self,
        registry: Registry,
        log: AlertLog,
        channel: Channel,
        count: Callable[[str, DeliveryOutcome], None],
        first_wait: float,
        leads: Callable[[], bool] | None,
    ) -> None:
        self._registry = registry
        self._log = log
        self._channel = channel
        self._count = count
        self._first_wait = first_wait
        self._leads = leads
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
        if self._leads is not None and not self._leads():
            return _ELSEWHERE_WAIT
        for message in self._due():
            if self._stop.is_set():
                return 0.0
            self._try(message)
        self._resend()
        return self._until_next()

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
        return [row for row in first.values() if row.next_try_at <= now]

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
        self._count(self._channel.name, outcome)
        if outcome == "delivered":
            # The alert's next message, if there is one, is due now.
            self._wake.set()

    def _back_off(self, tries: int) -> timedelta:
        longest = min(self._first_wait * 2.0 ** min(tries, 20), _LONGEST_WAIT)
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
            self._count(self._channel.name, "failed")

    def _until_next(self) -> float:
        with self._registry.engine.begin() as connection:
            rows = connection.execute(self._open_messages()).all()
        now = _now()
        waits = [(row.next_try_at - now).total_seconds() for row in rows]
        if self._channel.resend_seconds is not None:
            waits.append((self._resend_at - datetime.now(UTC)).total_seconds())
        # Another replica's messages wake nobody here.
        longest = _IDLE_WAIT if self._leads is None else _ELSEWHERE_WAIT
        return min(max(min(waits, default=longest), 0.05), longest)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
