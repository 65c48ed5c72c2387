"""`foreshock backup` and `foreshock restore`: a service's data, safe and back again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from foreshock.api.cli.data import DEFAULT_URL, Token, Url
from foreshock.api.cli.extras import require

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("backup")(backup)
    app.command("restore")(restore)


def backup(url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Back up a running service, on its own disk; it goes on meanwhile.

    Prints the folder, which may be moved as a whole. Needs a token of the scope admin.
    """
    from foreshock.monitor.client import Client, ClientError

    try:
        with Client(url, token=token, timeout=24 * 3600) as client:
            typer.echo(client.backup())
    except (ClientError, ValueError) as error:
        typer.echo(f"foreshock backup: {error}", err=True)
        raise typer.Exit(2) from None


def restore(
    folder: Annotated[Path, typer.Argument(help="A backup's folder.")],
    data: Annotated[Path, typer.Option(help="Data folder of the service to be; no data in it.")],
) -> None:
    """Bring a backup back into an empty data folder; then start the service over it."""
    require("api")
    from foreshock.api.backup import BackupError, restore_backup
    from foreshock.api.settings import Settings, SettingsError

    try:
        settings = Settings.from_environment(os.environ, {"data_dir": data})
        began = restore_backup(folder, settings)
    except (BackupError, SettingsError) as error:
        typer.echo(f"foreshock restore: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{data}: as of {began:%Y-%m-%d %H:%M:%S} UTC")
