"""A ClickHouse over HTTP for tests: chdb in a process of its own behind a small threaded server.

Speaks as much of the protocol as the unmodified clickhouse-connect client needs: statements, bound
parameters, INSERTs with their settings, users. No sessions, no replication, no limits of a query.
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import zstandard

USER = "default"
PASSWORD = "a pass/word@with:marks"
_INSERT = re.compile(r"\s*INSERT\s+INTO\s+(.+?)\s+FORMAT\s+(\w+)\s*\Z", re.IGNORECASE | re.DOTALL)
_FORMAT = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*\Z", re.IGNORECASE)
_FOR_INSERTS = ("insert_deduplicate", "insert_deduplication_token", "optimize_on_insert")


class Engine:
    def __init__(self, path: str) -> None:
        import chdb

        self._connection = chdb.connect(path)
        self._lock = threading.Lock()

    def run(self, sql: str, kind: str, database: str, values: dict[str, str]) -> bytes:
        with self._lock:
            self._connection.query(f"USE {database}")
            answer: bytes = self._connection.query(sql, kind, params=values).bytes()
            return answer or b""

    def insert(
        self, head: str, kind: str, database: str, given: dict[str, str], body: bytes
    ) -> None:
        settings = ", ".join(f"{name} = '{given[name]}'" for name in _FOR_INSERTS if name in given)
        clause = f" SETTINGS {settings}" if settings else ""
        with tempfile.NamedTemporaryFile(suffix=".rows") as file:
            file.write(body)
            file.flush()
            sql = f"INSERT INTO {head} FROM INFILE '{file.name}'{clause} FORMAT {kind}"
            self.run(sql, "TabSeparated", database, {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "zstd":
            body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
        self._answer(body)

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        if urlsplit(self.path).path == "/ping":
            self._send(200, b"Ok.\n")
            return
        given = {k: v[0] for k, v in parse_qs(urlsplit(self.path).query, True).items()}
        signed = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {signed}":
            self._send(403, b"Code: 516. DB::Exception: default: Authentication failed")
            return
        try:
            self._send(200, *self._run(given, body))
        except Exception as error:  # noqa: BLE001 - the client gets it, as from a server
            self._send(500, str(error).encode())

    def _run(self, given: dict[str, str], body: bytes) -> tuple[bytes, str]:
        database = given.get("database", "default")
        insert = _INSERT.match(given.get("query", ""))
        if insert is not None:
            self.engine.insert(insert[1], insert[2], database, given, body)
            return b"", ""
        # An INSERT may also carry its statement as the first line of the body.
        first, _, rest = body.partition(b"\n")
        insert = _INSERT.match(first.decode(errors="replace"))
        if insert is not None:
            self.engine.insert(insert[1], insert[2], database, given, rest)
            return b"", ""
        sql = given.get("query", "") or body.decode()
        values = {k.removeprefix("param_"): v for k, v in given.items() if k.startswith("param_")}
        named = _FORMAT.search(sql)
        kind = named[1] if named else given.get("default_format", "TabSeparated")
        return self.engine.run(sql, kind, database, values), kind

    def _send(self, status: int, body: bytes, kind: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-ClickHouse-Summary", "{}")
        self.send_header("X-ClickHouse-Timezone", "UTC")
        if kind:
            self.send_header("X-ClickHouse-Format", kind)
        if status != 200:
            found = re.search(rb"Code: (\d+)", body)
            self.send_header("X-ClickHouse-Exception-Code", found[1].decode() if found else "1")
        self.end_headers()
        self.wfile.write(body)


class Front:
    """One such server over a folder; may be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        port_file = self._folder / "port"
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.api.clickhouse_front"]
        self._process = subprocess.Popen([*command, str(self._folder), str(self.port)])
        deadline = time.monotonic() + 180
        while not port_file.exists():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.port = int(port_file.read_text())

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def main(folder: Path, port: int) -> None:
    Handler.engine = Engine(str(folder / "chdb"))
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    unfinished = folder / "port.partial"
    unfinished.write_text(str(server.server_address[1]))
    unfinished.rename(folder / "port")
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
