"""`foreshock fit` and `foreshock evaluate`: make a forecaster from a corpus, and judge it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreshock.api.cli import extras

if TYPE_CHECKING:
    from foreshock.api.corpus import CorpusRun

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="fit")(fit)
    app.command(name="evaluate")(evaluate)


def fit(
    folder: Annotated[Path, typer.Argument(help="Corpus written by `foreshock sweep`.")],
    out: Annotated[Path, typer.Option(help="Folder for the artifact.")] = Path("artifact"),
    report: Annotated[
        Path | None, typer.Option(help="JSON of `foreshock evaluate`, for the model card.")
    ] = None,
) -> None:
    """Fit the forecaster on a corpus and write the artifact with its model card."""
    extras.require("api")
    from foreshock.api.artifact import save
    from foreshock.api.fitting import fit_artifact

    card = {} if report is None else {"evaluation": json.loads(report.read_text("utf-8"))}
    artifact = fit_artifact(_load(folder), card)
    save(artifact, out)
    typer.echo(f"{artifact.version} in {out}")
    for name, head in artifact.heads.items():
        shown = ", ".join(
            f"{budget} per 10,000: " + ("none" if value is None else f"{value:.3g}")
            for budget, value in head.thresholds.items()
        )
        typer.echo(f"  {name}: alarm thresholds {shown}")
        for horizon, reason in head.forecaster.reasons_.items():
            typer.echo(f"    {horizon} steps not supported: {reason}")


def evaluate(
    folder: Annotated[
        Path | None, typer.Argument(help="Corpus written by `foreshock sweep`.")
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="Parquet of strangers' logs.")] = None,
    index: Annotated[Path | None, typer.Option(help="CSV with their labels.")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds of groups.")] = 5,
    left_out: Annotated[
        bool, typer.Option(help="Also leave out each fault family and architecture.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Judge the forecaster beside its baselines on held-out runs, or its quietness on logs."""
    extras.require("api")
    if (folder is None) == (logs is None):
        typer.echo("give a corpus folder, or --logs with --index", err=True)
        raise typer.Exit(2)
    if folder is None:
        assert logs is not None
        text, document = _evaluate_logs(logs, index)
    else:
        text, document = _evaluate_corpus(folder, folds, left_out, quiet=as_json)
    body = json.dumps(document, allow_nan=False)
    if out is not None:
        out.write_text(body + "\n", encoding="utf-8")
    typer.echo(body if as_json else text)


def _load(folder: Path) -> list[CorpusRun]:
    from foreshock.api.corpus import CorpusError, load_corpus

    try:
        return load_corpus(folder, processes=os.cpu_count() or 1)
    except CorpusError as error:
        typer.echo(f"foreshock: {error}", err=True)
        raise typer.Exit(2) from None


def _evaluate_corpus(
    folder: Path, folds: int, left_out: bool, *, quiet: bool
) -> tuple[str, dict[str, object]]:
    from dataclasses import replace

    from foreshock.api import evaluation
    from foreshock.api.report import markdown

    runs = _load(folder)

    def progress(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    try:
        result = evaluation.evaluate(runs, folds=folds, progress=progress)
    except ValueError as error:
        typer.echo(f"foreshock evaluate: {error}", err=True)
        raise typer.Exit(2) from None
    if left_out:
        result = replace(result, held_out=evaluation.leave_one_out(runs, progress=progress))
    return markdown(result), result.as_dict()


def _evaluate_logs(logs: Path, index: Path | None) -> tuple[str, dict[str, object]]:
    from foreshock.api.artifact import load_shipped
    from foreshock.api.quietness import LogsError, quietness
    from foreshock.api.report import markdown_logs

    if index is None:
        typer.echo("--logs needs --index, the CSV with the labels", err=True)
        raise typer.Exit(2)
    try:
        rows = quietness(logs, index, load_shipped())
    except LogsError as error:
        typer.echo(f"foreshock evaluate: {error}", err=True)
        raise typer.Exit(2) from None
    return markdown_logs(rows), {"logs": rows}
