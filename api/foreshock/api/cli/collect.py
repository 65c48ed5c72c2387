"""`foreshock collect`: run a relay for a node or a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreshock.api.cli import extras

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("collect")(collect)


def collect(
    url: Annotated[
        str | None, typer.Option(envvar="FORESHOCK_URL", help="Service that gets the records.")
    ] = None,
    relay: Annotated[
        str | None,
        typer.Option(
            envvar="FORESHOCK_RELAY", help="Instead: the next relay, e.g. of the cluster."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address; others than loopback need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8421,
    data: Annotated[Path, typer.Option(help="Folder in which batches wait.")] = Path(
        "foreshock-collect"
    ),
    token: Annotated[
        str | None,
        typer.Option(
            envvar="FORESHOCK_TOKEN", help="Bearer token that ranks bring.", show_default=False
        ),
    ] = None,
    upstream_token: Annotated[
        str | None,
        typer.Option(
            envvar="FORESHOCK_UPSTREAM_TOKEN",
            help="Token for the service or the next relay; default: the same.",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(help="Seconds that a record waits for reports, at most.")
    ] = 5.0,
    interval: Annotated[
        float, typer.Option(help="Seconds between two bundles to the next relay.")
    ] = 1.0,
    max_mib: Annotated[int, typer.Option(help="MiB of batches on disk, at most.")] = 1024,
    port_file: Annotated[
        Path | None, typer.Option(help="Write the port here once the relay answers.")
    ] = None,
) -> None:
    """Relay records and reports of a job's ranks; what was acknowledged is on disk.

    Ranks find it by FORESHOCK_COLLECT. In front of a service each record goes on once, with the
    extremes, events and health of all ranks; in front of another relay reports are joined.
    """
    extras.require("api")
    from foreshock.api.collect.settings import CollectSettings
    from foreshock.api.settings import Settings, SettingsError
    from foreshock.monitor.certificates import verification

    # What is read from a file of secrets often ends in a line break.
    token, upstream_token = ((text or "").strip() or None for text in (token, upstream_token))
    try:
        # FORESHOCK_CA, as everywhere.
        authorities = verification()
        # The one in the environment may be there for other commands.
        upstream = (relay or url or "").strip() or None
        if upstream is None:
            raise SettingsError("give --url, the service, or --relay, the next relay")
        settings = CollectSettings(
            # Ranks start together, bring the same token, and keep a connection each.
            door=Settings(
                data_dir=data,
                host=host,
                port=port,
                token=token,
                token_requests=0,
                max_connections=4096,
            ),
            upstream=upstream,
            upstream_is_relay=relay is not None,
            upstream_token=upstream_token or token,
            authorities=None if isinstance(authorities, bool) else authorities,
            wait_seconds=wait,
            interval_seconds=interval,
            max_bytes=max_mib * 1024 * 1024,
        )
        from foreshock.api.cli.listener import check_tokens, claim, listen, serve_app
        from foreshock.api.collect.app import create_collect_app

        check_tokens(settings.door)
        claimed = claim(settings.folder)
        listener = listen(settings.door)
    except (ValueError, OSError) as error:
        typer.echo(f"foreshock collect: {error}", err=True)
        raise typer.Exit(2) from None
    with claimed:
        raise typer.Exit(
            serve_app(create_collect_app(settings), settings.door, listener, port_file)
        )
