"""`foreshock serve`: run the service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreshock.api.cli import extras

if TYPE_CHECKING:
    pass

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address; others than loopback need a token.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the store.")] = None,
    store: Annotated[
        str | None, typer.Option(help="Address of the store, e.g. sqlite:///path.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="Address of the database; better set FORESHOCK_DATABASE.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Bootstrap token; better set FORESHOCK_TOKEN.", show_default=False),
    ] = None,
    public_url: Annotated[str | None, typer.Option(help="Address of the page in alerts.")] = None,
    alert_url: Annotated[list[str] | None, typer.Option(help="apprise address for alerts.")] = None,
    alertmanager_url: Annotated[list[str] | None, typer.Option(help="Alertmanager.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM): serve https.", dir_okay=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key (PEM).", dir_okay=False)
    ] = None,
    retention_days: Annotated[
        int | None, typer.Option(help="Delete older records; 0 = keep.")
    ] = None,
    rollup_retention_days: Annotated[
        int | None, typer.Option(help="Delete older rollups; 0 = keep.")
    ] = None,
    port_file: Annotated[
        Path | None, typer.Option(help="Write the port here once the service answers.")
    ] = None,
) -> None:
    """Run the service until it is told to stop; what was received is finished first."""
    extras.require("api")
    from foreshock.api.settings import Settings

    overrides = {
        "host": host,
        "port": port,
        "data_dir": data,
        "store": store,
        "database": database,
        "token": token,
        "public_url": public_url,
        "tls_cert": None if tls_cert is None else str(tls_cert),
        "tls_key": None if tls_key is None else str(tls_key),
        "alert_urls": tuple(alert_url) if alert_url else None,
        "alertmanager_urls": tuple(alertmanager_url) if alertmanager_url else None,
        "retention_days": retention_days,
        "rollup_retention_days": rollup_retention_days,
    }
    try:
        settings = Settings.from_environment(os.environ, overrides)
        # Only now the heavy part: what is wrong with the settings is told at once.
        from foreshock.api.cli.server import (
            check_certificate,
            check_tokens,
            claim,
            listen,
            run,
        )
        from foreshock.api.live_service import alert_channels

        alert_channels(settings)
        check_tokens(settings)
        check_certificate(settings)
        claimed = claim(settings.data_dir)
        listener = listen(settings)
    except (ValueError, OSError) as error:
        typer.echo(f"foreshock serve: {error}", err=True)
        raise typer.Exit(2) from None
    with claimed:
        raise typer.Exit(run(settings, listener, port_file))
