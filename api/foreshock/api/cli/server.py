"""The service as a process; loads everything that it is made of."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from foreshock.api.app import create_app
from foreshock.api.cli.listener import check_certificate, check_tokens, claim, listen, serve_app
from foreshock.api.live_service import LiveService
from foreshock.api.settings import Settings

__all__ = ["check_certificate", "check_tokens", "claim", "listen", "run"]


def run(settings: Settings, listener: socket.socket, port_file: Path | None) -> int:
    """Serve until told to stop.

    Returns:
        The exit code: 0, or 1 if the service did not start.
    """
    app = create_app(settings, live=LiveService)
    return serve_app(app, settings, listener, port_file, before_stop=partial(_end_streams, app))


def _end_streams(app: FastAPI) -> None:
    """A stream of events never ends by itself, and the server waits for its connections."""
    services = getattr(app.state, "services", None)
    if services is not None and isinstance(services.live, LiveService):
        services.live.stream.close()
