"""`foreshock incident RUN@STEP`: everything around a step in one file, for somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreshock.api.cli.data import DEFAULT_URL, Project, Token, Url

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("incident")(incident)


def incident(
    subject: Annotated[str, typer.Argument(metavar="RUN@STEP", help="E.g. llama-1b@4120.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: RUN-step-STEP.zip here.")
    ] = None,
    project: Project = "default",
    attempt: Annotated[
        int | None, typer.Option(help="Default: the highest that holds the step.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Pack 2,000 steps around a step: an HTML page that opens anywhere, and the Parquet records."""
    from foreshock.monitor.client import Client, ClientError

    run, at, step = subject.rpartition("@")
    if not (at and run and step.isdecimal()):
        typer.echo(f"foreshock incident: {subject!r} is not RUN@STEP, e.g. llama-1b@4120", err=True)
        raise typer.Exit(2)
    target = output or Path(f"{Path(run).name}-step-{step}.zip")
    try:
        with Client(url, token=token, project=project, timeout=300) as client:
            size = client.save_incident(run, int(step), target, attempt=attempt)
    except (ClientError, OSError, ValueError) as error:
        typer.echo(f"foreshock incident: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{target}: {size} bytes; unpack it and open incident.html")
