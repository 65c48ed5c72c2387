"""The thread that passes on what a relay holds: launches, batches in their order, reports."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from foreshock.api.collect.depot import Batch, Depot
from foreshock.api.collect.upstream import Answer, Outcome, Upstream

__all__ = ["Forwarder"]

_log = logging.getLogger(__name__)
_FIRST_WAIT: Final = 0.25
_LONGEST_WAIT: Final = 30.0
_IDLE_WAIT: Final = 1.0
_SECONDS_BETWEEN_LOGS: Final = 60.0
_FORGET_EVERY: Final = 3600.0


@dataclass(slots=True)
class _Patience:
    """When to try again what did not go through."""

    failures: int = 0
    until: float = 0.0

    def failed(self, asked: float) -> None:
        longest = min(_FIRST_WAIT * 2.0 ** min(self.failures, 16), _LONGEST_WAIT)
        self.failures += 1
        wait = max(longest * random.uniform(0.5, 1.0), min(asked, _LONGEST_WAIT))
        self.until = time.monotonic() + wait

    def worked(self) -> None:
        self.failures, self.until = 0, 0.0


class Forwarder:
    """Empties the depot.

    A launch that the upstream will not have yet holds up no other; an upstream that is not there
    holds up all.

    Args:
        depot: What waits.
        upstream: Where it goes; closed at the end.
        send_reports: Called every `interval` seconds to send what has been gathered; None where
            reports do not go on by themselves.
        interval: Seconds.

    Attributes:
        forwarded, refused, failures: Batches taken, batches refused, and tries without success.
    """

    def __init__(
        self,
        depot: Depot,
        upstream: Upstream,
        *,
        send_reports: Callable[[Upstream], Outcome] | None = None,
        interval: float = 1.0,
    ) -> None:
        self._depot, self._upstream = depot, upstream
        self._send_reports = send_reports
        self._interval = interval if send_reports is not None else _IDLE_WAIT
        self._known: set[str] = set()
        self._of_launch: dict[str, _Patience] = {}
        self._of_all = _Patience()
        self._last_log = -float("inf")
        self._next_forgetting = 0.0
        self._next_reports = 0.0
        self.forwarded = self.refused = self.failures = 0
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="foreshock-forward", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread does its work."""
        return self._thread.is_alive()

    @property
    def sent_bytes(self) -> int:
        """Bytes of bodies sent upstream so far."""
        return self._upstream.sent_bytes

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def notify(self) -> None:
        """There is a batch to pass on."""
        self._wake.set()

    def stop(self) -> None:
        """Send once more what is there, and end; what does not go through stays on disk."""
        self._stopping.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                self._turn_safely()
                self._wake.wait(self._pause())
            self._next_reports = 0.0
            self._turn_safely()
        finally:
            self._upstream.close()

    def _turn_safely(self) -> None:
        try:
            self._turn()
        except Exception as error:  # noqa: BLE001 - a full or failing disk may recover
            self._of_all.failed(0.0)
            self._say("could not go on", f"{type(error).__name__}: {error}")

    def _pause(self) -> float:
        now = time.monotonic()
        if now < self._of_all.until:
            return self._of_all.until - now
        due = [p.until for p in self._of_launch.values() if p.until]
        due.append(now + self._interval)
        return max(min(due) - now, 0.0)

    def _turn(self) -> None:
        if time.monotonic() < self._of_all.until:
            return
        self._reports()
        more = True
        while more and time.monotonic() >= self._of_all.until and not self._stopping.is_set():
            more = False
            for batch in self._depot.first_ready():
                if self._batch(batch):
                    more = True
                if time.monotonic() < self._of_all.until:
                    return
        if time.monotonic() >= self._next_forgetting:
            self._next_forgetting = time.monotonic() + _FORGET_EVERY
            self._depot.forget_old()

    def _reports(self) -> None:
        if self._send_reports is None or time.monotonic() < self._next_reports:
            return
        self._next_reports = time.monotonic() + self._interval
        outcome = self._send_reports(self._upstream)
        if outcome.answer in (Answer.TAKEN, Answer.REFUSED):
            self._of_all.worked()
        else:
            self._of_all.failed(outcome.wait)
        self._note(outcome)

    def _batch(self, batch: Batch) -> bool:
        """Pass one batch on; whether its launch may have another one."""
        patience = self._of_launch.get(batch.name.launch_id)
        if patience is not None and time.monotonic() < patience.until:
            return False
        outcome = self._put(batch)
        if outcome.answer is Answer.UNKNOWN and batch.name.launch_id in self._known:
            self._known.discard(batch.name.launch_id)
            outcome = self._put(batch)
        self._note(outcome)
        return self._settle(batch, outcome)

    def _put(self, batch: Batch) -> Outcome:
        launch_id = batch.name.launch_id
        launch = self._depot.launch(launch_id)
        if launch is None:
            return Outcome(Answer.REFUSED, "its launch was never announced")
        if launch_id not in self._known:
            outcome = self._upstream.announce(launch.body)
            if outcome.answer is not Answer.TAKEN:
                return outcome
            self._known.add(launch_id)
        body = self._depot.body(batch)
        return self._upstream.put_batch(launch.run, str(batch.name), batch.media_type, body)

    def _settle(self, batch: Batch, outcome: Outcome) -> bool:
        launch_id = batch.name.launch_id
        if outcome.answer is Answer.TAKEN:
            self._depot.sent(batch)
            self.forwarded += 1
        elif outcome.answer is Answer.REFUSED:
            self._depot.refuse(batch, outcome.reason)
            self.refused += 1
        elif outcome.answer is Answer.NOBODY:
            self._of_all.failed(outcome.wait)
            return False
        else:
            self._of_launch.setdefault(launch_id, _Patience()).failed(outcome.wait)
            return False
        self._of_all.worked()
        self._of_launch.pop(launch_id, None)
        return True

    def _note(self, outcome: Outcome) -> None:
        if outcome.answer is Answer.TAKEN:
            return
        self.failures += 1
        refused = outcome.answer is Answer.REFUSED
        self._say("was refused by the upstream" if refused else "has to wait", outcome.reason)

    def _say(self, what: str, reason: str) -> None:
        now = time.monotonic()
        if now - self._last_log >= _SECONDS_BETWEEN_LOGS:
            self._last_log = now
            _log.warning("foreshock collect: a batch or report %s (%s)", what, reason)
