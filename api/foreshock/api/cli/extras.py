"""Says which extra a command needs when it is not installed."""

from __future__ import annotations

import importlib.util

import typer

__all__ = ["installed", "require"]

_MODULES = {"trainer": ("torch",), "api": ("fastapi", "sklearn", "skops", "sqlalchemy")}


def require(*extras: str) -> None:
    """End the command with one clear line unless every extra is installed.

    Raises:
        typer.Exit: With code 2, when an extra is missing.
    """
    missing = [e for e in extras if not installed(e)]
    if missing:
        names = ",".join(missing)
        typer.echo(f"this command needs more packages: pip install 'foreshock[{names}]'", err=True)
        raise typer.Exit(2)


def installed(extra: str) -> bool:
    """Whether the packages of an extra are there."""
    return not any(_absent(module) for module in _MODULES[extra])


def _absent(module: str) -> bool:
    return importlib.util.find_spec(module) is None
