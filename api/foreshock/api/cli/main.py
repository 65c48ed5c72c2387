"""`foreshock`: puts the commands together; heavy packages load inside the command."""

from __future__ import annotations

import typer

from foreshock.api.cli import (
    alert,
    backup,
    collect,
    compare,
    data,
    demo,
    doctor,
    fit,
    incident,
    replay,
    score,
    serve,
    sweep,
    token,
    tokenize,
    train,
    watch,
)

__all__ = ["app", "run"]

app = typer.Typer(
    name="foreshock",
    help="Know ahead of time that a low-precision run is going to diverge, and why.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def _root() -> None:
    """Watch low-precision training."""


demo.register(app)
serve.register(app)
collect.register(app)
token.register(app)
alert.register(app)
data.register(app)
compare.register(app)
backup.register(app)
score.register(app)
replay.register(app)
fit.register(app)
incident.register(app)
sweep.register(app)
train.register(app)
tokenize.register(app)
watch.register(app)
doctor.register(app)


def run() -> None:
    """Entry point of the console script."""
    app()
