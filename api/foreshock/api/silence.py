"""When a run counts as silent: by its own cadence, on the clock of whoever receives it.

A record's own time is the client's and may be anything; only differences of it are used. Pure
bookkeeping: raises no alert and reads no clock.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["Heard", "RunState", "SilenceChange", "SilenceSettings", "SilenceWatch"]

RunState = Literal["live", "stale", "finished"]

_REMEMBERED: Final = 16
_BACK_BATCHES: Final = 3
"""A run that was silent is back after so many batches: one alone may be a spool's last words."""
_UNKNOWN: Final = 10.0
"""While a run's cadence is not known, it may be silent for so many times the minimum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SilenceSettings:
    """How long a run may be silent.

    Attributes:
        factor: So many of its usual intervals,
        minimum: but at least so many seconds: a checkpoint or an evaluation takes its time.
    """

    factor: float = 10.0
    minimum: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A batch of a run, as far as silence is concerned; times in seconds since 1970.

    Attributes:
        received: When it came in, on the service's clock.
        first, last: Times of its first and last record, on the client's clock.
        records: How many it holds.
        attempt: Their attempt.
        step: Their highest step.
        ended: Whether the run said that it is over.
    """

    received: float
    first: float
    last: float
    records: int
    attempt: int
    step: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class SilenceChange:
    """A run that fell silent, or came back (or ended) after it had.

    Attributes:
        run_id: The run.
        attempt: Its newest attempt.
        step: Its newest step.
        silent: Whether it is silent now.
        seconds: For how long it has been.
        ended: Whether it ended properly meanwhile.
    """

    run_id: str
    attempt: int
    step: int
    silent: bool
    seconds: float
    ended: bool


@dataclass(slots=True)
class _Run:
    received: float
    attempt: int = 0
    step: int = -1
    last: float | None = None
    ended: bool = False
    alerted: bool = False
    back: int = 0
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    skews: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def hear(self, heard: Heard, *, live: bool) -> None:
        if self.last is not None:
            self.waits.append(heard.received - self.received)
            self.intervals.append(max(heard.last - self.last, 0.0))
        elif heard.records > 1:
            self.intervals.append(max(heard.last - heard.first, 0.0) / (heard.records - 1))
        self.skews.append(heard.received - heard.last)
        self.received, self.last = heard.received, heard.last
        self.attempt = max(self.attempt, heard.attempt)
        self.step = heard.step
        self.ended = heard.ended
        self.back += live

    def limit(self, settings: SilenceSettings) -> float:
        # A spool that is emptied delivers fast, a client that batches delivers rarely: whichever
        # is the longer is the cadence.
        known = [statistics.median(seen) for seen in (self.waits, self.intervals) if seen]
        if not known:
            return _UNKNOWN * settings.minimum
        return max(settings.factor * max(known), settings.minimum)


class SilenceWatch:
    """Watches runs; safe to use from several threads.

    Args:
        settings: How long a run may be silent.
    """

    def __init__(self, settings: SilenceSettings | None = None) -> None:
        self._settings = settings or SilenceSettings()
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()

    def recall(self, run_id: str, batches: list[Heard], *, now: float, alerted: bool) -> None:
        """Watch a run that was heard of before this process began.

        Args:
            run_id: The run.
            batches: Its newest ones, oldest first.
            now: The silence before this moment was perhaps the service's own, and does not count.
            alerted: Whether its silence is known to people.
        """
        run = _Run(received=now)
        for batch in batches:
            run.hear(batch, live=False)
        run.received = now
        run.alerted = alerted
        with self._lock:
            self._runs.setdefault(run_id, run)

    def heard(self, run_id: str, heard: Heard) -> None:
        """A batch of a run came in."""
        with self._lock:
            run = self._runs.setdefault(run_id, _Run(received=heard.received))
            run.hear(heard, live=True)

    def ended(self, run_id: str) -> None:
        """Somebody says that a run is over."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is not None:
                run.ended = True

    def forget(self, run_id: str) -> None:
        """Watch a run no longer."""
        with self._lock:
            self._runs.pop(run_id, None)

    def state(self, run_id: str, now: float) -> RunState | None:
        """What a run is doing; None if it is not watched."""
        with self._lock:
            run = self._runs.get(run_id)
            if run is None:
                return None
            if run.ended:
                return "finished"
            return "stale" if now - run.received > run.limit(self._settings) else "live"

    def states(self, now: float) -> dict[str, RunState]:
        """What every watched run is doing."""
        with self._lock:
            run_ids = list(self._runs)
        found = {run_id: self.state(run_id, now) for run_id in run_ids}
        return {run_id: state for run_id, state in found.items() if state is not None}

    def skew(self, run_id: str) -> float | None:
        """Seconds that a run's clock seems to be behind the service's; negative: ahead.

        The smallest of the recent batches: what came late looks like a clock that is behind.
        """
        with self._lock:
            run = self._runs.get(run_id)
            return min(run.skews) if run is not None and run.skews else None

    def received(self, run_id: str) -> float | None:
        """When a run was heard of last (or this process began), seconds since 1970."""
        with self._lock:
            run = self._runs.get(run_id)
            return None if run is None else run.received

    def sweep(self, now: float, forget_after: float) -> list[SilenceChange]:
        """Which runs fell silent or came back since the last call.

        Args:
            now: Seconds since 1970.
            forget_after: Runs that were silent for longer are watched no longer.
        """
        with self._lock:
            changes = list(self._changes(now))
            gone = [k for k, run in self._runs.items() if now - run.received > forget_after]
            for run_id in gone:
                del self._runs[run_id]
        return changes

    def _changes(self, now: float) -> Iterator[SilenceChange]:
        for run_id, run in self._runs.items():
            seconds = now - run.received
            silent = not run.ended and seconds > run.limit(self._settings)
            back = run.ended or (not silent and run.back >= _BACK_BATCHES)
            if silent:
                run.back = 0
            if silent != run.alerted and (silent or back):
                run.alerted = silent
                yield SilenceChange(run_id, run.attempt, run.step, silent, seconds, run.ended)
