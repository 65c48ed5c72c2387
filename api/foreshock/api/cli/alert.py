"""`foreshock alert`: what fires, who has taken it on, and how it reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreshock.api.cli import durations, extras
from foreshock.api.cli.data import DEFAULT_URL, Project, Token, Url

if TYPE_CHECKING:
    from foreshock.monitor.client import Alert, Client

__all__ = ["register"]

AlertId = Annotated[int, typer.Argument(metavar="ID", min=1, help="Its number, see `list`.")]
Note = Annotated[str | None, typer.Option(help="What the others should know.")]
AsJson = Annotated[bool, typer.Option("--json", help="For a program to read.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Alerts: list, mute, judge, preview.", no_args_is_help=True)
    group.command("list")(list_)
    group.command("acknowledge")(acknowledge)
    group.command("snooze")(snooze)
    group.command("unmute")(unmute)
    group.command("feedback")(feedback)
    group.command("preview")(preview)
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


def feedback(
    run: Annotated[str | None, typer.Option(help="Only of this run.")] = None,
    days: Annotated[int | None, typer.Option(min=1, help="Only of the last days.")] = None,
    project: Project = "default",
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show how many alerts of each rule people called right and wrong."""
    with _client(url, token, project) as client:
        rules = client.alert_feedback(run, days=days)
    if as_json:
        typer.echo(json.dumps(rules, indent=1))
        return
    for rule in rules:
        typer.echo(_rate(rule))


def _rate(rule: Mapping[str, Any]) -> str:
    share, ends = rule["false_share"], rule["interval"]
    said = "no answer yet"
    if share is not None:
        said = f"{share:.0%} false ({ends[0]:.0%} to {ends[1]:.0%})"
    return (
        f"{rule['name']} ({rule['severity']}): {rule['fired']} fired, {rule['right']} right,"
        f" {rule['wrong']} wrong, {rule['unanswered']} unanswered: {said}"
    )


class Layout(StrEnum):
    """Where an alert is read; see `foreshock.api.alert_messages`."""

    CHAT = "chat"
    PLAIN = "plain"
    MAIL = "mail"
    PHONE = "phone"
    WEBHOOK = "webhook"


class Kind(StrEnum):
    """What an alert is about; see `foreshock.api.alert_model`."""

    FORECAST = "forecast"
    DETECTION = "detection"
    NONFINITE = "nonfinite"
    SILENCE = "silence"


class Says(StrEnum):
    """What a message says of an alert."""

    FIRING = "firing"
    REMINDER = "reminder"
    RESOLVED = "resolved"


def preview(
    alert_id: Annotated[
        int | None,
        typer.Argument(metavar="[ID]", min=1, help="One of the service; default: a sample."),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Of the sample.")] = Kind.FORECAST,
    says: Annotated[Says, typer.Option(help="What it says.")] = Says.FIRING,
    layout: Annotated[list[Layout] | None, typer.Option(help="Only these; default: all.")] = None,
    send: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Send it there: an apprise address.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Show an alert as chat, mail, phone and program get it, or send it for a try."""
    extras.require("api")
    from foreshock.api.alert_samples import sample_alert
    from foreshock.api.channels import DeliveryError
    from foreshock.api.cli import alert_preview

    if alert_id is None:
        alert = sample_alert(kind.value, says.value)
    else:
        with _client(url, token) as client:
            alert = alert_preview.recorded(client.alert(alert_id))
    if send is None:
        mediums = [each.value for each in layout or ()]
        for line in alert_preview.page_text(alert, says.value, mediums, url):
            typer.echo(line)
        return
    try:
        medium = alert_preview.send(alert, says.value, send, url)
    except (DeliveryError, ValueError) as error:
        typer.echo(f"foreshock alert: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"sent, laid out for: {medium}")


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
