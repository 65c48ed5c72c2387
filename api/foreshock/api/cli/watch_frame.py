"""A moment of a run as a picture of some lines, as one line, or as JSON. Asks nobody anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from foreshock.api.cli.charts import sparkline
from foreshock.api.cli.watching import RunView
from foreshock.monitor.client import Alert, RunRisk
from foreshock.monitor.record import encode_number

__all__ = ["Trouble", "alert_line", "as_json", "frame", "line"]

_LABEL: Final = 10
_BAR: Final = 20
_STYLES: Final[Mapping[str, str]] = {"firing": "bold red", "pending": "yellow", "resolved": "green"}


@dataclass(frozen=True, slots=True)
class Trouble:
    """The service cannot be asked.

    Attributes:
        since: When that was first seen.
        reason: In the client's words.
    """

    since: datetime
    reason: str

    def __str__(self) -> str:
        """A sentence."""
        since = f"{self.since.astimezone():%H:%M:%S}"
        return f"no answer since {since} ({clean(self.reason)}); trying again"


def clean(text: object) -> str:
    """Text that somebody else wrote, without what a terminal would act on."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def frame(view: RunView | None, trouble: Trouble | None, *, now: datetime, width: int) -> Table:
    """Everything, label by label.

    Args:
        view: The newest that is known.
        trouble: Why it may be old.
        now: For ages; with a time zone.
        width: Columns of the terminal.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(width=_LABEL, style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    room = max(width - _LABEL - 2, 20)
    for label, text in [] if view is None else _rows(view, now, room):
        table.add_row(label, text)
    if trouble is not None:
        table.add_row("service", Text(str(trouble), style="bold yellow"))
    return table


def _rows(view: RunView, now: datetime, room: int) -> Iterator[tuple[str, Text]]:
    yield "run", Text(_heading(view, now), style="bold")
    yield "loss", Text(f"{_number(view.detail.loss)}  {_spark(view, room)}")
    for horizon in sorted(view.risk.probability):
        label = "risk" if horizon == min(view.risk.probability) else ""
        yield label, Text(_horizon(view.risk, horizon))
    state = view.risk.state
    yield "alarm", Text(_alarm(view.risk), style=_STYLES.get(state, ""))
    for index, worst in enumerate(view.worst):
        value = f"{worst.statistic:<16}{worst.value:>10.4g}  {worst.role} of {clean(worst.layer)}"
        yield "" if index else "worst", Text(value)
    if view.alert is None:
        yield "last alert", Text("none so far")
        return
    for index, part in enumerate(_alert_parts(view.alert)):
        yield "" if index else "last alert", Text(part)


def _heading(view: RunView, now: datetime) -> str:
    detail = view.detail
    parts = [clean(detail.run), f"project {clean(detail.project)}", detail.status]
    parts.append("no record yet" if detail.last_step is None else f"step {detail.last_step}")
    if detail.attempts > 1:
        parts.append(f"attempt {detail.attempt} of {detail.attempts}")
    if detail.last_received is not None:
        parts.append(f"heard {_age((now - detail.last_received).total_seconds())} ago")
    return " · ".join(parts)


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _spark(view: RunView, room: int) -> str:
    return sparkline(view.losses, max(room - 12, 8)) if view.losses else "not recorded"


def _horizon(risk: RunRisk, horizon: int) -> str:
    value = risk.probability[horizon]
    name = f"{horizon:>5} steps"
    if value is None:
        return f"{name}       -  {clean(risk.reasons.get(horizon, 'not known yet'))}"
    low, high = (*risk.band.get(horizon, ()), None, None)[:2]
    band = "" if low is None or high is None else f"  {low:.1%} to {high:.1%}"
    filled = round(value * _BAR)
    return f"{name}  {value:>6.1%}  {'█' * filled}{'░' * (_BAR - filled)}{band}"


def _alarm(risk: RunRisk) -> str:
    if risk.kind is None:
        return risk.state
    parts = [f"{risk.state}: {risk.kind}"]
    if risk.expected_lead is not None:
        parts.append(f"expected in {risk.expected_lead:.0f} steps")
    if risk.drivers:
        drivers = (d.signal + (f" in {d.layer}" if d.layer else "") for d in risk.drivers[:3])
        parts.append("moved: " + clean(", ".join(drivers)))
    return "; ".join(parts)


def _alert_parts(alert: Alert) -> Iterator[str]:
    since = alert.fired_step if alert.fired_step is not None else alert.opened_step
    yield f"{alert.id} {alert.state} since step {since}: {clean(alert.summary)}"
    for cause in alert.causes[:1]:
        where = f" in {clean(', '.join(cause.layers[:3]))}" if cause.layers else ""
        yield f"cause: {clean(cause.name)}{where}"
        yield f"do: {clean(cause.remedy)}"


def line(view: RunView) -> str:
    """What is new at this step, for a log."""
    known = [f"{h}: {v:.1%}" for h, v in sorted(view.risk.probability.items()) if v is not None]
    parts = [
        "no record yet" if view.detail.last_step is None else f"step {view.detail.last_step}",
        f"loss {_number(view.detail.loss)}",
        "risk " + (", ".join(known) if known else "not known yet"),
        _alarm(view.risk),
    ]
    if view.worst:
        worst = view.worst[0]
        parts.append(f"{worst.statistic} {worst.value:.4g} in {clean(worst.layer)}")
    return " | ".join(parts)


def alert_line(alert: Alert) -> str:
    """An alert, for a log."""
    return "alert " + "; ".join(_alert_parts(alert))


def as_json(view: RunView) -> dict[str, Any]:
    """For scripts; numbers that are not finite as words."""
    alert = view.alert
    return {
        "run": view.detail.run,
        "project": view.detail.project,
        "status": view.detail.status,
        "attempt": view.detail.attempt,
        "step": view.detail.last_step,
        "loss": encode_number(view.detail.loss),
        "risk": {str(h): v for h, v in view.risk.probability.items()},
        "state": view.risk.state,
        "kind": view.risk.kind,
        "expected_lead": view.risk.expected_lead,
        "worst": [
            {
                "statistic": w.statistic,
                "role": w.role,
                "layer": w.layer,
                "value": encode_number(w.value),
            }
            for w in view.worst
        ],
        "alert": None
        if alert is None
        else {"id": alert.id, "state": alert.state, "kind": alert.kind, "summary": alert.summary},
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
