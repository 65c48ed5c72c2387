"""One apprise address as a channel: which layout it is sent, and how.

Knows nothing of tries and reminders (`delivery.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import apprise

from foreshock.api.alert_messages import Medium, message
from foreshock.api.alert_model import Alert, Transition
from foreshock.api.channels import DeliveryError, Silencer

__all__ = ["AppriseChannel", "medium_of"]

_WEBHOOKS: Final = frozenset({"json", "jsons", "xml", "xmls", "form", "forms", "amqp", "mqtt"})
_PHONES: Final = frozenset(
    {"bark", "fcm", "gotify", "gotifys", "join", "ntfy", "ntfys", "pbul", "pover", "prowl"}
    | {"psafer", "pushy", "signal", "signals", "signl4", "sns", "trigv", "vapid"}
)
_LITTLE_ROOM: Final = 1600
"""Characters of what is a text message rather than a page."""


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
    silencer: Silencer | None = None

    def __post_init__(self) -> None:
        _plugin(self.url)

    @property
    def name(self) -> str:
        """Scheme and a digest of the URL."""
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        return f"{urlsplit(self.url).scheme}-{digest}"

    @property
    def medium(self) -> Medium:
        """How alerts are laid out for it."""
        return medium_of(self.url)

    def send(self, alerts: Sequence[Alert], transition: Transition) -> None:
        """Send one message an alert; see `Channel.send`."""
        for alert in alerts:
            plugin = _plugin(self.url)
            said = message(alert, transition, self.medium, self.page)
            _identify(plugin, alert)
            sender = apprise.Apprise()
            sender.add(plugin)
            sent = sender.notify(
                title=said.title,
                body=said.body,
                notify_type=_notify_type(alert, transition),
                body_format=apprise.NotifyFormat(said.format),
            )
            if not sent:
                raise DeliveryError("apprise could not deliver; its log names the reason")


def medium_of(url: str) -> Medium:
    """The layout for an address: by what the service behind it can show.

    `?format=text`, `markdown` or `html` in the address chooses another one.

    Raises:
        ValueError: apprise knows no such address.
    """
    scheme = urlsplit(url).scheme
    plugin = _plugin(url)
    if scheme in _WEBHOOKS:
        return "webhook"
    formats = _formats(url, plugin)
    if scheme in _PHONES or (plugin.body_maxlen <= _LITTLE_ROOM and "markdown" not in formats[:1]):
        return "phone"
    # The first one is what the service shows best; Telegram's HTML knows no tables.
    if formats[0] == "html":
        return "plain" if scheme == "tgram" else "mail"
    return "chat" if "markdown" in formats else "plain"


def _formats(url: str, plugin: Any) -> list[str]:
    chosen = parse_qs(urlsplit(url).query).get("format")
    if chosen:
        return [chosen[0].lower()]
    given = plugin.notify_format
    return [each.value for each in (given if isinstance(given, tuple) else (given,))]


def _plugin(url: str) -> Any:
    plugin = apprise.Apprise.instantiate(url, suppress_exceptions=True)
    if plugin is None:
        scheme = urlsplit(url).scheme or "no scheme"
        raise ValueError(
            f"apprise knows no such alert address ({scheme}://...); for a plain webhook "
            "write json://host:port/path, for others see the list of apprise"
        )
    return plugin


def _identify(plugin: Any, alert: Alert) -> None:
    """Let PagerDuty know which incident a message is about, so that the end of it ends it."""
    if urlsplit(plugin.url()).scheme == "pagerduty" and not plugin.dedup:
        plugin.dedup = f"foreshock-{alert.id}"
        plugin.action = "map"


def _notify_type(alert: Alert, transition: Transition) -> Any:
    if transition == "resolved":
        return apprise.NotifyType.SUCCESS
    return (
        apprise.NotifyType.FAILURE if alert.severity == "critical" else apprise.NotifyType.WARNING
    )
