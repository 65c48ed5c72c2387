"""`foreshock score FILE`: the risk of a log, row by row, as if it were live."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from foreshock.api.cli import extras
from foreshock.api.cli.score_picture import ScoreTrace
from foreshock.api.cli.score_picture import picture as picture_of

if TYPE_CHECKING:
    from foreshock.api.artifact import Artifact
    from foreshock.api.logs import LogRow
    from foreshock.monitor.record import Risk

__all__ = ["register"]

_WIDEST: Final = 120


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="score")(score)


def score(
    file: Annotated[Path, typer.Argument(help="CSV with step, loss, ... or Parquet of records.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per row.")] = False,
    artifact: Annotated[
        Path | None, typer.Option(help="Folder of a fitted artifact; default: the shipped one.")
    ] = None,
    prior: Annotated[
        float | None, typer.Option(help="Onsets of divergence per step that you expect.")
    ] = None,
    picture: Annotated[
        bool | None,
        typer.Option("--picture/--no-picture", help="Draw it; default: on a terminal only."),
    ] = None,
) -> None:
    """Score a log: risk per row, from the rows before it only.

    Exit code 0 when no row fires, 3 when any does, 2 for input that cannot be read.
    """
    extras.require("api")
    from foreshock.api.artifact import ArtifactError, load
    from foreshock.api.logs import LogError, read_log

    if prior is not None and not 0 < prior < 1:
        typer.echo(f"--prior is {prior}; allowed: onsets per step, between 0 and 1", err=True)
        raise typer.Exit(2)
    try:
        rows = read_log(file)
        model = None if artifact is None else load(artifact)
    except (LogError, ArtifactError) as error:
        typer.echo(f"foreshock score: {error}", err=True)
        raise typer.Exit(2) from None
    scored = _score_rows(rows, model, prior)
    if as_json:
        fired = _print_json(scored)
    else:
        drawn = sys.stdout.isatty() if picture is None else picture
        fired = _print_summary(file, scored, drawn=drawn)
    raise typer.Exit(3 if fired else 0)


def _score_rows(
    rows: Iterable[LogRow], artifact: Artifact | None, prior: float | None
) -> Iterator[tuple[LogRow, Risk]]:
    from foreshock.api.artifact import load_shipped
    from foreshock.api.scorer import LocalScorer

    model = artifact if artifact is not None else load_shipped()
    scorers: dict[int, LocalScorer] = {}
    for row in rows:
        scorer = scorers.get(row.attempt)
        if scorer is None:
            scorer = scorers[row.attempt] = LocalScorer(model, prior=prior)
        if row.record is not None:
            yield row, scorer(row.record)
        else:
            yield row, scorer.score(step=row.step, scalars=row.scalars)


def _print_json(scored: Iterable[tuple[LogRow, Risk]]) -> bool:
    fired = False
    for _, risk in scored:
        fired |= risk.state == "firing"
        probabilities = {
            str(horizon): None if value is None else round(value, 6)
            for horizon, value in risk.probability.items()
        }
        line = {"step": risk.step, "risk": probabilities, "state": risk.state, "kind": risk.kind}
        sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
    return fired


def _print_summary(file: Path, scored: Iterable[tuple[LogRow, Risk]], *, drawn: bool) -> bool:
    trace = ScoreTrace()
    if drawn:
        scored = trace.through(scored)
    count, attempts = 0, set()
    before: dict[int, str] = {}
    alarms: list[str] = []
    last: Risk | None = None
    for row, risk in scored:
        count += 1
        attempts.add(row.attempt)
        if risk.state == "firing" and before.get(row.attempt) != "firing":
            alarms.append(_alarm_line(row, risk))
        before[row.attempt] = risk.state
        last = risk
    assert last is not None  # read_log refuses a log without rows
    typer.echo(f"{file.name}: {count} rows, {len(attempts)} attempt(s), {len(alarms)} alarm(s)")
    for line in alarms[:20]:
        typer.echo(line)
    if len(alarms) > 20:
        typer.echo(f"  ... and {len(alarms) - 20} more; --json has every row")
    typer.echo(f"last row, step {last.step}: {last.state}, {_risk_text(last)}")
    typer.echo(f"model {last.model_version}")
    if drawn:
        for line in picture_of(trace, min(shutil.get_terminal_size().columns, _WIDEST)):
            typer.echo(line)
    return bool(alarms)


def _alarm_line(row: LogRow, risk: Risk) -> str:
    attempt = f" (attempt {row.attempt})" if row.attempt else ""
    drivers = ", ".join(d.signal + (f" in {d.layer}" if d.layer else "") for d in risk.drivers[:3])
    cause = f"; moved: {drivers}" if drivers and risk.kind == "forecast" else ""
    return f"  step {risk.step}{attempt}: {risk.kind}, {_risk_text(risk)}{cause}"


def _risk_text(risk: Risk) -> str:
    parts = []
    for horizon, value in risk.probability.items():
        if value is not None:
            parts.append(f"{horizon} steps {value:.1%}")
    reasons = sorted(set(risk.reasons.values()))
    known = "risk within " + ", ".join(parts) if parts else "no forecast"
    return known + (f" ({'; '.join(reasons)})" if reasons else "")
