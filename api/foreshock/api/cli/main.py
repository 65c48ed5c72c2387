"""`foreshock`: puts the commands together. Heavy packages load inside the command that needs them."""

from __future__ import annotations

import typer

__all__ = ["app", "run"]

app = typer.Typer(
    name="foreshock",
    help="Watch low-precision training; know ahead of time that a run is going to diverge, and why.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _root() -> None:
    """Watch low-precision training."""


def run() -> None:
    """Entry point of the console script."""
    app()
