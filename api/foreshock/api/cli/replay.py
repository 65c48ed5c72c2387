"""`foreshock replay LOGS --policy p.yaml`: how often an alert would have paged on past runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreshock.api.cli import extras
from foreshock.api.cli.data import DEFAULT_URL, Project, Token, Url

if TYPE_CHECKING:
    from foreshock.api.cli.importing import Destination, Reading
    from foreshock.api.replay import Track
    from foreshock.api.replay_policy import ReplayPolicy

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="replay")(replay)


def replay(
    logs: Annotated[
        list[str],
        typer.Argument(help="Spools, records, logs of others, folders of them, runs of a service."),
    ],
    policy: Annotated[
        Path | None, typer.Option(help="YAML, see the how-to; default: as the service pages.")
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(help="Read lines: a group (?P<step>...) and one for each scalar."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of the logs; default: looks.")] = None,
    chosen: Annotated[
        list[str] | None, typer.Option("--map", help="NAME=THEIRS, such as loss=Train/Loss.")
    ] = None,
    artifact: Annotated[
        Path | None, typer.Option(help="Folder of a fitted artifact; default: the shipped one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
    project: Project = "default",
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Say when an alert would have paged on past runs, how far ahead, and how often in vain.

    Nothing is sent and nobody is paged. Exit code 2 for what cannot be read.
    """
    extras.require("api")
    from foreshock.api.artifact import ArtifactError
    from foreshock.api.cli.importers import ImportProblem
    from foreshock.api.cli.importing import Destination, Reading
    from foreshock.api.cli.replay_output import show
    from foreshock.api.cli.transfer import TransferError
    from foreshock.api.replay import replay as replayed
    from foreshock.api.replay_policy import PolicyError, ReplayPolicy, read_policy

    try:
        wanted = ReplayPolicy() if policy is None else read_policy(policy)
        reading = Reading(format, tuple(chosen or ()), regex)
        tracks = _tracks(logs, reading, Destination(project, None, url, token), wanted, artifact)
        answer = replayed(tracks, wanted)
    except (PolicyError, ImportProblem, TransferError, ArtifactError, OSError, ValueError) as error:
        typer.echo(f"foreshock replay: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(answer.as_dict(), allow_nan=False))
    else:
        show(answer)


def _tracks(
    logs: list[str],
    reading: Reading,
    service: Destination,
    policy: ReplayPolicy,
    artifact: Path | None,
) -> list[Track]:
    from rich.console import Console
    from rich.progress import Progress

    from foreshock.api.artifact import load, load_shipped
    from foreshock.api.cli.replay_sources import read_sources
    from foreshock.api.replay import track
    from foreshock.api.scorer import LocalScorer

    model = load_shipped() if artifact is None else load(artifact)
    tracks = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for source in read_sources(logs, reading, service):
            task = progress.add_task(source.run, total=len(source.records))
            tracks.append(
                track(
                    source.run,
                    source.attempt,
                    source.records,
                    LocalScorer(model, prior=policy.prior),
                    seconds_per_step=policy.seconds_per_step,
                    timed=source.timed,
                    progress=lambda task=task: progress.advance(task),  # type: ignore[misc]
                )
            )
    return tracks
