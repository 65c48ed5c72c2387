"""`foreshock watch RUN`: a run in a terminal, as it goes on, whether or not the service does."""

from __future__ import annotations

import difflib
import json
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import typer
from rich.console import Console
from rich.live import Live

from foreshock.api.cli.data import DEFAULT_URL, Project, Token, Url

if TYPE_CHECKING:
    from foreshock.api.cli.watch_frame import Trouble
    from foreshock.api.cli.watching import RunView
    from foreshock.monitor.client import Client

__all__ = ["register"]

_TIMEOUT: Final = 15.0
_KNOWN_RUNS: Final = 500


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("watch")(watch)


def watch(
    run: Annotated[str, typer.Argument(help="run_id, or the name within the project.")],
    once: Annotated[bool, typer.Option("--once", help="One look, then end.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each change.")] = False,
    project: Project = "default",
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Follow a run: risk, loss, worst layers, last alert; until it has finished, or Ctrl-C.

    Without a terminal it writes a line for each change. When the service is away it says so and
    goes on. Exit code 0; 2 when there is no such run, the service says no, or does not answer at
    the only look.
    """
    from foreshock.monitor.client import Client, ClientError, Problem, Retry

    try:
        with Client(
            url, token=token, project=project, timeout=_TIMEOUT, retry=Retry(tries=1)
        ) as client:
            _follow(client, run, once=once, interval=interval, as_json=as_json)
    except KeyboardInterrupt:
        return
    except (ClientError, ValueError) as error:
        reason = error.detail if isinstance(error, Problem) else error
        typer.echo(f"foreshock watch: {reason}", err=True)
        raise typer.Exit(2) from None


class _Display(Protocol):
    """Where looks are shown."""

    def show(self, view: RunView | None, trouble: Trouble | None) -> None:
        """Show what is known, which may be old."""
        ...


def _follow(client: Client, run: str, *, once: bool, interval: float, as_json: bool) -> None:
    """Look again and again; only what waiting does not mend is raised."""
    from foreshock.api.cli.watch_frame import Trouble
    from foreshock.api.cli.watching import look
    from foreshock.monitor.client import NoAnswer, NotFound, RateLimited, ServiceFailure

    view: RunView | None = None
    trouble: Trouble | None = None
    with ExitStack() as stack:
        display = _display(stack, once=once, as_json=as_json)
        while True:
            try:
                view = look(client, run, view)
                trouble = None
            except NotFound as error:
                raise NotFound(404, _missing(client, run, view, error)) from None
            except (NoAnswer, RateLimited, ServiceFailure) as error:
                if once:
                    raise
                since = _now() if trouble is None else trouble.since
                trouble = Trouble(since, str(error))
            display.show(view, trouble)
            if once or (view is not None and trouble is None and view.over):
                return
            time.sleep(interval)


def _missing(client: Client, run: str, view: RunView | None, error: Exception) -> str:
    """Why a run is not there, with names that may have been meant."""
    from foreshock.monitor.client import ClientError

    if view is not None:
        return f"{run} is gone: it was deleted"
    try:
        names = [r.run for r in client.runs(project=client.project, limit=_KNOWN_RUNS)]
    except ClientError:
        return str(error)
    close = difflib.get_close_matches(run, names, n=3, cutoff=0.4) or names[:3]
    there = f"there are: {', '.join(close)}" if close else "there is none yet"
    return f"no run {run} in project {client.project}; {there}"


def _display(stack: ExitStack, *, once: bool, as_json: bool) -> _Display:
    console = Console()
    if as_json:
        return _JsonLines()
    if once:
        return _Picture(console)
    if not console.is_terminal:
        return _Lines()
    live = stack.enter_context(Live(console=console, auto_refresh=False))
    return _Picture(console, live)


class _Picture:
    """The whole frame: printed once, or drawn over itself."""

    def __init__(self, console: Console, live: Live | None = None) -> None:
        self._console = console
        self._live = live

    def show(self, view: RunView | None, trouble: Trouble | None) -> None:
        from foreshock.api.cli.watch_frame import frame

        drawn = frame(view, trouble, now=_now(), width=self._console.width)
        if self._live is None:
            self._console.print(drawn)
        else:
            self._live.update(drawn, refresh=True)


class _Lines:
    """A line for each change."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self._trouble = False

    def show(self, view: RunView | None, trouble: Trouble | None) -> None:
        from foreshock.api.cli.watch_frame import alert_line, line

        if trouble is not None:
            if not self._trouble:
                self._write(str(trouble))
            self._trouble = True
            return
        if self._trouble:
            self._write("the service answers again")
            self._trouble = False
        if view is None:
            return
        self._new("line", line(view))
        if view.alert is not None:
            self._new("alert", alert_line(view.alert))
        self._new("status", f"the run is {view.detail.status}")

    def _new(self, what: str, text: str) -> None:
        if self._said.get(what) != text:
            self._said[what] = text
            self._write(text)

    def _write(self, text: str) -> None:
        typer.echo(f"{_now().astimezone():%H:%M:%S} {text}")


class _JsonLines:
    """A JSON object for each change."""

    def __init__(self) -> None:
        self._said = ""

    def show(self, view: RunView | None, trouble: Trouble | None) -> None:
        from foreshock.api.cli.watch_frame import as_json

        body = {} if view is None else as_json(view)
        body["trouble"] = None if trouble is None else trouble.reason
        text = json.dumps(body, allow_nan=False)
        if text != self._said:
            self._said = text
            typer.echo(text)


def _now() -> datetime:
    return datetime.now(UTC)
