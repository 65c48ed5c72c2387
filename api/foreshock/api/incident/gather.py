"""Asks registry, store, alert log and diagnosis what they know around a step; draws nothing."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from foreshock.api.alert_log import Alert
from foreshock.api.conditional import service_version
from foreshock.api.diagnosis import Cause
from foreshock.api.incident.facts import Checkpoint, Incident
from foreshock.api.live_service import LiveService
from foreshock.api.problems import Problem
from foreshock.api.registry import Attempt, Run
from foreshock.api.risks import risk_history
from foreshock.api.store import LAST_STEP, Store, View
from foreshock.monitor.record import SCHEMA_VERSION

__all__ = ["WINDOW_STEPS", "gather"]

WINDOW_STEPS: Final = 2000
"""Steps in an incident, half before and half after the one that is asked for."""

_MOST_ALERTS: Final = 1000
_CLIENT_KEYS: Final = ("environment", "versions", "client")


def gather(store: Store, live: LiveService, run: Run, step: int, attempt: int | None) -> Incident:
    """Everything around a step but the records themselves.

    Raises:
        Problem: 404, no attempt holds the step; says which steps there are.
    """
    chosen = _attempt(run, step, attempt)
    half = WINDOW_STEPS // 2
    first = max(chosen.first_step, step - half)
    last = min(step + half - 1, step if chosen.last_step is None else chosen.last_step)
    alerts = tuple(_alerts(live, run, chosen, first, last))
    causes = live.diagnose(run.run_id, chosen.number, step)
    risk = risk_history(store.risk_history(run.run_id, chosen.number, first, last), WINDOW_STEPS)
    trouble = _trouble(store, run, chosen, step, alerts, causes)
    return Incident(
        run=run,
        attempt=chosen.number,
        step=step,
        first_step=first,
        last_step=last,
        alerts=alerts,
        causes=causes,
        risk=risk,
        checkpoint=_checkpoint(store, run, chosen, trouble),
        trouble_since=trouble,
        versions=_versions(run, alerts, live),
        made_at=datetime.now(UTC),
    )


def _attempt(run: Run, step: int, wanted: int | None) -> Attempt:
    """The attempt that is meant: the wanted one, else the highest that holds the step."""
    holding = [a for a in run.attempts if a.last_step is not None]
    if not holding:
        raise Problem(404, f"run {run.name!r} has no records yet")
    for found in reversed(holding):
        inside = found.first_step <= step <= (found.last_step or 0)
        if inside and wanted in (None, found.number):
            return found
    spans = ", ".join(f"{a.first_step} to {a.last_step} (attempt {a.number})" for a in holding)
    which = "" if wanted is None else f" in attempt {wanted}"
    raise Problem(404, f"run {run.name!r} has no step {step}{which}; it has {spans}")


def _alerts(
    live: LiveService, run: Run, attempt: Attempt, first: int, last: int
) -> Iterator[Alert]:
    found = live.log.find(run_id=run.run_id, limit=_MOST_ALERTS)
    for alert in reversed(found):
        ended = LAST_STEP if alert.resolved_step is None else alert.resolved_step
        if alert.subject.attempt == attempt.number and alert.opened_step <= last and ended >= first:
            yield alert


def _trouble(
    store: Store,
    run: Run,
    attempt: Attempt,
    step: int,
    alerts: tuple[Alert, ...],
    causes: tuple[Cause, ...],
) -> int:
    """The earliest sign of trouble: an alert, what the likeliest cause moved, a lost value."""
    signs = [step, *(a.opened_step for a in alerts if a.opened_step <= step)]
    if alerts and causes and causes[0].since_step is not None:
        signs.append(causes[0].since_step)
    half = WINDOW_STEPS // 2
    lost = store.event_rows(View(run.run_id, attempt.number, max(0, step - half), step))
    kinds = zip(lost["step"].to_pylist(), lost["kind"].to_pylist(), strict=True)
    return min([*signs, *(int(at) for at, kind in kinds if kind == "nonfinite")])


def _checkpoint(store: Store, run: Run, attempt: Attempt, trouble: int) -> Checkpoint | None:
    """The last checkpoint before the trouble, in this attempt or those it goes on from."""
    before = trouble - 1
    for candidate in sorted(run.attempts, key=lambda a: -a.number):
        if candidate.number > attempt.number or before < 0:
            continue
        events = store.event_rows(View(run.run_id, candidate.number, 0, before)).to_pylist()
        saved = [event for event in events if event["kind"] == "checkpoint"]
        if saved:
            return _described(store, run, candidate.number, saved[-1], events)
        before = min(before, candidate.first_step - 1)
    return None


def _described(
    store: Store, run: Run, attempt: int, event: Mapping[str, Any], events: list[dict[str, Any]]
) -> Checkpoint:
    step = int(event["step"])
    rows = store.scalar_rows(View(run.run_id, attempt, step, step))
    scalars = dict(zip(rows["name"].to_pylist(), rows["value"].to_pylist(), strict=True))
    counted = scalars.get("tokens")
    worked_out = None if run.tokens_per_step is None else run.tokens_per_step * (step + 1.0)
    switches = [e for e in events if e["kind"] == "data_switch" and e["step"] <= step]
    data = f"step {switches[-1]['step']}: {switches[-1]['detail'] or ''}" if switches else ""
    return Checkpoint(
        step=step,
        attempt=attempt,
        detail=event["detail"] or "",
        tokens=worked_out if counted is None else counted,
        tokens_counted=counted is not None,
        data=data,
    )


def _versions(run: Run, alerts: tuple[Alert, ...], live: LiveService) -> dict[str, str]:
    latest = live.latest(run.run_id)
    models = [alert.content.model_version for alert in alerts]
    models += [latest.risk.model_version] if latest is not None else []
    found = {
        "foreshock service": service_version(),
        "forecaster": ", ".join(dict.fromkeys(model for model in models if model)) or "unknown",
        "record schema": str(SCHEMA_VERSION),
        "service runs on": f"Python {platform.python_version()}, {platform.platform()}",
        "world size": "unknown" if run.world_size is None else str(run.world_size),
    }
    told = {key: run.config[key] for key in _CLIENT_KEYS if key in run.config}
    found |= {f"training job: {key}": str(value) for key, value in told.items()}
    if not told:
        found["training job"] = f"not recorded (config has none of {', '.join(_CLIENT_KEYS)})"
    return found
