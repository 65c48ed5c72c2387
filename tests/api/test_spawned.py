"""Processes of the service's own, and what becomes of whoever waits for one."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

from foreshock.api.spawned import ProcessLost, SpawnedProcess


def silent(pipe: Connection, _: object) -> None:
    """Takes questions until the other end is gone, and answers none."""
    pipe.send(None)
    with suppress(EOFError, OSError):
        while True:
            pipe.recv_bytes()


def test_who_waits_for_a_process_that_another_thread_ends_is_told_so() -> None:
    process = SpawnedProcess(silent, None, name="silent", answer_seconds=60)
    process.start()
    process.send("what?", b"")
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            process.receive()
        except BaseException as error:  # noqa: BLE001 whatever it is
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    # It is most likely to wait by then, and is told the same if it is not.
    time.sleep(0.5)
    process.stop()
    waiting.join(60)
    assert [type(error) for error in failures] == [ProcessLost]
