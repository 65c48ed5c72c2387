"""A scored log as a picture in a terminal: loss and risk over the steps, alarms below."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from foreshock.api.cli.charts import buckets, columns, mean

if TYPE_CHECKING:
    from foreshock.api.logs import LogRow
    from foreshock.monitor.record import Risk

__all__ = ["ScoreTrace", "picture"]

_HEIGHT: Final = 6
_LABEL: Final = 9
_FEWEST_COLUMNS: Final = 16
_MARKS: Final = {"pending": "·", "firing": "▲"}


@dataclass(slots=True)
class ScoreTrace:
    """What a picture needs of every row, in the order of the rows.

    Attributes:
        steps: Of each row; may fall where an attempt begins.
        losses: None where the row has none.
        risks: Per horizon, None where the model cannot say.
        states: Of the alert.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    risks: dict[int, list[float | None]] = field(default_factory=dict)
    states: list[str] = field(default_factory=list)

    def through(self, scored: Iterable[tuple[LogRow, Risk]]) -> Iterator[tuple[LogRow, Risk]]:
        """Hand rows on, keeping what is drawn later."""
        for row, risk in scored:
            scalars = row.scalars if row.record is None else row.record.scalars
            self.steps.append(row.step)
            self.losses.append(scalars.get("loss"))
            for horizon, value in risk.probability.items():
                self.risks.setdefault(horizon, []).append(value)
            self.states.append(risk.state)
            yield row, risk


def picture(trace: ScoreTrace, width: int) -> list[str]:
    """Lines of text, none longer than `width` unless that is below 26.

    The loss is drawn on a logarithmic axis when it spans more than a factor of 20.
    """
    room = max(width - _LABEL - 1, _FEWEST_COLUMNS)
    lines = _loss(trace.losses, room)
    horizon = _drawn_horizon(trace)
    if horizon is not None:
        lines += _risk(trace.risks[horizon], horizon, room)
    lines.append(_labelled("alarm", _marks(trace.states, room)))
    drawn = min(room, len(trace.steps))
    ends = f"step {trace.steps[0]}", str(trace.steps[-1])
    lines.append(_labelled("", ends[0] + ends[1].rjust(max(drawn - len(ends[0]), 0))))
    return [line.rstrip() for line in lines]


def _drawn_horizon(trace: ScoreTrace) -> int | None:
    """100 steps, which is the alarm's; else the longest that the model answers for."""
    known = [h for h, values in trace.risks.items() if any(v is not None for v in values)]
    return 100 if 100 in known else max(known, default=None)


def _loss(losses: Sequence[float | None], room: int) -> list[str]:
    shown = buckets(losses, room, mean)
    finite = [value for value in shown if value is not None and math.isfinite(value)]
    if not finite:
        return [_labelled("loss", "".join(columns(shown, room, 1)))]
    low, high = min(finite), max(finite)
    logarithmic = low > 0 and high / low > 20
    drawn = [_log(value) for value in shown] if logarithmic else shown
    lines = columns(drawn, room, _HEIGHT)
    labels = [f"{high:.4g}", *[""] * (_HEIGHT - 2), f"{low:.4g}"]
    title = "loss, logarithmic" if logarithmic else "loss"
    return [title, *map(_labelled, labels, lines)]


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and math.isfinite(value) else value


def _risk(risks: Sequence[float | None], horizon: int, room: int) -> list[str]:
    # To the top of what was reached: an alarm's threshold may be far below one half.
    high = max((value for value in risks if value is not None), default=0.0) or 1.0
    lines = columns(risks, room, _HEIGHT // 2, low=0.0, high=high, reduce=max)
    labels = [f"{high:.1%}", *[""] * (_HEIGHT // 2 - 2), "0%"]
    return [f"risk within {horizon} steps", *map(_labelled, labels, lines)]


def _marks(states: Sequence[str], room: int) -> str:
    ranks = [float({"pending": 1, "firing": 2}.get(state, 0)) for state in states]
    by_rank = {1.0: _MARKS["pending"], 2.0: _MARKS["firing"]}
    return "".join(by_rank.get(rank or 0.0, " ") for rank in buckets(ranks, room, max))


def _labelled(label: str, line: str) -> str:
    return f"{label:>{_LABEL}} {line}"
