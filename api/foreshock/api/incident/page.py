"""The incident as one HTML page: no script, nothing from elsewhere, all words of others escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

import numpy as np

from foreshock.api.alert_log import Alert
from foreshock.api.alert_text import summary
from foreshock.api.diagnosis import Cause
from foreshock.api.incident.facts import FloatArray, Grid, Incident, WindowData
from foreshock.api.incident.movers import movers
from foreshock.api.incident.pictures import COLOURS, heat_image, line_chart
from foreshock.api.incident.style import POLICY, STYLE

__all__ = ["RECORDS_NAME", "render"]

RECORDS_NAME: Final = "records.parquet"

_FIRST: Final = ("loss", "grad_norm", "learning_rate", "update_ratio")
_MOST_LAYERS: Final = 400
_MOST_EVENTS: Final = 300
_OPEN: Final = 3


def render(incident: Incident, window: WindowData) -> str:
    """The page."""
    title = f"{incident.run.name} at step {incident.step}"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · foreshock incident</title><style>{STYLE}</style></head>"
    )
    parts = (
        _heading(incident, window, title),
        _alerts(incident),
        _diagnosis(incident),
        _risk(incident, window),
        _scalars(incident, window),
        _movers(incident, window),
        _grids(incident, window),
        _back(incident),
        _events(window),
        _about(incident),
    )
    return f"{head}<body><main>{''.join(parts)}</main></body></html>\n"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _p(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def _list(rows: Iterable[tuple[str, object]]) -> str:
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(v))}</dd>" for name, v in rows)
    return f"<dl>{body}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f'<td class="n">{_number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _heading(incident: Incident, window: WindowData, title: str) -> str:
    run = incident.run
    drawn = f"{window.width} steps" if window.width > 1 else "one step"
    return (
        f"<h1>{escape(title)}</h1>"
        + _p(
            f"Project {run.project}, attempt {incident.attempt} of {len(run.attempts)}, run id "
            f"{run.run_id}. Made {incident.made_at:%Y-%m-%d %H:%M:%S} UTC by foreshock.",
            "quiet",
        )
        + _p(
            f"{window.records:,} records of steps {window.first:,} to {window.last:,} with "
            f"{window.tensor_rows:,} rows of tensor statistics. {RECORDS_NAME} beside this page "
            "holds them all, as they were recorded. Pictures are downsampled: a line is the mean "
            f"of each stretch with a band from smallest to largest; a column of a heatmap is the "
            f"worst finite value of {drawn}."
        )
    )


def _alerts(incident: Incident) -> str:
    if not incident.alerts:
        return _section("Alarm", _p("No alert of this attempt touches these steps."))
    return _section("Alarm", *(_alert(alert) for alert in incident.alerts))


def _alert(alert: Alert) -> str:
    lead = alert.content.expected_lead
    known = (
        f"{p:.0%} within {h} steps" for h, p in alert.content.probability.items() if p is not None
    )
    drivers = (
        f"{d['signal']}" + (f" in {d['layer']}" if d.get("layer") else "")
        for d in alert.content.drivers[:5]
    )
    verdict = {True: "right", False: "wrong", None: "not judged"}[alert.correct]
    rows: list[tuple[str, object]] = [
        ("alert", f"{alert.name} ({alert.kind}, {alert.severity})"),
        ("opened, fired, resolved", _steps(alert)),
        ("since", f"{alert.starts_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("probability", ", ".join(known) or "not known"),
        ("expected lead", "not known" if lead is None else f"{lead:.0f} steps"),
        ("moved by", ", ".join(drivers) or "not recorded"),
        ("people say", f"{verdict}{': ' + alert.note if alert.note else ''}"),
    ]
    kind = "state firing" if alert.state == "firing" else "state"
    text = summary(alert, "resolved" if alert.state == "resolved" else "firing")
    return _p(f"{alert.state}: {text}", kind) + _list(rows)


def _steps(alert: Alert) -> str:
    steps = (alert.opened_step, alert.fired_step, alert.resolved_step)
    return ", ".join("none" if step is None else f"step {step:,}" for step in steps)


def _diagnosis(incident: Incident) -> str:
    if not incident.causes:
        return _section("Diagnosis", _p("Too few records before this step to compare with."))
    calm = () if incident.alerts else (_p("No alarm; this is where one would point.", "quiet"),)
    return _section("Diagnosis", *calm, *(_cause(cause) for cause in incident.causes))


def _cause(cause: Cause) -> str:
    rows = [
        ("layers", ", ".join(cause.layers)),
        ("seen in", " ".join(part for part in (cause.role, cause.statistic) if part)),
        ("since", "" if cause.since_step is None else f"step {cause.since_step:,}"),
        ("evidence", cause.evidence),
        ("remedy", cause.remedy),
        ("source", cause.source),
    ]
    title = f"{cause.name.replace('_', ' ')}, {cause.probability:.0%} of the evidence"
    body = _list((name, text) for name, text in rows if text)
    return f'<div class="cause"><h3>{escape(title)}</h3>{body}</div>'


def _marks(incident: Incident, window: WindowData) -> list[tuple[int, str]]:
    marks = [(incident.step, "asked")]
    fired = (a.fired_step for a in incident.alerts if a.fired_step is not None)
    marks += [(step, "alarm") for step in fired]
    kinds = {"checkpoint": "saved", "nonfinite": "event"}
    shown = window.marks if len(window.marks) <= _MOST_EVENTS else ()
    marks += [(mark.step, kinds.get(mark.kind, "event")) for mark in shown]
    return [(s, kind) for s, kind in dict.fromkeys(marks) if window.first <= s <= window.last]


def _chart(
    incident: Incident,
    window: WindowData,
    steps: Sequence[int],
    lines: dict[str, FloatArray],
    lost: Sequence[int] = (),
    *,
    unit: bool = False,
) -> str:
    return line_chart(
        np.asarray(steps, dtype=np.float64),
        lines,
        span=(window.first, window.last),
        marks=_marks(incident, window),
        lost=lost,
        unit=unit,
    )


def _risk(incident: Incident, window: WindowData) -> str:
    steps, by_horizon = incident.risk["step"], incident.risk["probability"]
    lines = {
        horizon: np.array([math.nan if value is None else value for value in values])
        for horizon, values in by_horizon.items()
        if any(value is not None for value in values)
    }
    if not lines:
        return _section("Risk", _p("No horizon had a forecast in these steps."))
    key = "".join(
        f'<span><b style="background:{colour}"></b>within {escape(horizon)} steps</span>'
        for colour, horizon in zip(COLOURS, lines, strict=False)
    )
    missing = [horizon for horizon in by_horizon if horizon not in lines]
    note = _p(f"No forecast within {', '.join(missing)} steps.", "quiet") if missing else ""
    return _section(
        "Risk",
        f'<p class="key">{key}</p>',
        _chart(incident, window, steps, lines, unit=True),
        note,
        _p("Dashed black: the step of this incident. Red: alarm. Green: checkpoint.", "quiet"),
    )


def _scalars(incident: Incident, window: WindowData) -> str:
    if not window.scalars:
        return _section("Scalars", _p("No scalar was recorded in these steps."))
    names = [name for name in _FIRST if name in window.scalars]
    names += [name for name in window.scalars if name not in _FIRST]
    return _section("Scalars", *(_scalar(incident, window, name) for name in names))


def _scalar(incident: Incident, window: WindowData, name: str) -> str:
    lost = window.nonfinite[name]
    note = (
        f" · {len(lost):,} values were NaN or infinite, first at step {lost[0]:,}" if lost else ""
    )
    chart = _chart(incident, window, window.steps.tolist(), {name: window.scalars[name]}, lost)
    return f'<h3>{escape(name)}<span class="quiet">{escape(note)}</span></h3>{chart}'


def _movers(incident: Incident, window: WindowData) -> str:
    bucket = (incident.step - incident.first_step) // window.width
    found = movers(window.grids, bucket)
    if not found:
        return ""
    head = ("layer", "tensor", "statistic", "usual", "at the step", "change")
    rows = ((m.layer, m.role, m.statistic, m.usual, m.now, m.change) for m in found)
    return _section(
        "What moved most",
        _p(
            "Usual is the median of the first half before the step; change is in doublings.",
            "quiet",
        ),
        _table(head, rows),
    )


def _grids(incident: Incident, window: WindowData) -> str:
    if not window.grids:
        return _section("Tensors", _p("No tensor statistics were recorded in these steps."))
    return _section(
        "Tensors",
        _p("Layers from top to bottom, steps from left to right; grey: not measured.", "quiet"),
        *_by_statistic(incident, window),
    )


def _by_statistic(incident: Incident, window: WindowData) -> Iterator[str]:
    order = {name: index for index, name in enumerate(("kurtosis", "amax", "headroom_log2"))}
    for index, grid in enumerate(sorted(window.grids, key=lambda g: order.get(g.statistic, 9))):
        start = " open" if index < _OPEN else ""
        title = escape(f"{grid.statistic} of {grid.role}")
        yield f"<details{start}><summary>{title}</summary>{_grid(incident, window, grid)}</details>"


def _grid(incident: Incident, window: WindowData, grid: Grid) -> str:
    rows = _shown(grid)
    picture, low, high, log = heat_image(grid.values[rows])
    place = (incident.step - incident.first_step + 0.5) / (grid.values.shape[1] * window.width)
    names = [grid.layers[row] for row in rows]
    scale = f"dark {low:.4g} to light {high:.4g}{', logarithmic' if log else ''}"
    left = (
        f"; {len(grid.layers) - len(rows):,} calmer layers left out"
        if len(rows) < len(grid.layers)
        else ""
    )
    lost = f"; {grid.nonfinite:,} values were NaN or infinite" if grid.nonfinite else ""
    listed = "".join(f"<li><code>{escape(name)}</code></li>" for name in names)
    alt = escape(f"{grid.statistic} of {grid.role}, {len(names)} layers", quote=True)
    return (
        f'<div class="heat"><img src="{picture}" alt="{alt}">'
        f'<i style="left:{100 * place:.2f}%"></i></div>'
        + _p(
            f"steps {incident.first_step:,} to {incident.last_step:,}; {scale}{left}{lost}", "quiet"
        )
        + f"<details><summary>{len(names)} layers</summary><ol>{listed}</ol></details>"
    )


def _shown(grid: Grid) -> list[int]:
    """Lines to draw: all, or of very many those that vary most."""
    if len(grid.layers) <= _MOST_LAYERS:
        return list(range(len(grid.layers)))
    filled = np.where(np.isfinite(grid.values), grid.values, np.nan)
    spread = np.fmax.reduce(filled, axis=1) - np.fmin.reduce(filled, axis=1)
    liveliest = np.argsort(-np.nan_to_num(spread), kind="stable")[:_MOST_LAYERS]
    return sorted(int(line) for line in liveliest)


def _back(incident: Incident) -> str:
    found = incident.checkpoint
    if found is None:
        text = (
            f"No checkpoint was recorded before step {incident.trouble_since:,}, the first sign of "
            'trouble. A training job says so with w.event("checkpoint", detail=...).'
        )
        return _section("Where to go back to", _p(text))
    how = "" if found.tokens_counted else " (steps times tokens per step)"
    tokens = "not recorded" if found.tokens is None else f"{found.tokens:,.0f}{how}"
    rows: list[tuple[str, object]] = [
        ("last known-good checkpoint", f"step {found.step:,} of attempt {found.attempt}"),
        ("it says", found.detail or "nothing"),
        ("first sign of trouble", f"step {incident.trouble_since:,}"),
        ("tokens trained on by then", tokens),
        ("last change of data before it", found.data or "none recorded"),
    ]
    return _section("Where to go back to", _list(rows))


def _events(window: WindowData) -> str:
    if not window.marks:
        return ""
    rows = [(mark.step, mark.kind, mark.text) for mark in window.marks[:_MOST_EVENTS]]
    more = len(window.marks) - len(rows)
    note = _p(f"and {more:,} more in {RECORDS_NAME}", "quiet") if more > 0 else ""
    return _section("Events", _table(("step", "kind", "detail"), rows), note)


def _about(incident: Incident) -> str:
    run = incident.run
    config = json.dumps(dict(run.config), indent=1, ensure_ascii=False, default=str)
    attempts = (
        (a.number, a.first_step, "none" if a.last_step is None else a.last_step, a.launch_id)
        for a in run.attempts
    )
    return (
        _section("Versions and environment", _list(incident.versions.items()))
        + _section("Configuration", f"<pre>{escape(config)}</pre>")
        + _section("Attempts", _table(("attempt", "first step", "last step", "launch"), attempts))
    )
