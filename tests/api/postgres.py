"""A real PostgreSQL of Debian for tests: on a free port, killed and started again."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

_BINARIES = Path("/usr/lib/postgresql")
_START_SECONDS = 120.0


def binaries() -> Path | None:
    """The newest installed server's programs."""
    found = sorted(_BINARIES.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Postgres:
    """One server; it refuses to run as root, so it gets the user that the package made."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self._programs = programs
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        password_file = folder / "password"
        password_file.write_text(self._password)
        os.chmod(password_file, 0o644)
        command = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "owner"]
        command += ["--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
        subprocess.run(self._as_user(command), check=True, capture_output=True, cwd=folder)

    def _as_user(self, command: list[str]) -> list[str]:
        if os.geteuid() != 0:
            return command
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://owner:{self._password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "data")]
        command += ["-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        command += ["-c", "unix_socket_directories=", "-c", "max_connections=200"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._as_user(command), stdout=log, stderr=log, cwd=self._folder
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url().replace("+psycopg", ""), connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def new_database(self) -> str:
        """Address of an empty database."""
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url().replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def kill(self) -> None:
        """As a crash: no checkpoint, every connection breaks."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            # Fast shutdown: it does not wait for its clients.
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server; skips where Debian's postgresql is not installed."""
    programs = binaries()
    if programs is None:
        pytest.skip("postgresql is not installed")
    # Not below pytest's folder, which only this user may enter.
    folder = Path(tempfile.mkdtemp(prefix="foreshock-postgres-"))
    os.chmod(folder, 0o755)
    try:
        server = Postgres(folder, programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
