"""The risk as the service sees it, for a guard without a scorer of its own.

Asks in a thread and never waits: while the service is away there is no answer, and no action.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from foreshock.monitor.client import Client
from foreshock.monitor.containment import Containment
from foreshock.monitor.record import Risk, StepRecord

__all__ = ["ServiceScorer"]

_SECONDS: Final = 1.0


class ServiceScorer:
    """Answers a record with the service's newest risk for the run.

    Args:
        client: Of the service.
        run: Name of the run, or its run_id.
        seconds: Between two questions.
        stale_steps: An answer about a step that long ago counts as none.
    """

    def __init__(
        self, client: Client, run: str, *, seconds: float = _SECONDS, stale_steps: int = 50
    ) -> None:
        self._ask: Callable[[], Risk | None] = lambda: _risk_of(client, run)
        self._seconds = seconds
        self._stale = stale_steps
        self._latest: Risk | None = None
        self._containment = Containment("risk from the service")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="foreshock-guard", daemon=True)
        self._thread.start()

    def __call__(self, record: StepRecord) -> Risk | None:
        """The newest answer; None while there is none, or only one that is too old."""
        latest = self._latest
        if latest is None or not 0 <= record.step - latest.step <= self._stale:
            return None
        return latest

    def close(self) -> None:
        """Stop asking."""
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self._latest = self._ask()
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._containment.report(error)


def _risk_of(client: Client, run: str) -> Risk | None:
    found = client.risk(run)
    if found.step is None:
        return None
    return Risk(
        step=found.step,
        probability=found.probability,
        reasons=found.reasons,
        expected_lead=found.expected_lead,
        kind=found.kind,
        state=found.state,
        drivers=found.drivers,
        model_version=found.model_version,
    )
