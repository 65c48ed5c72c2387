"""What an alert says, and the labels it is known by: one wording for every channel.

Sends nothing and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from foreshock.api.alert_facts import facts_of, time_left
from foreshock.api.alert_model import Alert, Transition
from foreshock.monitor.record import encode_number

__all__ = ["alert_annotations", "alert_labels", "summary", "summary_row"]


def alert_labels(alert: Alert) -> dict[str, str]:
    """The identity of an alert: what Alertmanager deduplicates on. Never a value, never a step."""
    return {
        "alertname": alert.name,
        "project": alert.subject.project,
        "run": alert.subject.run,
        "severity": alert.severity,
    }


def alert_annotations(
    alert: Alert, transition: Transition, page: str | None = None
) -> dict[str, str]:
    """What an alert says: how sure, how long, what it costs, why, where, what to do.

    Args:
        alert: The alert.
        transition: Whether it fires, still fires, or is over.
        page: Address of the service as people reach it, for links.
    """
    content = alert.content
    facts = facts_of(alert, transition, page)
    said = {
        "summary": summary(alert, transition),
        "headline": facts.headline,
        "description": "\n".join(f"{label}: {text}" for label, text in facts.lines),
        "kind": alert.kind,
        "attempt": str(alert.subject.attempt),
        "step": str(alert.content.step),
        "probability": _probabilities(alert),
        "model_version": content.model_version,
        "time_left": time_left(alert),
        "gpu_hours_at_risk": _gpu_hours(alert),
        "link": facts.link,
        "runbook_url": facts.runbook,
    }
    if content.expected_lead is not None:
        said["expected_lead_steps"] = f"{content.expected_lead:.0f}"
    if content.causes:
        cause = content.causes[0]
        said["cause"] = str(cause.get("name", "unknown"))
        said["layers"] = ", ".join(cause.get("layers") or ())
        said["evidence"] = str(cause.get("evidence") or "")
        said["remedy"] = str(cause.get("remedy") or "")
    if transition == "resolved" and alert.end_reason:
        said["end_reason"] = alert.end_reason
    return {name: text for name, text in said.items() if text}


def _gpu_hours(alert: Alert) -> str:
    hours = alert.content.stakes.gpu_hours
    return "" if hours is None else f"{hours:.2f}"


def summary(alert: Alert, transition: Transition) -> str:
    """One line for a person."""
    if transition == "resolved":
        return f"{alert.subject.run}: {alert.end_reason or 'over'} (step {alert.resolved_step})"
    if alert.kind == "silence":
        return f"{alert.subject.run}: no records since step {alert.content.step}"
    if alert.kind == "nonfinite":
        return f"{alert.subject.run}: the loss is not finite at step {alert.content.step}"
    if alert.kind == "detection":
        return f"{alert.subject.run}: the loss is diverging at step {alert.content.step}"
    lead = alert.content.expected_lead
    soon = "" if lead is None or not math.isfinite(lead) else f", in about {lead:.0f} steps"
    return f"{alert.subject.run}: the loss is likely to diverge{soon} (step {alert.content.step})"


def _probabilities(alert: Alert) -> str:
    known = [
        f"{probability:.0%} within {horizon} steps"
        for horizon, probability in alert.content.probability.items()
        if probability is not None and math.isfinite(probability)
    ]
    return ", ".join(known)


def summary_row(alert: Alert) -> Mapping[str, object]:
    """An alert in a few JSON values, for the event stream."""
    return {
        "id": alert.id,
        "run_id": alert.subject.run_id,
        "project": alert.subject.project,
        "run": alert.subject.run,
        "attempt": alert.subject.attempt,
        "name": alert.name,
        "kind": alert.kind,
        "severity": alert.severity,
        "state": alert.state,
        "step": alert.content.step,
        "summary": summary(alert, "resolved" if alert.state == "resolved" else "firing"),
        "expected_lead": encode_number(alert.content.expected_lead),
    }
