"""`foreshock doctor`: what is wrong with this set-up, in words, and what to do about it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from foreshock.api.cli import extras
from foreshock.api.cli.checkup.disk import check_spool
from foreshock.api.cli.checkup.findings import Finding, Verdict, note
from foreshock.api.cli.checkup.machine import check_machine
from foreshock.api.cli.checkup.service import check_service

__all__ = ["register"]

_SIGNS: Final[Mapping[Verdict, tuple[str, str]]] = {
    "ok": ("ok   ", "green"),
    "note": ("note ", "yellow"),
    "wrong": ("WRONG", "bold red"),
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("doctor")(doctor)


def doctor(
    url: Annotated[
        str | None, typer.Option(envvar="FORESHOCK_URL", help="Service that jobs send to.")
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Also look at this Prometheus, e.g. http://host:9090.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Look for what is wrong: Python, torch, devices, spool, service, token, clock, forecaster.

    Changes nothing. Uses the variables that a job or a service started from here would get
    (FORESHOCK_URL, FORESHOCK_TOKEN, FORESHOCK_SPOOL, FORESHOCK_CA, FORESHOCK_COLLECT, ...).
    Exit code 0, or 1 when something is wrong.
    """
    findings = _look(url, prometheus)
    told = list(findings) if as_json else list(_tell(findings))
    count = Counter(finding.verdict for finding in told)
    if as_json:
        body = {"wrong": count["wrong"], "findings": [asdict(finding) for finding in told]}
        typer.echo(json.dumps(body, indent=1))
    else:
        typer.echo(f"{count['wrong']} wrong, {count['note']} to note, {count['ok']} well")
    raise typer.Exit(1 if count["wrong"] else 0)


def _look(url: str | None, prometheus: str | None) -> Iterator[Finding]:
    token = (os.environ.get("FORESHOCK_TOKEN") or "").strip() or None
    relay = (os.environ.get("FORESHOCK_COLLECT") or "").strip() or None
    yield from check_machine()
    yield from check_spool(os.environ, sending=bool(url or relay))
    if relay is not None:
        yield from check_service("relay", relay, token)
    if url:
        yield from check_service("service", url.strip(), token)
    elif relay is None:
        yield note(
            "service",
            "FORESHOCK_URL is not set: jobs started from here only write to their spool",
            "export FORESHOCK_URL=http://host:8420",
        )
    if extras.installed("api"):
        from foreshock.api.cli.checkup.serving import check_prometheus, check_serving

        yield from check_serving(os.environ)
        if prometheus is not None:
            yield from check_prometheus(prometheus)
    elif prometheus is not None:
        extras.require("api")


def _tell(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Print each as it comes: some take seconds."""
    console = Console(soft_wrap=True)
    for finding in findings:
        sign, style = _SIGNS[finding.verdict]
        console.print(Text.assemble((sign, style), f" {finding.check:<12} {finding.text}"))
        if finding.remedy:
            console.print(Text(f"{'':<19}do: {finding.remedy}"))
        yield finding
