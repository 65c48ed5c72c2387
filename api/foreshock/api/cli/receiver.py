"""A webhook receiver in a process of its own: the demo's proof that an alert really arrived.

Writes each POST body as one line of JSON. It knows nothing of foreshock and is not for production.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

__all__ = ["main", "received"]


def received(log: Path) -> list[dict[str, object]]:
    """The bodies that arrived so far, oldest first; a line still being written is left out."""
    if not log.exists():
        return []
    lines = log.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def _handler(log: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Appends what is posted."""

        def do_POST(self) -> None:
            """Keep the body; answer 400 when it is no JSON object."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                document = json.loads(body)
            except ValueError:
                self.send_error(400)
                return
            with log.open("a") as file:
                file.write(json.dumps(document) + "\n")
            # With a body: some senders (Slack's) take no other answer for a yes.
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the log is the output."""

    return Handler


def main() -> None:
    """Serve on a free port of loopback, written to --port-file once it is open."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    arguments = parser.parse_args()
    server = HTTPServer(("127.0.0.1", 0), _handler(arguments.log))
    partial = arguments.port_file.with_suffix(".partial")
    partial.write_text(str(server.server_port))
    partial.rename(arguments.port_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
