"""What an alert looks like where it is read, on the terminal or really sent."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import apprise
from apprise.conversion import convert_between

from foreshock.api.alert_messages import MEDIUMS, Medium, Message, message
from foreshock.api.alert_model import Alert, AlertContent, AlertSubject, Stakes, Transition
from foreshock.api.channel_apprise import AppriseChannel

if TYPE_CHECKING:
    from foreshock.monitor.client import Alert as Answer

__all__ = ["page_text", "recorded", "send"]


def page_text(
    alert: Alert, transition: Transition, mediums: Collection[str], page: str | None
) -> Iterator[str]:
    """The layouts of an alert, one after the other.

    Args:
        alert: The alert.
        transition: Whether it fires, still fires, or is over.
        mediums: Which layouts; none for all.
        page: Address of the service for links.
    """
    for medium in (known for known in MEDIUMS if known in (mediums or MEDIUMS)):
        yield f"──── {medium} ────"
        yield from _shown(message(alert, transition, medium, page))
        yield ""


def _shown(said: Message) -> Iterator[str]:
    yield said.title
    yield ""
    if said.format == "html":
        # Both parts of the mail, the text as apprise makes it from the HTML.
        html, text = apprise.NotifyFormat.HTML, apprise.NotifyFormat.TEXT
        yield convert_between(html, text, said.body)  # type: ignore[no-untyped-call]
        yield ""
    yield said.body


def send(alert: Alert, transition: Transition, address: str, page: str | None) -> Medium:
    """Really send it, as the service would; which layout it was.

    Raises:
        ValueError: apprise does not know the address.
        foreshock.api.channels.DeliveryError: It did not arrive.
    """
    channel = AppriseChannel(address, page=page)
    channel.send([alert], transition)
    return channel.medium


def recorded(answer: Answer) -> Alert:
    """An alert as a service keeps it, from its answer."""
    stakes = Stakes(
        step_seconds=answer.step_seconds,
        hours_at_risk=answer.hours_at_risk,
        world_size=answer.world_size,
    )
    return Alert(
        id=answer.id,
        subject=AlertSubject(answer.run_id, answer.project, answer.run, answer.attempt),
        kind=answer.kind,  # type: ignore[arg-type]
        state=answer.state,  # type: ignore[arg-type]
        opened_step=answer.opened_step,
        fired_step=answer.fired_step,
        resolved_step=answer.resolved_step,
        starts_at=answer.starts_at,
        ends_at=answer.ends_at,
        end_reason=answer.end_reason,
        content=AlertContent(
            step=answer.step,
            probability=answer.probability,
            band=answer.band,
            stakes=stakes,
            expected_lead=answer.expected_lead,
            causes=tuple(asdict(cause) for cause in answer.causes),
            model_version=answer.model_version,
        ),
        correct=answer.correct,
        note=answer.note,
    )
