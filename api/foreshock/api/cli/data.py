"""`foreshock import`, `export` and `delete`: records into and out of a service, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from foreshock.monitor.client import Client

__all__ = ["DEFAULT_URL", "Project", "Token", "Url", "register"]

Url = Annotated[
    str, typer.Option(envvar="FORESHOCK_URL", help="Address of the service.", show_default=True)
]
Token = Annotated[
    str | None, typer.Option(envvar="FORESHOCK_TOKEN", help="Its token.", show_default=False)
]
Project = Annotated[str, typer.Option(help="Project of the run.")]
DEFAULT_URL: Final = "http://127.0.0.1:8420"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("import")(import_)
    app.command("export")(export)
    app.command("delete")(delete)


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="A spool folder, records (.parquet .arrow .json), or somebody's log: a file or "
            "the folder it is in.",
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(help="te-debug, hf, tensorboard, wandb, csv, jsonl, parquet; default: looks."),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(help="Read lines: a group (?P<step>...) and one for each scalar."),
    ] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--map", help="NAME=THEIRS, such as loss=Train/Loss, step=iter, run=id."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of the run; of a log of several, the one to take.")
    ] = None,
    project: Project = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and report only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Report as JSON.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send what there is to a service; doing it twice changes nothing.

    Reads Transformer Engine debug logs, Hugging Face's trainer_state.json, TensorBoard event files,
    W&B exports, CSV, JSON lines, Parquet, and lines by a regular expression. Says what it left out.
    Exit code 2 for what cannot be read or sent.
    """
    from foreshock.api.cli.importers import ImportProblem
    from foreshock.api.cli.importing import Destination, Reading, import_source
    from foreshock.api.cli.transfer import TransferError

    reading = Reading(format, tuple(chosen or ()), regex)
    to = Destination(project, run, None if dry_run else url, token)
    try:
        summary = import_source(source, reading, to)
    except (ImportProblem, TransferError, OSError, ValueError) as error:
        typer.echo(f"foreshock import: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(summary.as_json()) if as_json else "\n".join(summary.lines()))


def export(
    run: Annotated[str, typer.Argument(help="run_id, or the name within the project.")],
    target: Annotated[Path, typer.Argument(help="File to write: .parquet .arrow .csv .json.")],
    project: Project = "default",
    attempt: Annotated[int | None, typer.Option(help="Default: the newest view.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Write a run's records to a file; CSV holds the scalars only."""
    from foreshock.api.cli.transfer import TransferError, fetch_records

    query: dict[str, str | int] = {"project": project}
    if attempt is not None:
        query["attempt"] = attempt
    try:
        size = fetch_records(_client(url, token), run, target, query)
    except (TransferError, OSError, ValueError) as error:
        typer.echo(f"foreshock export: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{target}: {size} bytes")


def delete(
    run: Annotated[str, typer.Argument(help="run_id, or the name within the project.")],
    project: Project = "default",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Delete a run and all that a service knows of it; there is no way back.

    Needs a token of the scope admin. `foreshock export` keeps the records.
    """
    from foreshock.monitor.client import Client, ClientError

    if not yes:
        typer.confirm(f"Delete run {run} of project {project} for good?", abort=True)
    try:
        with Client(url, token=token, project=project, timeout=600) as client:
            client.delete(run)
    except (ClientError, ValueError) as error:
        typer.echo(f"foreshock delete: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{run} is deleted")


def _client(url: str, token: str | None) -> Client:
    from foreshock.monitor.client import Client

    return Client(url, token=token, timeout=120)
