"""What people need of an alert, in words: who, what, how sure, how long left, at what cost, why.

And what to do, and where to look. Lays nothing out and sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from foreshock.api.alert_model import Alert, AlertKind, Transition

__all__ = ["AlertFacts", "duration", "facts_of", "headline", "page_link", "runbook_link", "shorten"]

_WHAT: Final[Mapping[AlertKind, str]] = {
    "forecast": "the loss looks normal, but is likely to start diverging",
    "detection": "the loss is rising and does not come back",
    "nonfinite": "the loss is NaN or infinite",
    "silence": "no records come any more, and the run did not say that it is over",
}

_DO: Final[Mapping[AlertKind, str]] = {
    "forecast": "save a checkpoint now, then look at the diagnosis",
    "detection": "stop the run; go back to a checkpoint from before the rise",
    "nonfinite": "stop the run; go back to a checkpoint from before the first non-finite value",
    "silence": "look whether the job died, hangs, or cannot reach the service",
}

_RUN_NAME: Final = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertFacts:
    """An alert in words; an empty string is something that is not known.

    Attributes:
        headline: At most about 60 characters, the run first: for a phone.
        lines: Label and text, the most pressing first.
        run: Name of the run.
        link: Address of the run's page.
        runbook: Address of what to do about alerts of this kind.
        handle: How to acknowledge or snooze it.
    """

    headline: str
    lines: Sequence[tuple[str, str]]
    run: str
    link: str
    runbook: str
    handle: str


def facts_of(alert: Alert, transition: Transition, page: str | None) -> AlertFacts:
    """Put an alert into words.

    Args:
        alert: The alert.
        transition: Whether it fires, still fires, or is over.
        page: Address of the service as people reach it, or None when it is not known.
    """
    subject = alert.subject
    who = f"{subject.run} (project {subject.project}, attempt {subject.attempt})"
    if transition == "resolved":
        over = alert.end_reason or "over"
        lines = [("Run", who), ("Over", f"{over}, at step {alert.resolved_step}")]
    else:
        lines = [
            ("Run", who),
            ("What", f"{_WHAT[alert.kind]} (step {alert.content.step})"),
            ("How sure", how_sure(alert)),
            ("Time left", time_left(alert)),
            ("At risk", at_risk(alert)),
            ("Why", why(alert)),
            ("Do", remedy(alert)),
        ]
    open_ = transition != "resolved" and alert.state == "firing"
    return AlertFacts(
        headline=headline(alert, transition),
        lines=tuple((label, text) for label, text in lines if text),
        run=subject.run,
        link=page_link(page, alert) or "",
        runbook=runbook_link(page, alert) or "",
        handle=(
            f"foreshock alert acknowledge {alert.id} (or: snooze {alert.id} 2h)" if open_ else ""
        ),
    )


def headline(alert: Alert, transition: Transition) -> str:
    """One short line, the run first."""
    run = shorten(alert.subject.run, _RUN_NAME)
    if transition == "resolved":
        return f"{run}: over ({shorten(alert.end_reason or 'resolved', 30)})"
    still = "still " if transition == "reminder" else ""
    if alert.kind == "silence":
        return f"{run}: {still}silent since step {alert.content.step}"
    if alert.kind == "nonfinite":
        return f"{run}: loss {still}not finite, step {alert.content.step}"
    if alert.kind == "detection":
        return f"{run}: loss {still}diverging, step {alert.content.step}"
    surest = _surest(alert)
    sure = "likely" if surest is None else f"{_percent(surest[1])}"
    left = _lead_seconds(alert)
    if left is not None:
        return f"{run}: {still}{sure} to diverge, ~{duration(left)} left"
    soon = "" if surest is None else f" within {surest[0]} steps"
    return f"{run}: {still}{sure} to diverge{soon}"


def how_sure(alert: Alert) -> str:
    """Probabilities with their bands, the nearest horizon first."""
    known = []
    for horizon, probability in sorted(alert.content.probability.items()):
        if probability is None or not math.isfinite(probability):
            continue
        low, high = alert.content.band.get(horizon, (math.nan, math.nan))
        band = f" ({_percent(low)} to {_percent(high)})" if math.isfinite(low + high) else ""
        known.append(f"{_percent(probability)}{band} within {horizon:,} steps")
    if alert.kind in ("detection", "nonfinite"):
        # What has begun needs no forecast.
        return "certain: it is in the loss itself"
    return ", ".join(known)


def time_left(alert: Alert) -> str:
    """Steps, and their time where it is known."""
    lead = alert.content.expected_lead
    if alert.kind != "forecast" or lead is None or not math.isfinite(lead):
        return ""
    seconds = _lead_seconds(alert)
    time = "" if seconds is None else f", {duration(seconds)}"
    return f"about {lead:,.0f} steps{time}, if it does diverge"


def at_risk(alert: Alert) -> str:
    """What is lost if the run diverges now."""
    stakes = alert.content.stakes
    hours = stakes.hours_at_risk
    if hours is None or alert.kind == "silence":
        return ""
    since = f"{duration(3600 * hours)} since the last checkpoint seen"
    if stakes.gpu_hours is None or stakes.world_size is None:
        return since
    gpus = "GPU" if stakes.world_size == 1 else "GPUs"
    return f"{_amount(stakes.gpu_hours)} GPU-hours ({since} on {stakes.world_size:,} {gpus})"


def why(alert: Alert) -> str:
    """The likeliest cause, with its evidence and layers."""
    if not alert.content.causes:
        return ""
    cause = alert.content.causes[0]
    name = str(cause.get("name", "unknown")).replace("_", " ")
    share = cause.get("probability")
    sure = f" ({_percent(share)})" if isinstance(share, float) and math.isfinite(share) else ""
    said = str(cause.get("evidence") or "")
    layers = [str(layer) for layer in cause.get("layers") or ()]
    named = [layer for layer in layers[:3] if layer not in said]
    where = f"; in {', '.join(named)}" if named else ""
    since = cause.get("since_step")
    when = "" if since is None else f", since step {since}"
    return f"{name}{sure}{when}: {said}{where}" if said else f"{name}{sure}{when}{where}"


def remedy(alert: Alert) -> str:
    """What to do: first what any alert of the kind asks for, then the diagnosis's."""
    first = _DO[alert.kind]
    said = str(alert.content.causes[0].get("remedy") or "") if alert.content.causes else ""
    return f"{first}; then: {said}" if said else first


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"


