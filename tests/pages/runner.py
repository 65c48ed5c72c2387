"""Runs the blocks of a page in order: bash and Python share folder and environment.

What a reader would leave running in a terminal of its own (`foreshock serve`, `foreshock collect`)
is left running here too, on a free port that takes the place of the documented one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

from tests.pages.blocks import ROOT, Block, statements

__all__ = ["PageRun", "free_port"]

# An answer rather than a failure: the two sides part, an alarm fired.
_ANSWERS: Final = re.compile(r"foreshock (compare|score)\b")
_HERE: Final = re.compile(r"(?:127\.0\.0\.1|localhost|service|relay|cluster-relay):(8420|8421)")

_SHIM: Final = """#!{python}
import os, signal, subprocess, sys, time
code = "from foreshock.api.cli.main import run; run()"
command = [{python!r}, "-c", code, *sys.argv[1:]]
if sys.argv[1:2] not in (["serve"], ["collect"]) or "--help" in sys.argv:
    os.execv(command[0], command)
name = sys.argv[1]
here = os.environ["PAGES_RUNNING"]
pid, ready, log = (os.path.join(here, name + end) for end in (".pid", ".port", ".log"))
if os.path.exists(pid):  # the reader presses Ctrl-C first
    os.kill(int(open(pid).read()), signal.SIGTERM)
    while os.path.exists("/proc/" + open(pid).read()):
        time.sleep(0.05)
if os.path.exists(ready):
    os.remove(ready)
command += ["--port", os.environ["PAGES_PORT_" + name.upper()], "--port-file", ready]
with open(log, "ab") as out:
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                               start_new_session=True)
open(pid, "w").write(str(started.pid))
for _ in range(3600):
    if os.path.exists(ready):
        os._exit(0)  # it stays
    if started.poll() is not None:
        break
    time.sleep(0.05)
sys.exit(open(log).read())
"""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


class PageRun:
    """One page in one folder.

    Args:
        folder: Holds what the page takes for granted; the rest is made beside it.
        scratch: For programs and logs.
        replaced: Further words of the page and what stands for them here.
        before: Python that the page takes for granted.
        service: Of a page that starts none: the one it finds at FORESHOCK_URL and on port 8420.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        *,
        replaced: Mapping[str, str] | None = None,
        before: str = "",
        service: str | None = None,
    ) -> None:
        self._folder, self._scratch, self._before = folder, scratch, before
        there = None if service is None else urlsplit(service).port
        self._ports = {"8420": there or free_port(), "8421": free_port()}
        self._replaced = dict(replaced or {})
        self._environment = self._first_environment()
        if service is not None:
            self._environment["FORESHOCK_URL"] = service
        self._python: subprocess.Popen[str] | None = None
        self._groups: list[int] = []
        self._log = (scratch / "log").open("ab")

    def _first_environment(self) -> dict[str, str]:
        programs = self._scratch / "bin"
        programs.mkdir()
        shim = programs / "foreshock"
        shim.write_text(_SHIM.format(python=sys.executable))
        # Not a link: a virtual environment is found by the path that it was started by.
        python = programs / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        for program in (shim, python):
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FORESHOCK_")}
        ours = [str(ROOT), *(str(ROOT / name) for name in ("monitor", "trainer", "api"))]
        return clean | {
            "PATH": f"{programs}:{clean['PATH']}",
            "PYTHONPATH": ":".join([*ours, clean.get("PYTHONPATH", "")]),
            "PAGES_RUNNING": str(self._scratch),
            "PAGES_PORT_SERVE": str(self._ports["8420"]),
            "PAGES_PORT_COLLECT": str(self._ports["8421"]),
            "COLUMNS": "120",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._python is not None:
            # The end of its input is its end; both pipes are closed.
            self._python.communicate(timeout=60)
        for path in self._scratch.glob("*.pid"):
            self._groups.append(int(path.read_text()))
        for group in self._groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._log.close()

    @property
    def log(self) -> str:
        """What everything wrote so far."""
        return (self._scratch / "log").read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where the page's own service answers, once it is started."""
        return f"http://127.0.0.1:{self._ports['8420']}"

    def run(self, block: Block) -> None:
        """Run one block.

        Raises:
            AssertionError: It fails; the message has its place and what was written.
        """
        text = self._here(block.text)
        where = f"{block.page}:{block.line}"
        if block.language == "bash":
            for statement in statements(text):
                self._shell(statement, where)
        else:
            self._exec(text, where)

    def _here(self, text: str) -> str:
        for word, ours in self._replaced.items():
            text = text.replace(word, ours)
        text = _HERE.sub(lambda found: f"127.0.0.1:{self._ports[found[1]]}", text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def _shell(self, statement: str, where: str) -> None:
        kept, place = self._scratch / "environment", self._scratch / "folder"
        # All variables are exported, so that those of one statement are there for the next.
        script = f'set -a\n{statement}\ncode=$?\nenv -0 > "{kept}"\npwd > "{place}"\nexit $code'
        began = len(self.log)
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", script],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self._groups.append(process.pid)
        code = process.wait(300)
        allowed = (0, 3) if _ANSWERS.match(statement) else (0,)
        assert code in allowed, f"{where}: exit code {code}\n{statement}\n{self.log[began:]}"
        pairs = (line.split("=", 1) for line in kept.read_text().split("\0") if "=" in line)
        self._environment = {name: value for name, value in pairs}
        self._folder = Path(place.read_text().strip())

    def _exec(self, code: str, where: str) -> None:
        if self._python is None:
            self._python = self._start_python()
            self._ask(self._before, "before")
        failure = self._ask(code, where)
        assert failure is None, f"{where}\n{failure}"

    def _start_python(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.pages.python_session"],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def _ask(self, code: str, name: str) -> str | None:
        assert self._python is not None
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        given = {"code": code, "name": name, "folder": str(self._folder)}
        self._python.stdin.write(json.dumps(given | {"environment": self._environment}) + "\n")
        self._python.stdin.flush()
        answer = self._python.stdout.readline()
        assert answer, f"{name} ended the program\n{self.log}"
        failure: str | None = json.loads(answer)["failure"]
        return failure
