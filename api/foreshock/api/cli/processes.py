"""Child processes of a command: started, waited for, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["ChildFailed", "Children"]

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 10.0


class ChildFailed(RuntimeError):
    """A child process ended or did not answer in time; the message ends in what it last wrote."""


class Children:
    """Runs `python ARGUMENTS` processes, their output in files; ends them all on exit.

    Args:
        folder: Where the output goes, one `<name>.log` a child.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop_all()

    def start(
        self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a child."""
        with (self._folder / f"{name}.log").open("wb") as output:
            self._running[name] = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )

    def running(self, name: str) -> bool:
        """Whether a child has not ended."""
        return self._running[name].poll() is None

    def exit_code(self, name: str) -> int | None:
        """A child's exit code, None while it runs."""
        return self._running[name].poll()

    @staticmethod
    def sleep() -> None:
        """Wait a moment before the next look."""
        time.sleep(_POLL_SECONDS)

    def tail(self, name: str, lines: int = 20) -> str:
        """The last lines that a child wrote."""
        text = (self._folder / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def wait_for_file(self, name: str, path: Path, seconds: float) -> str:
        """Wait until a child has written a file, and read it.

        Raises:
            ChildFailed: The child ended, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not path.exists() or not path.read_text().strip():
            if not self.running(name):
                raise ChildFailed(f"{name} ended early:\n{self.tail(name)}")
            if time.monotonic() > deadline:
                raise ChildFailed(f"{name} gave no sign in {seconds:.0f} s:\n{self.tail(name)}")
            self.sleep()
        return path.read_text().strip()

    def stop_all(self) -> None:
        """Ask every child to end, newest first; kill what does not."""
        for child in reversed(self._running.values()):
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for child in self._running.values():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
