"""Diagnosis in a process of its own: it looks at 128,000 tensors at once, and may take seconds.

One question at a time. Reads no store.
"""

from __future__ import annotations

import io
import threading
from multiprocessing.connection import Connection
from typing import Any, Final

import pyarrow as pa

from foreshock.api.diagnosis import Cause, diagnose
from foreshock.api.run_window import run_window
from foreshock.api.spawned import ProcessLost, SpawnedProcess, answer_requests

__all__ = ["DiagnosisProcess"]

_ANSWER_SECONDS: Final = 60.0


class DiagnosisProcess:
    """Finds causes in another process; safe to use from several threads."""

    def __init__(self) -> None:
        self._process = SpawnedProcess(
            _serve, None, name="foreshock-diagnosis", answer_seconds=_ANSWER_SECONDS
        )
        self._lock = threading.Lock()
        self._started = False
        self._stopping = False

    def start(self) -> None:
        """Start the process before the first question, which would have to wait for it."""
        with self._lock:
            self._stopping = False
            self._begin()

    def stop(self) -> None:
        """End the process; a question under way is not answered."""
        self._stopping = True
        self._process.interrupt()
        with self._lock:
            self._process.stop()
            self._started = False

    def diagnose(self, table: pa.Table) -> tuple[Cause, ...]:
        """Likely causes.

        Args:
            table: Records of `SCHEMA`, sorted by step, not empty.

        Raises:
            ProcessLost: It died twice over these records, hangs or failed.
        """
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        with self._lock:
            try:
                return self._asked(sink.getbuffer())
            except ProcessLost:
                # Killed since the last question, perhaps.
                self._process.stop()
                self._started = False
                return self._asked(sink.getbuffer())

    def _asked(self, body: memoryview) -> tuple[Cause, ...]:
        self._begin()
        self._process.send(None, body)
        return tuple(self._process.receive())

    def _begin(self) -> None:
        if self._stopping:
            raise ProcessLost("the service is stopping")
        if not self._started:
            self._process.start()
            self._started = True


def _serve(pipe: Connection, _: Any) -> None:
    answer_requests(pipe, _answer)


def _answer(_: Any, body: bytes) -> tuple[Cause, ...]:
    return diagnose(run_window(pa.ipc.open_stream(body).read_all()))
