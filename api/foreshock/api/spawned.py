"""A process of our own at the end of a pipe: asked, answered, replaced when it dies or hangs.

Spawned, never forked: the store's engine does not survive a fork. It ends by itself when the
process that started it is gone, however that ended. Knows nothing of what is asked.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Final

__all__ = ["ProcessLost", "SpawnedProcess", "answer_requests"]

logger = logging.getLogger(__name__)

_START_SECONDS: Final = 180.0
# It keeps nothing, and may be loading a model: it need not notice by itself.
_END_SECONDS: Final = 1.0
_NICENESS: Final = 5

Answer = Callable[[Any, bytes], Any]


class ProcessLost(Exception):
    """The process died, hangs or failed; what it held in memory is gone."""


@dataclass(frozen=True, slots=True)
class _Failure:
    reason: str


class SpawnedProcess:
    """One process; one thread at a time may use it.

    Args:
        serve: What it does: a module's function that takes the pipe and `argument`, and ends in
            `answer_requests`.
        argument: Picklable.
        name: For people who look at their processes.
        answer_seconds: Without an answer for so long it is taken to hang; starting is not counted.
    """

    def __init__(
        self,
        serve: Callable[[Connection, Any], None],
        argument: Any,
        *,
        name: str,
        answer_seconds: float,
    ) -> None:
        self._serve = serve
        self._argument = argument
        self._name = name
        self._answer_seconds = answer_seconds
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._ready = False

    @property
    def pid(self) -> int | None:
        """Its process id; None while it does not run."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it, and do not wait for it."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # A daemon: it may not outlive us, and has no children.
        process = context.Process(
            target=self._serve, args=(theirs, self._argument), name=self._name, daemon=True
        )
        process.start()
        self._process = process
        # Else it would not see that we died.
        theirs.close()
        self._pipe = ours
        self._ready = False

    def interrupt(self) -> None:
        """End it by force, from any thread; whoever waits for it gets `ProcessLost`."""
        process = self._process
        if process is not None:
            # Closed meanwhile: then it has ended.
            with suppress(ValueError):
                process.kill()

    def stop(self) -> None:
        """End it, while no other thread uses it: close the pipe, kill it if it does not notice."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        process, self._process = self._process, None
        if process is None:
            return
        process.join(_END_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        process.close()

    def send(self, request: Any, body: bytes | memoryview) -> None:
        """Ask.

        Raises:
            ProcessLost: It is not there any more.
        """
        if self._pipe is None:
            raise ProcessLost("it does not run")
        if not self._ready:
            self._receive(_START_SECONDS)
            self._ready = True
        try:
            self._pipe.send(request)
            self._pipe.send_bytes(body)
        except OSError as error:
            raise ProcessLost(str(error)) from error

    def receive(self) -> Any:
        """The answer to what was asked last.

        Raises:
            ProcessLost: It died, did not answer in time, or failed.
        """
        return self._receive(self._answer_seconds)

    def _receive(self, seconds: float) -> Any:
        # Another thread may end the process meanwhile.
        pipe, process = self._pipe, self._process
        if pipe is None or process is None:
            raise ProcessLost("it does not run")
        try:
            if not pipe.poll(seconds):
                process.kill()
                raise ProcessLost(f"no answer within {seconds:g} s")
            answer = pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise ProcessLost(str(error) or "it ended") from error
        if isinstance(answer, _Failure):
            raise ProcessLost(answer.reason)
        return answer


def answer_requests(pipe: Connection, answer: Answer) -> None:
    """Answer until the other end is gone: the whole life of a spawned process.

    Args:
        pipe: Its end.
        answer: From a request and its bytes to a picklable answer. An error of its own is told to
            whoever asked.
    """
    # Ctrl-C goes to every process of a terminal; the service ends its own ones itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        # Where cores are short, an acknowledgement comes before an answer.
        os.nice(_NICENESS)
    with suppress(OSError):
        pipe.send(None)
    while True:
        try:
            request = pipe.recv()
            body = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            found = answer(request, body)
        except Exception as error:
            logger.exception("a request failed")
            found = _Failure(f"{type(error).__name__}: {error}")
        try:
            pipe.send(found)
        except OSError:
            return
