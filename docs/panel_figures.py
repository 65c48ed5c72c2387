"""The panels of a dashboard as HTML: what they ask, answered, and drawn by kind.

For `docs.dashboard_pictures`. Draws what came back and nothing else.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import plotly.graph_objects as go
from dashboards.frames import Field, Frame, from_infinity, from_prometheus, transformed
from dashboards.queries import (
    PanelQuery,
    ServiceRead,
    annotation_queries,
    panel_queries,
    service_read,
)

__all__ = ["PanelData", "drawn"]

Size = tuple[int, int]
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555")
_STATES: Final = {"green": "#56a64b", "yellow": "#f2cc0c", "red": "#e02f44", "blue": "#3274d9"}
_POINTS: Final = 240


@dataclass(frozen=True)
class PanelData:
    """Answers to the queries of panels.

    Attributes:
        service: The service.
        prometheus: A Prometheus that scraped it.
        variables: Values of the dashboards' variables.
        start: First second of panels over time.
        end: The last.
    """

    service: httpx.Client
    prometheus: httpx.Client
    variables: Mapping[str, str]
    start: float
    end: float

    def lines(self, query: PanelQuery) -> list[tuple[Mapping[str, str], list[float], list[float]]]:
        """Labels, seconds since the start, and values of each series."""
        step = max((self.end - self.start) / _POINTS, 1.0)
        given: dict[str, str | float] = {
            "query": query.expression,
            "start": self.start,
            "end": self.end,
            "step": step,
        }
        answer = self.prometheus.get("/api/v1/query_range", params=given).raise_for_status()
        return [
            (series["metric"], *_whole(series["values"], self.start, step))
            for series in answer.json()["data"]["result"]
        ]

    def newest(self, query: PanelQuery) -> list[tuple[Mapping[str, str], float]]:
        """Labels and value of each series at the end."""
        given: dict[str, str | float] = {"query": query.expression, "time": self.end}
        answer = self.prometheus.get("/api/v1/query", params=given).raise_for_status()
        data = answer.json()["data"]["result"]
        return [
            ({k: v for k, v in s["metric"].items() if k != "__name__"}, float(s["value"][1]))
            for s in data
        ]

    def frame(self, read: ServiceRead) -> Frame:
        """What the service answers to a read."""
        answer = self.service.get(read.path, params=dict(read.parameters)).raise_for_status()
        csv = read.query["type"] == "csv"
        return from_infinity(answer.text if csv else answer.json(), read.query)


def _whole(
    samples: Sequence[tuple[float, str]], start: float, step: float
) -> tuple[list[float], list[float]]:
    """Seconds and values; NaN where a series was away, so that no line goes over it."""
    times: list[float] = []
    values: list[float] = []
    for time, value in samples:
        if times and time - start - times[-1] > 1.5 * step:
            times.append(times[-1] + step)
            values.append(math.nan)
        times.append(time - start)
        values.append(float(value))
    return times, values


def drawn(panel: Mapping[str, Any], data: PanelData, board: Mapping[str, Any], size: Size) -> str:
    """The inside of a panel."""
    return _KINDS[panel["type"]](panel, data, board, size)


def _queries(panel: Mapping[str, Any], data: PanelData) -> list[PanelQuery]:
    found = panel_queries({"panels": [panel]}, data.variables)
    return [query for query in found if isinstance(query, PanelQuery)]


def _legend(query: PanelQuery, labels: Mapping[str, str]) -> str:
    text = query.legend
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text or ", ".join(labels.values())


# Panels over time


def _graph(panel: Mapping[str, Any], data: PanelData, board: Mapping[str, Any], size: Size) -> str:
    figure = go.Figure()
    behind = {
        o["matcher"]["options"]
        for o in panel["fieldConfig"]["overrides"]
        if o["matcher"]["id"] == "byFrameRefID"
    }
    place = 0
    for query in _queries(panel, data):
        for labels, times, values in data.lines(query):
            second = query.reference in behind
            figure.add_scatter(
                x=times,
                y=values,
                name=_legend(query, labels),
                mode="lines",
                line={"width": 0 if second else 2, "color": _COLOURS[place % len(_COLOURS)]},
                fill="tozeroy" if second else None,
                yaxis="y2" if second else "y",
            )
            place += 1
    if not place:
        return "<div class=none>No data</div>"
    if behind:
        right = {"overlaying": "y", "side": "right", "range": [0, 1], "tickformat": ".0%"}
        figure.update_layout(yaxis2=right, margin={"r": 45})
        _mark(figure, data, board)
    config = panel["fieldConfig"]["defaults"]
    least, most = config.get("min"), config.get("max")
    if most is not None:
        figure.update_layout(yaxis={"range": [least, most]})
    return _plot(figure, config["unit"], "s", size)


def _mark(figure: Any, data: PanelData, board: Mapping[str, Any]) -> None:
    """Checkpoints as lines, alarms as bands."""
    for query in annotation_queries(board, data.variables):
        for _, times, values in data.lines(query):
            if query.panel == "Checkpoints":
                for saved in sorted({value for value in values if not math.isnan(value)}):
                    at = saved / 1000 - data.start
                    figure.add_vline(x=at, line={"color": "#56a64b", "dash": "dot", "width": 1})
            else:
                figure.add_vrect(
                    x0=times[0], x1=times[-1], fillcolor="#e02f44", opacity=0.12, line_width=0
                )


def _stat(panel: Mapping[str, Any], data: PanelData, _: Mapping[str, Any], __: Size) -> str:
    config = panel["fieldConfig"]["defaults"]
    words = {
        value: shown["text"]
        for mapping in config.get("mappings", ())
        for value, shown in mapping["options"].items()
    }
    parts = []
    for query in _queries(panel, data):
        for labels, value in data.newest(query):
            text = words.get(f"{value:g}", _written(value, config["unit"]))
            parts.append(f"{text} <small>{html.escape(_legend(query, labels))}</small>")
    return f"<div class=stat>{' &nbsp; '.join(parts) or '-'}</div>"


def _timeline(panel: Mapping[str, Any], data: PanelData, _: Mapping[str, Any], size: Size) -> str:
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    figure = go.Figure()
    shown = set()
    for query in _queries(panel, data):
        for labels, times, values in data.lines(query):
            for state, words in mapping["options"].items():
                places = [t for t, v in zip(times, values, strict=True) if f"{v:g}" == state]
                if places:
                    width = times[1] - times[0] if len(times) > 1 else 1
                    figure.add_bar(
                        base=places,
                        x=[width] * len(places),
                        y=[_legend(query, labels)] * len(places),
                        orientation="h",
                        marker={"color": _STATES[words["color"]], "line": {"width": 0}},
                        name=words["text"],
                        showlegend=words["text"] not in shown,
                    )
                    shown.add(words["text"])
    figure.update_layout(barmode="overlay", bargap=0.3)
    return _plot(figure, "none", "s", size)


def _table(panel: Mapping[str, Any], data: PanelData, _: Mapping[str, Any], __: Size) -> str:
    steps = panel.get("transformations", ())
    if "expr" in panel["targets"][0]:
        queries = _queries(panel, data)
        several = len(queries) > 1
        raw = [
            from_prometheus(data.newest(q), f"Value #{q.reference}" if several else "Value")
            for q in queries
        ]
        frames = transformed([frame for frame in raw if frame[0].values], steps)
    else:
        frames = transformed(_frames(panel, data), steps)
    if not frames or not frames[0] or not frames[0][0].values:
        return "<div class=none>No data</div>"
    return _rows(_sorted(frames[0], panel["options"].get("sortBy")), panel)


def _sorted(frame: Frame, order: Sequence[Mapping[str, Any]] | None) -> Frame:
    if not order:
        return frame
    key = next((c for c in frame if c.name == order[0]["displayName"]), frame[0])
    places = sorted(
        range(len(key.values)),
        key=lambda i: (
            (key.values[i] is not None, key.values[i] or 0)
            if key.kind == "number"
            else (True, str(key.values[i]))
        ),
        reverse=order[0]["desc"],
    )
    return tuple(Field(c.name, c.kind, tuple(c.values[i] for i in places)) for c in frame)


def _rows(frame: Frame, panel: Mapping[str, Any]) -> str:
    units, words = _properties(panel, frame)
    hidden = {
        o["matcher"]["options"]
        for o in panel["fieldConfig"]["overrides"]
        for p in o["properties"]
        if p["id"] == "custom.hidden"
    }
    columns = [column for column in frame if column.name not in hidden]
    head = "".join(f"<th>{html.escape(column.name)}</th>" for column in columns)
    lines = []
    for place in range(len(columns[0].values)):
        cells = (_cell(c.values[place], units[c.name], words[c.name]) for c in columns)
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _properties(
    panel: Mapping[str, Any], frame: Frame
) -> tuple[dict[str, str], dict[str, Mapping[str, Any]]]:
    """Unit and words of each column."""
    units = {column.name: panel["fieldConfig"]["defaults"]["unit"] for column in frame}
    words: dict[str, Mapping[str, Any]] = {column.name: {} for column in frame}
    for override in panel["fieldConfig"]["overrides"]:
        for column in frame:
            if not _matches(override["matcher"], column.name):
                continue
            for given in override["properties"]:
                if given["id"] == "unit":
                    units[column.name] = given["value"]
                if given["id"] == "mappings":
                    words[column.name] = given["value"][0]["options"]
    return units, words


def _matches(matcher: Mapping[str, str], name: str) -> bool:
    if matcher["id"] == "byRegexp":
        return re.search(matcher["options"].strip("/"), name) is not None
    return matcher["options"] == name


def _cell(value: Any, unit: str, words: Mapping[str, Any]) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        known = words.get(f"{value:g}")
        return known["text"] if known else _written(value, unit)
    return html.escape(str(value))


def _written(value: float, unit: str) -> str:
    if math.isnan(value):
        return "NaN"
    if unit == "percentunit":
        return f"{value:.2%}"
    if unit == "s":
        return f"{value / 60:.1f} min" if value >= 60 else f"{value:.3g} s"
    if unit == "cps":
        return f"{value:.3g} /s"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Panels on a step axis


def _frames(panel: Mapping[str, Any], data: PanelData) -> list[Frame]:
    reads = [service_read(panel["title"], t, data.variables) for t in panel["targets"]]
    return [data.frame(read) for read in reads]


def _trend(panel: Mapping[str, Any], data: PanelData, _: Mapping[str, Any], size: Size) -> str:
    frames = transformed(_frames(panel, data), panel.get("transformations", ()))
    if not frames or not frames[0]:
        return "<div class=none>No data</div>"
    steps = next(column for column in frames[0] if column.name == panel["options"]["xField"])
    custom = panel["fieldConfig"]["defaults"]["custom"]
    figure = go.Figure()
    lines = [c for c in frames[0] if c is not steps and any(v is not None for v in c.values)]
    bounds = {"smallest", "largest"} if panel["fieldConfig"]["overrides"] else set()
    for place, column in enumerate(lines):
        faint = column.name in bounds
        figure.add_scatter(
            x=steps.values,
            y=column.values,
            name=column.name,
            mode="markers" if custom.get("showPoints") == "always" else "lines",
            connectgaps=True,
            line={"width": 1 if faint else 2, "color": _COLOURS[place % len(_COLOURS)]},
            opacity=0.4 if faint else 1,
        )
    return _plot(figure, panel["fieldConfig"]["defaults"]["unit"], "step", size)


def _heatmap(panel: Mapping[str, Any], data: PanelData, _: Mapping[str, Any], size: Size) -> str:
    frames = transformed(_frames(panel, data), panel.get("transformations", ()))
    if not frames or not frames[0]:
        return "<div class=none>No data</div>"
    steps, *layers = frames[0]
    figure = go.Figure(
        go.Heatmap(
            x=steps.values,
            y=[layer.name for layer in layers],
            z=[layer.values for layer in layers],
            colorscale="Cividis",
            reversescale=panel["options"]["color"]["reverse"],
            colorbar={"thickness": 10},
        )
    )
    figure.update_yaxes(autorange="reversed", tickfont={"size": 9})
    return _plot(figure, "none", "step", size)


def _plot(figure: Any, unit: str, axis: str, size: Size) -> str:
    formats = {"percentunit": ".1%", "sci": ".1e", "s": "~s"}
    figure.update_layout(
        template="plotly_white",
        width=size[0],
        height=size[1],
        margin={"l": 55, "t": 6, "b": 34, "r": figure.layout.margin.r or 10},
        legend={"orientation": "h", "y": -0.16, "font": {"size": 10}},
        font={"size": 10},
        xaxis={"title": {"text": axis, "standoff": 2}},
    )
    if unit in formats:
        figure.update_layout(yaxis={"tickformat": formats[unit]})
    made: str = figure.to_html(include_plotlyjs=False, full_html=False, config={"staticPlot": True})
    return f"<div class=plot>{made}</div>"


_KINDS: Final[Mapping[str, Callable[..., str]]] = {
    "timeseries": _graph,
    "stat": _stat,
    "state-timeline": _timeline,
    "table": _table,
    "trend": _trend,
    "heatmap": _heatmap,
}
