"""`foreshock compare A B`: where two runs part, in a sentence, a table, JSON or a file.

Loads both sides, leaves the judgement to `foreshock.api.compare`, and writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foreshock.api.cli import extras
from foreshock.api.cli.data import DEFAULT_URL, Project, Token, Url

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


_SIDE = (
    "a run of the service (NAME or NAME@ATTEMPT), a spool (FOLDER or FOLDER@RUN), records, a log"
)


def compare(
    a: Annotated[str, typer.Argument(help=f"One run: {_SIDE}.")],
    b: Annotated[str, typer.Argument(help="The other, likewise.")],
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="A further seed of A's recipe; may stand more than once."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    chance: Annotated[
        float, typer.Option(help="Wanted chance that equal recipes part anywhere.")
    ] = 0.05,
    export: Annotated[Path | None, typer.Option(help="Write all partings: .csv .parquet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All partings as JSON.")] = False,
    format: Annotated[str | None, typer.Option(help="Of logs, as for import.")] = None,
    regex: Annotated[str | None, typer.Option(help="Of logs, as for import.")] = None,
    chosen: Annotated[list[str] | None, typer.Option("--map", help="As for import.")] = None,
    project: Project = "default",
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """First step and tensor at which B parts from A beyond seed noise, ranked.

    Exit code 0 when they do not part, 3 when they do, 2 for what cannot be read or compared.
    """
    extras.require("api")
    import pyarrow as pa

    from foreshock.api.cli.compare_output import as_json as comparison_json
    from foreshock.api.cli.compare_output import check_target, partings_table, show, write_table
    from foreshock.api.cli.importers import ImportProblem
    from foreshock.api.cli.importing import Destination, Reading
    from foreshock.api.cli.sides import parse_side
    from foreshock.api.cli.transfer import TransferError
    from foreshock.api.compare import CompareError, Rule, compare_runs
    from foreshock.api.compare_series import series_of

    reading = Reading(format, tuple(chosen or ()), regex)
    service = Destination(project, None, url, token)
    try:
        if export is not None:
            check_target(export)
        rule = Rule(family_error=chance)
        sides = [parse_side(text) for text in (a, b, *(seeds or ()))]
        first, second, *others = (series_of(side.load(reading, service)) for side in sides)
        found = compare_runs(first, second, seeds=others, rule=rule)
        if export is not None:
            write_table(partings_table(found), export)
    except (ImportProblem, TransferError, CompareError, pa.ArrowException, OSError) as error:
        typer.echo(f"foreshock compare: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(comparison_json(a, b, found), allow_nan=False))
    else:
        show(a, b, found, seeds=len(seeds or ()), top=top)
    raise typer.Exit(3 if found.partings else 0)
