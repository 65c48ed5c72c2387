"""`foreshock tokenize FOLDER FILE`: text once to tokens, for runs that map it into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreshock.api.cli import extras

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tokenize")(tokenize)


def tokenize(
    folder: Annotated[Path, typer.Argument(help="Text files, searched recursively.")],
    file: Annotated[Path, typer.Argument(help="The token file to write, such as train.bin.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json; without it tokens are bytes.")
    ] = None,
) -> None:
    """Turn a folder of text into a token file for `foreshock train`.

    Train on it with --set data.source=tokens --data FILE.
    """
    extras.require("trainer")
    from foreshock.trainer.token_files import convert

    try:
        written = convert(folder, file, tokenizer)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(
        f"{file}: {written.tokens:,} tokens ({written.dtype}), the largest {written.largest}; "
        f"foreshock train RECIPE --set data.source=tokens --data {file} "
        f"--set model.vocabulary={max(256, written.largest + 1)}"
    )
