"""`foreshock alert`: what fires, and who has taken it on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from foreshock.api.cli import durations
from foreshock.api.cli.data import DEFAULT_URL, Project, Token, Url

if TYPE_CHECKING:
    from foreshock.monitor.client import Alert, Client

__all__ = ["register"]

AlertId = Annotated[int, typer.Argument(metavar="ID", min=1, help="Its number, see `list`.")]
Note = Annotated[str | None, typer.Option(help="What the others should know.")]
AsJson = Annotated[bool, typer.Option("--json", help="For a program to read.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Alerts: list, acknowledge, snooze.", no_args_is_help=True)
    group.command("list")(list_)
    group.command("acknowledge")(acknowledge)
    group.command("snooze")(snooze)
    group.command("unmute")(unmute)
    app.add_typer(group, name="alert")


def list_(
    run: Annotated[str | None, typer.Option(help="Only of this run.")] = None,
    state: Annotated[
        str | None, typer.Option(help="pending, firing or resolved; default: all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 20,
    project: Project = "default",
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List alerts, newest first."""
    with _client(url, token, project) as client:
        found = client.alerts(run, state=state, limit=limit)
    if as_json:
        typer.echo(json.dumps([asdict(alert) for alert in found], default=str, indent=1))
        return
    for alert in found:
        typer.echo(_line(alert))


def acknowledge(
    alert_id: AlertId, note: Note = None, url: Url = DEFAULT_URL, token: Token = None
) -> None:
    """Take a firing alert on: it pages nobody again, its end is still told."""
    with _client(url, token) as client:
        typer.echo(_line(client.acknowledge(alert_id, note=note)))


def snooze(
    alert_id: AlertId,
    length: Annotated[str, typer.Argument(metavar="FOR", help="How long, e.g. 30m, 2h.")],
    note: Note = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Keep an alert from paging for a while; if it fires then, it pages again."""
    with _client(url, token) as client:
        typer.echo(_line(client.snooze(alert_id, durations.seconds(length), note=note)))


def unmute(alert_id: AlertId, url: Url = DEFAULT_URL, token: Token = None) -> None:
    """Take back an acknowledgement or a snooze."""
    with _client(url, token) as client:
        typer.echo(_line(client.unmute(alert_id)))


@contextmanager
def _client(url: str, token: str | None, project: str = "default") -> Iterator[Client]:
    """A client; what goes wrong ends the command with one line."""
    from foreshock.monitor.client import Client, ClientError

    try:
        with Client(url, token=token, project=project, timeout=60) as client:
            yield client
    except (ClientError, ValueError) as error:
        typer.echo(f"foreshock alert: {error}", err=True)
        raise typer.Exit(2) from None


def _line(alert: Alert) -> str:
    since = alert.starts_at.astimezone().isoformat(" ", "minutes")
    parts = [str(alert.id), alert.state, alert.severity, since, alert.summary]
    if alert.mute is not None:
        until = alert.mute.until
        end = "" if until is None else f" until {until.astimezone().isoformat(' ', 'minutes')}"
        parts.append(f"{alert.mute.decision} by {alert.mute.by}{end}")
    return "  ".join(parts)
