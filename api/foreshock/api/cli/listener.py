"""uvicorn around an application: one process, a socket made before, a word once it answers."""

from __future__ import annotations

import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Final

import typer
import uvicorn
from fastapi import FastAPI

from foreshock.api.access.admission import Access, check_reach
from foreshock.api.cli.connections import ConnectionLimits, bounded_protocol
from foreshock.api.registry import Registry
from foreshock.api.settings import Settings, is_loopback

__all__ = ["check_certificate", "check_tokens", "claim", "listen", "serve_app"]

_BACKLOG: Final = 512
# Requests under way get so long; streams of events are ended before.
_GRACEFUL_SECONDS: Final = 5


def claim(folder: Path) -> IO[bytes]:
    """Take a folder for this process; closing the file, or the end of the process, frees it.

    Raises:
        OSError: Another service has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("wb")
    except (FileExistsError, NotADirectoryError):
        raise OSError(f"--data {folder} is a file, or lies below one; give a folder") from None
    except OSError as error:
        raise OSError(f"--data {folder} cannot be used: {error.strerror}") from None
    try:
        _lock(file)
    except OSError:
        file.close()
        raise OSError(f"{folder} is in use by another foreshock process") from None
    return file


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_tokens(settings: Settings) -> None:
    """Refuse an open address without a token before anything is made or opened.

    Raises:
        SettingsError: Nobody needs a token, or nobody has one.
    """
    place = settings.database_place
    made = place.get_backend_name() != "sqlite" or Path(place.database or "").exists()
    if is_loopback(settings.host) or settings.token is not None or not made:
        check_reach(settings, None)
        return
    registry = Registry(place)
    try:
        check_reach(settings, Access(registry, settings))
    finally:
        registry.close()


def check_certificate(settings: Settings) -> None:
    """Refuse a certificate that cannot be served, before anything is made or opened.

    Raises:
        OSError: A file cannot be read, or the two do not belong together.
    """
    if not settings.tls_cert:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:
        where = f"{settings.tls_cert} with {settings.tls_key}"
        raise OSError(f"cannot serve TLS by {where}: {error.strerror or error}") from None


def listen(settings: Settings) -> socket.socket:
    """Bind the address.

    Raises:
        OSError: It is in use or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise OSError(f"cannot listen on {where}: {error.strerror or error}") from None


def serve_app(
    app: FastAPI,
    settings: Settings,
    listener: socket.socket,
    port_file: Path | None,
    *,
    before_stop: Callable[[], None] = lambda: None,
) -> int:
    """Serve any application until told to stop.

    Returns:
        The exit code: 0, or 1 if it did not start.
    """
    limits = ConnectionLimits(
        connections=settings.max_connections,
        head_seconds=settings.head_seconds,
        stall_seconds=3 * settings.head_seconds,
    )
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
        backlog=_BACKLOG,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    server = _Server(config, listener, port_file, before_stop)
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again once it has shut down; being told to stop is no failure.
        signal.signal(number, _ignore)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _ignore(_: int, __: FrameType | None) -> None:
    """Do nothing more."""


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        port_file: Path | None,
        before_stop: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._listener = listener
        self._port_file = port_file
        self._before_stop = before_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop."""
        self._before_stop()
        await super().shutdown(sockets=sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say where."""
        await super().startup(sockets=sockets)
        if not self.started:
            return
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        scheme = "https" if self.config.is_ssl else "http"
        typer.echo(f"foreshock: listening on {scheme}://{shown}:{port}")
        if scheme == "http" and not is_loopback(host):
            typer.echo("foreshock: tokens travel in clear text: set --tls-cert and --tls-key")
        sys.stdout.flush()
        if self._port_file is not None:
            # Whoever waits for the file must never read half of it.
            unfinished = self._port_file.with_name(self._port_file.name + ".partial")
            unfinished.write_text(f"{port}\n")
            unfinished.replace(self._port_file)
