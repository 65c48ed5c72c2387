"""Where alerts go: what a channel is, and Alertmanager as one.

Each sends what it is given, once; when, and whether again, is `delivery.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import httpx

from foreshock.api.alert_facts import page_link
from foreshock.api.alert_model import Alert, Transition
from foreshock.api.alert_mutes import Mute
from foreshock.api.alert_text import alert_annotations, alert_labels

__all__ = [
    "AlertmanagerChannel",
    "Channel",
    "DeliveryError",
    "Silencer",
]


class DeliveryError(Exception):
    """A message did not arrive; it is tried again."""


class Silencer(Protocol):
    """Something that groups and repeats pages by itself, and can be told to leave an alert out."""

    def silence(self, alert: Alert, mute: Mute, until: datetime, known: str | None) -> str:
        """Keep an alert quiet until a moment.

        Args:
            alert: The alert.
            mute: Who wants it, and why.
            until: End (UTC).
            known: The silence before, to be changed.

        Returns:
            Id of the silence.

        Raises:
            DeliveryError: It did not answer.
        """
        ...

    def unsilence(self, silence_id: str) -> None:
        """End a silence; one that is unknown or over is none of our business.

        Raises:
            DeliveryError: It did not answer.
        """
        ...

    def knows(self, silence_id: str) -> bool:
        """Whether it has this silence, were it an ended one.

        Raises:
            DeliveryError: It did not answer.
        """
        ...


class Channel(Protocol):
    """Somewhere that alerts go. Its name is stable over restarts and holds no secret."""

    @property
    def name(self) -> str:
        """Names the channel in the log, in metrics and in the table of messages."""
        ...

    @property
    def resend_seconds(self) -> float | None:
        """Seconds between two sendings of a firing alert, so that it stays; None: sent once."""
        ...

    @property
    def silencer(self) -> Silencer | None:
        """What pages by itself there; None: whatever is sent pages."""
        ...

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        """Send.

        Raises:
            DeliveryError: It did not arrive.
        """
        ...


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
        labels: Labels that Prometheus adds to its alerts (`external_labels`), name and value: the
            service's own have to carry them too, or every alert would come twice.
    """

    url: str
    page: str | None = None
    resend_seconds: float | None = 60.0
    timeout: float = 10.0
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """Host and port."""
        parts = urlsplit(self.url)
        return f"alertmanager-{parts.hostname}-{parts.port or parts.scheme}"

    @property
    def silencer(self) -> Silencer:
        """Itself."""
        return self

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        """Send all alerts in one request; see `Channel.send`."""
        self._ask("POST", "alerts", [self._body(alert, transition) for alert in alerts])

    def silence(self, alert: Alert, mute: Mute, until: datetime, known: str | None) -> str:
        """Make or change a silence; see `Silencer.silence`."""
        matched = ("alertname", "project", "run")
        labels = alert_labels(alert)
        said = f": {mute.note}" if mute.note else ""
        body: dict[str, Any] = {
            "matchers": [
                {"name": name, "value": labels[name], "isRegex": False, "isEqual": True}
                for name in matched
            ],
            "startsAt": datetime.now(UTC).isoformat(),
            "endsAt": until.isoformat(),
            "createdBy": mute.by,
            "comment": f"{mute.decision} in foreshock, alert {alert.id}{said}",
        }
        if known is not None:
            body["id"] = known
        return str(self._ask("POST", "silences", body).json()["silenceID"])

    def unsilence(self, silence_id: str) -> None:
        """End a silence; see `Silencer.unsilence`."""
        # Alertmanager answers 500 to one that is over already.
        self._ask("DELETE", _silence_path(silence_id), allowed=(404, 500))

    def knows(self, silence_id: str) -> bool:
        """Ask for a silence; see `Silencer.knows`."""
        return self._ask("GET", _silence_path(silence_id), allowed=(404,)).is_success

    def _ask(
        self, method: str, path: str, body: object = None, allowed: tuple[int, ...] = ()
    ) -> httpx.Response:
        address = f"{self.url.rstrip('/')}/api/v2/{path}"
        try:
            response = httpx.request(method, address, json=body, timeout=self.timeout)
            if response.status_code not in allowed:
                response.raise_for_status()
        except httpx.HTTPError as error:
            raise DeliveryError(f"{type(error).__name__}: {error}") from error
        return response

    def _body(self, alert: Alert, transition: Transition) -> dict[str, Any]:
        if transition == "resolved":
            ends_at = alert.ends_at or datetime.now(UTC)
        else:
            ends_at = datetime.now(UTC) + timedelta(seconds=4 * (self.resend_seconds or 60.0))
        body: dict[str, Any] = {
            "labels": dict(self.labels) | alert_labels(alert),
            "annotations": alert_annotations(alert, transition, self.page),
            "startsAt": alert.starts_at.isoformat(),
            "endsAt": ends_at.isoformat(),
        }
        address = page_link(self.page, alert)
        if address is not None:
            body["generatorURL"] = address
        return body


def _silence_path(silence_id: str) -> str:
    return f"silence/{quote(silence_id, safe='')}"
