"""The page about the command line, from the commands themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import typer.main

from foreshock.api.cli.main import app

__all__ = ["command_page"]


def command_page() -> str:
    """Every command with its arguments, options and environment variables, as Markdown."""
    root = typer.main.get_command(app)
    lines = ["# Command line", "", "`foreshock COMMAND --help` says the same.", ""]
    for name, command in _leaves(root, "foreshock"):
        lines += _section(name, command)
    return "\n".join(lines) + "\n"


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Commands that do something, groups left out, by name."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word in sorted(inner):
        yield from _leaves(inner[word], f"{name} {word}")


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    shown = " ".join(_argument(argument) for argument in arguments)
    yield from (f"## {name}", "", "```text", f"{name} {shown}".rstrip(), "```", "")
    yield from ((command.help or "").replace("\f", "").strip(), "")
    if arguments or options:
        yield from ("| | | default |", "|---|---|---|")
    for argument in arguments:
        yield f"| `{_argument(argument)}` | {_escaped(argument.help)} | |"
    for option in options:
        names = ", ".join(f"`{n}`" for n in (*option.opts, *option.secondary_opts))
        yield f"| {names} | {_help(option)} | {_default(option)} |"
    yield ""


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.strip("_").upper()
    return str(name) if argument.required else f"[{name}]"


def _help(option: Any) -> str:
    variable = f" From `{option.envvar}`." if option.envvar else ""
    return f"{_escaped(option.help)}{variable}"


def _default(option: Any) -> str:
    value = option.default
    if value is None or callable(value) or value is False or isinstance(value, tuple | list):
        return ""
    return (
        "on"
        if value is True
        else f"`{os.fspath(value) if hasattr(value, '__fspath__') else value}`"
    )


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")
