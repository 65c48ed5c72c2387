"""`foreshock token`: make, list, rotate and revoke tokens.

Without `--url` it works on the service's database (`FORESHOCK_DATA`, `FORESHOCK_DATABASE`), also
beside a running service, which notices within seconds; with it, on a service elsewhere, as whoever
`FORESHOCK_TOKEN` is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreshock.api.cli import durations, extras

if TYPE_CHECKING:
    from foreshock.api.cli.token_places import TokenPlace

__all__ = ["register"]

Data = Annotated[
    Path | None,
    typer.Option(help="Folder of the service; default FORESHOCK_DATA or foreshock-data."),
]
Url = Annotated[
    str | None,
    typer.Option(help="Address of a running service instead; needs an admin's FORESHOCK_TOKEN."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For a program to read.")]
TokenId = Annotated[str, typer.Argument(metavar="ID", help="Id of the token, see `list`.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Tokens: who may do what with the service.", no_args_is_help=True)
    group.command("create")(create)
    group.command("list")(list_)
    group.command("revoke")(revoke)
    group.command("rotate")(rotate)
    app.add_typer(group, name="token")


def create(
    name: Annotated[str, typer.Argument(help="For people, e.g. cluster-a.")],
    scope: Annotated[
        list[str], typer.Option(help="read, write or admin; several times for several.")
    ],
    project: Annotated[
        list[str] | None, typer.Option(help="A project it is kept to; several times for several.")
    ] = None,
    all_projects: Annotated[bool, typer.Option(help="Every project, those to come too.")] = False,
    expires: Annotated[
        str | None, typer.Option(help="Lifetime, e.g. 90d, 12h; default: it does not expire.")
    ] = None,
    data: Data = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. It is shown this once; the service keeps only its digest."""
    if bool(project) == all_projects:
        raise _Failed("say --project NAME, or --all-projects")
    with _place(data, url) as place:
        lifetime = None if expires is None else durations.seconds(expires)
        made = place.create(name, scope, None if all_projects else project, lifetime)
    _show_secret(made, as_json)


def list_(data: Data = None, url: Url = None, as_json: AsJson = False) -> None:
    """List the tokens, revoked and expired ones too; secrets are not kept anywhere."""
    with _place(data, url) as place:
        tokens = place.list()
    if as_json:
        typer.echo(json.dumps(tokens, indent=1))
        return
    for token in tokens:
        typer.echo(_line(token))


def revoke(token_id: TokenId, data: Data = None, url: Url = None) -> None:
    """End a token at once."""
    with _place(data, url) as place:
        place.revoke(token_id)
    typer.echo(f"{token_id} is revoked")


def rotate(
    token_id: TokenId,
    grace: Annotated[
        str, typer.Option(help="How long the secret before is still taken, e.g. 24h; 0s = not.")
    ] = "24h",
    data: Data = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Give a token a new secret; both are taken for the grace period."""
    with _place(data, url) as place:
        made = place.rotate(token_id, durations.seconds(grace))
    _show_secret(made, as_json)


class _Failed(typer.Exit):
    def __init__(self, message: str) -> None:
        typer.echo(f"foreshock token: {message}", err=True)
        super().__init__(2)


@contextmanager
def _place(data: Path | None, url: str | None) -> Iterator[TokenPlace]:
    """Where the tokens are; what goes wrong there ends the command with one line."""
    extras.require("api")
    from foreshock.api.cli.token_places import TokenPlaceError, open_place

    try:
        with open_place(data, url) as place:
            yield place
    except (TokenPlaceError, OSError, ValueError) as error:
        raise _Failed(str(error)) from None


def _show_secret(made: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(made, indent=1))
        return
    # The secret alone on stdout, so that a shell can take it.
    typer.echo(_line(made), err=True)
    if made["previous_until"]:
        typer.echo(f"the secret before is taken until {_when(made['previous_until'])}", err=True)
    typer.echo(made["secret"])


def _line(token: dict[str, Any]) -> str:
    projects = "all projects" if token["projects"] is None else " ".join(token["projects"])
    parts = [token["id"], token["name"], ",".join(token["scopes"]), projects]
    for what in ("expires_at", "revoked_at", "last_used"):
        if token[what]:
            parts.append(f"{what.removesuffix('_at').replace('_', ' ')} {_when(token[what])}")
    return "  ".join(parts)


def _when(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().isoformat(" ", "minutes")
