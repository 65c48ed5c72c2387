"""Evaluation figures as markdown, with the places where a baseline wins said out loud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foreshock.api.artifact import HEADS
from foreshock.api.evaluation import AlarmFigures, Evaluation

__all__ = ["markdown", "markdown_logs"]


def markdown(result: Evaluation) -> str:
    """The report of one evaluation."""
    parts = [
        f"{result.runs} runs in {result.groups} groups, {result.events} divergences,"
        f" {result.healthy_steps} healthy steps; every figure on runs whose group was held out.",
        _alarm_table(result.alarms),
        *_verdicts(result.alarms),
        _detection(result.detection),
        _risk_table(result),
        _slice_table("family", result.by_family),
        _slice_table("class of event", result.by_class),
    ]
    if result.held_out:
        parts.append(_left_out_table(result.held_out))
    return "\n\n".join(parts)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _alarm_table(rows: Sequence[AlarmFigures]) -> str:
    lines = [
        "| method | budget per 10,000 | forecast (95 %) | + detected by 8 steps | lead: median,"
        " 10th percentile | false alarms per 10,000 | healthy runs with an alarm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r.budget, r.method not in HEADS, r.method)):
        if row.reason:
            lines.append(f"| {row.method} | {row.budget} | null: {row.reason} | | | | |")
            continue
        low, high = row.interval or (None, None)
        lines.append(
            f"| {row.method} | {row.budget} | {_number(row.forecast)} ({_number(low)} to"
            f" {_number(high)}) of {row.events} | {_number(row.detected)} |"
            f" {_number(row.lead_median, 0)}, {_number(row.lead_low, 0)} |"
            f" {_number(row.false_rate)} | {_number(row.healthy_runs)} |"
        )
    return "\n".join(lines)


def _verdicts(rows: Sequence[AlarmFigures]) -> list[str]:
    """For each budget: does a baseline forecast at least as many as the full head?"""
    sentences = []
    for budget in sorted({row.budget for row in rows}):
        here = [row for row in rows if row.budget == budget and row.forecast is not None]
        full = next((row for row in here if row.method == "full"), None)
        others = [row for row in here if row.method not in HEADS]
        if full is None or full.forecast is None or not others:
            continue
        best = max(others, key=lambda row: row.forecast or 0.0)
        mine, theirs = full.forecast, best.forecast or 0.0
        outcome = "wins over" if mine > theirs else "does not beat"
        sentences.append(
            f"At a budget of {budget} the full head {outcome} the best baseline, {best.method}:"
            f" {mine:.2f} against {theirs:.2f} (false alarms {_number(full.false_rate)} and"
            f" {_number(best.false_rate)} per 10,000)."
        )
    return sentences


def _detection(figures: Mapping[str, float | None]) -> str:
    return (
        "Detection by the loss alone:"
        f" {_number(figures['within_8_steps'])} within 8 steps of the onset,"
        f" {_number(figures['within_100_steps'])} within 100;"
        f" {_number(figures['false_per_10000'])} false alarms per 10,000 healthy steps,"
        f" {_number(figures['healthy_runs_with_alarm'])} of the runs that do not diverge."
    )


def _risk_table(result: Evaluation) -> str:
    lines = [
        "| probability | rows | base rate | AUPRC | AUROC | AUROC within runs | Brier skill |"
        " against the clock | calibration error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, q in result.risk.items():
        lines.append(
            f"| {name} | {q.rows} | {q.base_rate:.4f} | {_number(q.average_precision, 3)} |"
            f" {_number(q.auroc, 3)} | {_number(q.auroc_within, 3)} | {_number(q.brier_skill, 3)} |"
            f" {_number(q.brier_skill_time, 3)} | {_number(q.calibration_error, 3)} |"
        )
    return "\n".join(lines)


def _slice_table(title: str, slices: Mapping[str, tuple[int, float]]) -> str:
    lines = [f"| {title} | divergences | forecast by the full head |", "|---|---|---|"]
    for name, (count, share) in slices.items():
        lines.append(f"| {name} | {count} | {share:.2f} |")
    return "\n".join(lines)


def _left_out_table(held_out: Mapping[str, AlarmFigures]) -> str:
    lines = [
        "| trained | divergences | forecast (95 %) | false alarms per 10,000 | healthy runs with an"
        " alarm |",
        "|---|---|---|---|---|",
    ]
    for name, row in held_out.items():
        if row.reason:
            lines.append(f"| {name} | | null: {row.reason} | | |")
            continue
        low, high = row.interval or (None, None)
        lines.append(
            f"| {name} | {row.events} | {_number(row.forecast)} ({_number(low)} to"
            f" {_number(high)}) | {_number(row.false_rate)} | {_number(row.healthy_runs)} |"
        )
    return "\n".join(lines)


def markdown_logs(rows: Sequence[Mapping[str, float | int | str | None]]) -> str:
    """The table of `foreshock evaluate --logs`."""
    if not rows:
        return "no run of the index stands in the logs"
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [
            _number(v, 3) if isinstance(v, float) or v is None else str(v) for v in row.values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
