"""How a replay is told to a person. Judges nothing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from foreshock.api.replay import Budget, Page, Replay, RunReplay

__all__ = ["show"]

_BUDGETS: Final = (0.1, 0.5, 1.0, 2.0, 7.0)
"""Pages in vain per week that the table of budgets shows."""
_MOST_RUNS: Final = 40


def show(answer: Replay, console: Console | None = None) -> None:
    """Print it: runs with a page or a divergence, totals, what other budgets would buy."""
    out = console or Console(soft_wrap=True, highlight=False)
    told = [run for run in answer.runs if run.pages or run.onset is not None]
    for run in told[:_MOST_RUNS]:
        _show_run(out, run)
    if len(told) > _MOST_RUNS:
        out.print(f"... and {len(told) - _MOST_RUNS} more runs with pages; --json has them all")
    for line in _totals(answer):
        out.print(line)
    if answer.weeks:
        out.print(_budgets(answer.curve))
    for note in answer.notes:
        out.print(f"note: {note}")
    factor = answer.policy.threshold_factor
    out.print(f"to page like this, start the service with FORESHOCK_THRESHOLD_FACTOR={factor:.3g}")


def _show_run(out: Console, run: RunReplay) -> None:
    name = run.run if run.attempt == 1 else f"{run.run}, attempt {run.attempt}"
    what = "no loss" if run.label is None else run.label
    onset = "" if run.onset is None else f", loss rises from step {run.onset}"
    missed = ": MISSED" if run.missed else ""
    out.print(f"{name}: {what}{onset}, {run.records} records{missed}", markup=False)
    for page in run.pages:
        out.print(f"  step {page.step}: {_page(page)}", markup=False)


def _page(page: Page) -> str:
    text = f"{page.kind} {page.outcome}"
    if page.lead_steps is not None:
        lead = [f"{abs(page.lead_steps)} steps"]
        if page.lead_tokens is not None:
            lead.append(f"{abs(page.lead_tokens):.3g} tokens")
        if page.lead_hours is not None:
            lead.append(f"{abs(page.lead_hours):.2g} h")
        text += f", {' = '.join(lead)} {'ahead' if page.lead_steps > 0 else 'behind'}"
    if page.probability is not None:
        text += f", risk {page.probability:.0%}"
    return text + (f"; moved: {', '.join(page.drivers)}" if page.drivers else "")


def _totals(answer: Replay) -> list[str]:
    pages, runs = answer.pages, answer.runs
    by = {outcome: [p for p in pages if p.outcome == outcome] for outcome in ("in time", "late")}
    vain = [p for p in pages if p.outcome == "in vain"]
    span = "" if answer.weeks is None else f", {answer.weeks:.3g} weeks of training"
    names = len({run.run for run in runs})
    timely, late = len(by["in time"]), len(by["late"])
    lines = [
        f"{len(runs)} attempts of {names} runs{span}; {answer.events} diverged",
        f"{len(pages)} pages: {timely} in time, {late} late, {len(vain)} in vain",
    ]
    if answer.weeks:
        lines[-1] += f" ({len(vain) / answer.weeks:.3g} a week)"
    leads = [p.lead_steps for p in by["in time"] if p.lead_steps is not None]
    if leads:
        lines.append(f"lead of pages in time: {statistics.median(leads):g} steps (median)")
    missed = sum(run.missed for run in runs)
    if answer.events:
        ahead = sum(any(p.outcome == "in time" for p in run.pages) for run in runs)
        lines.append(
            f"of {answer.events} divergences {ahead} paged ahead,"
            f" {answer.events - ahead - missed} by 8 steps after the onset, {missed} missed"
        )
    paged = sum(bool(run.pages) for run in runs if run.onset is None)
    calm = sum(run.onset is None for run in runs)
    if calm:
        lines.append(f"of {calm} attempts that did not diverge {paged} paged")
    silent: Counter[str] = Counter()
    for run in runs:
        silent.update(run.lacking)
    lines += [f"no forecast at {count} records: {reason}" for reason, count in silent.items()]
    return lines


def _budgets(curve: Sequence[Budget]) -> Table:
    table = Table(title="what forecasts would buy on these runs", title_justify="left")
    for name in ("pages in vain a week", "as measured (95 % at most)", "forecast ahead", "factor"):
        table.add_column(name, justify="right")
    for wanted in _BUDGETS:
        kept = _kept(curve, wanted)
        if kept is None:
            table.add_row(f"{wanted:g}", "not to be had", "", "")
            continue
        share = "no event"
        if kept.forecast is not None and kept.forecast_interval is not None:
            low, high = kept.forecast_interval
            share = f"{kept.forecast:.0%} ({low:.0%} to {high:.0%})"
        measured = f"{kept.vain_per_week:.2g} ({kept.vain_highest:.2g})"
        table.add_row(f"{wanted:g}", measured, share, f"{kept.factor:.3g}")
    return table


def _kept(curve: Sequence[Budget], wanted: float) -> Budget | None:
    """The most talkative step from which on the budget is kept."""
    found = None
    for step in reversed(curve):
        if step.vain_per_week is None or step.vain_per_week > wanted:
            break
        found = step
    return found
