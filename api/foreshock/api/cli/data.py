"""`foreshock import` and `foreshock export`: records into and out of a service, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    import httpx

__all__ = ["register"]

Url = Annotated[
    str, typer.Option(envvar="FORESHOCK_URL", help="Address of the service.", show_default=True)
]
Token = Annotated[
    str | None, typer.Option(envvar="FORESHOCK_TOKEN", help="Its token.", show_default=False)
]
Project = Annotated[str, typer.Option(help="Project of the run.")]
_DEFAULT_URL: Final = "http://127.0.0.1:8420"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("import")(import_)
    app.command("export")(export)


def import_(
    source: Annotated[
        Path, typer.Argument(help="A spool folder, or a file of records: .parquet .arrow .json.")
    ],
    run: Annotated[str | None, typer.Option(help="Name of the run; a file only.")] = None,
    project: Project = "default",
    url: Url = _DEFAULT_URL,
    token: Token = None,
) -> None:
    """Send a spool or a file of records to a service; doing it twice changes nothing."""
    from foreshock.api.cli.transfer import TransferError, send_file, send_spool

    try:
        if source.is_dir():
            message = send_spool(source, url, token)
        else:
            name = run or source.name.split(".")[0]
            message = send_file(source, project=project, run=name, client=_client(url, token))
    except (TransferError, OSError) as error:
        typer.echo(f"foreshock import: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(message)


def export(
    run: Annotated[str, typer.Argument(help="run_id, or the name within the project.")],
    target: Annotated[Path, typer.Argument(help="File to write: .parquet .arrow .csv .json.")],
    project: Project = "default",
    attempt: Annotated[int | None, typer.Option(help="Default: the newest view.")] = None,
    url: Url = _DEFAULT_URL,
    token: Token = None,
) -> None:
    """Write a run's records to a file; CSV holds the scalars only."""
    from foreshock.api.cli.transfer import TransferError, fetch_records

    query: dict[str, str | int] = {"project": project}
    if attempt is not None:
        query["attempt"] = attempt
    try:
        size = fetch_records(_client(url, token), run, target, query)
    except (TransferError, OSError) as error:
        typer.echo(f"foreshock export: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{target}: {size} bytes")


def _client(url: str, token: str | None) -> httpx.Client:
    import httpx

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=f"{url.rstrip('/')}/api/v1/", headers=headers, timeout=120)