def shorten(text: str, most: int) -> str:
    """At most so many characters, the end marked where some are missing."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def page_link(page: str | None, alert: Alert) -> str | None:
    """Address of the run's page.

    Args:
        page: Address of the service as people reach it, or None when it is not known.
        alert: The alert.
    """
    if page is None:
        return None
    return f"{page.rstrip('/')}/?run={quote(alert.subject.run_id, safe='')}"


def runbook_link(page: str | None, alert: Alert) -> str | None:
    """Address of the runbook's section, at the service itself."""
    return None if page is None else f"{page.rstrip('/')}/runbook#{alert.name.lower()}"


def _surest(alert: Alert) -> tuple[int, float] | None:
    """The horizon that says most: the nearest of those with the highest probability."""
    known = [
        (horizon, probability)
        for horizon, probability in sorted(alert.content.probability.items())
        if probability is not None and math.isfinite(probability)
    ]
    return max(known, key=lambda pair: pair[1], default=None)


def _lead_seconds(alert: Alert) -> float | None:
    lead, step = alert.content.expected_lead, alert.content.stakes.step_seconds
    if alert.kind != "forecast" or lead is None or step is None:
        return None
    seconds = lead * step
    return seconds if math.isfinite(seconds) else None


def _percent(share: float) -> str:
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
