"""Keeps the alert log in step with the risks of live runs; a diagnosis never holds up the others.

A risk that starts an alert waits for its causes, and so do the later risks of the same attempt, so
that each attempt's alerts keep their order. Decides no threshold, delivers nothing.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial

import pyarrow as pa

from foreshock.api.alert_log import Alert, AlertContent, AlertLog, AlertSubject
from foreshock.api.alert_model import Stakes
from foreshock.api.diagnosis import Cause
from foreshock.api.live_run import RunAnalysis
from foreshock.api.scoring import RunKey
from foreshock.monitor.record import Risk

__all__ = ["AlertFollower", "Sighting", "lost_steps", "sightings"]

logger = logging.getLogger(__name__)

Diagnose = Callable[[str, int, int], tuple[Cause, ...]]


@dataclass(frozen=True, slots=True)
class Sighting:
    """A risk, and what alerts about it need to know besides.

    Attributes:
        risk: The answer for a step.
        lost: Whether the loss of that step is not finite.
        stakes: Time and machines.
    """

    risk: Risk
    lost: bool = False
    stakes: Stakes = field(default_factory=Stakes)

    def content(self, causes: tuple[Cause, ...]) -> AlertContent:
        """What an alert that begins here says."""
        risk = self.risk
        return AlertContent(
            step=risk.step,
            probability=risk.probability,
            band=risk.band,
            stakes=self.stakes,
            expected_lead=risk.expected_lead,
            causes=tuple(asdict(cause) for cause in causes),
            drivers=tuple(asdict(driver) for driver in risk.drivers),
            model_version=risk.model_version,
        )


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An attempt whose first risk here starts an alert once its causes are known."""

    subject: AlertSubject
    causes: Future[tuple[Cause, ...]]
    sightings: deque[Sighting] = field(default_factory=deque)


class AlertFollower:
    """Follows risks, one thread at a time.

    Args:
        log: The alerts.
        diagnose: Causes as of (run_id, attempt, step); may take seconds.
        tell: Called with the alerts that changed.
        failed: Called when a diagnosis failed; the alert goes out without causes.
    """

    def __init__(
        self,
        log: AlertLog,
        diagnose: Diagnose,
        tell: Callable[[Sequence[Alert]], None],
        failed: Callable[[str], None],
    ) -> None:
        self._log = log
        self._diagnose = diagnose
        self._tell = tell
        self._failed = failed
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="alert-diagnosis")
        self._waiting: dict[RunKey, _Waiting] = {}

    def waits(self, key: RunKey) -> bool:
        """Whether risks of this attempt are not in the log yet."""
        return key in self._waiting

    @property
    def busy(self) -> bool:
        """Whether any attempt waits."""
        return bool(self._waiting)

    def follow(self, subject: AlertSubject, seen: Sighting) -> None:
        """Take in the next risk of an attempt."""
        key = (subject.run_id, subject.attempt)
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.sightings.append(seen)
        elif self._log.fires(subject, seen.risk, lost=seen.lost):
            self._ask(subject, deque([seen]))
        else:
            self._log_it(subject, seen, ())

    def _log_it(self, subject: AlertSubject, seen: Sighting, causes: tuple[Cause, ...]) -> None:
        explain = partial(seen.content, causes)
        self._tell(self._log.follow(subject, seen.risk, explain, lost=seen.lost))

    def forget(self, run_id: str) -> None:
        """A run is gone: what waits of it is not logged."""
        for key in [key for key in self._waiting if key[0] == run_id]:
            del self._waiting[key]

    def work(self) -> None:
        """Log what has its causes now."""
        for key, waiting in list(self._waiting.items()):
            if waiting.causes.done():
                self._advance(key, waiting)

    def finish(self, seconds: float) -> None:
        """Wait for the diagnoses that run, but not for ever."""
        while self._waiting:
            done, _ = wait([w.causes for w in self._waiting.values()], timeout=seconds)
            if not done:
                return
            self.work()

    def close(self) -> None:
        """End the thread; what waits is scored again after a restart."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, subject: AlertSubject, sightings: deque[Sighting]) -> None:
        step = sightings[0].risk.step
        causes = self._threads.submit(self._diagnose, subject.run_id, subject.attempt, step)
        self._waiting[subject.run_id, subject.attempt] = _Waiting(subject, causes, sightings)

    def _advance(self, key: RunKey, waiting: _Waiting) -> None:
        del self._waiting[key]
        sightings = waiting.sightings
        self._log_it(waiting.subject, sightings.popleft(), self._causes(waiting))
        while sightings:
            seen = sightings[0]
            if self._log.fires(waiting.subject, seen.risk, lost=seen.lost):
                self._ask(waiting.subject, sightings)
                return
            self.follow(waiting.subject, sightings.popleft())

    def _causes(self, waiting: _Waiting) -> tuple[Cause, ...]:
        try:
            return waiting.causes.result()
        except Exception:  # noqa: BLE001 an alert without its cause is worth more than none
            self._failed(f"diagnosis of run {waiting.subject.run} failed")
            return ()


def sightings(run: RunAnalysis, table: pa.Table, risks: Sequence[Risk]) -> list[Sighting]:
    """What alerts are to see of some risks.

    Args:
        run: Whose they are; it has taken them in.
        table: The records that they answer.
        risks: In order.
    """
    detected = any(risk.state == "firing" and risk.kind == "detection" for risk in risks)
    lost = lost_steps(table) if detected else frozenset()
    stakes = run.stakes if any(risk.state == "firing" for risk in risks) else Stakes()
    return [Sighting(risk, risk.step in lost, stakes) for risk in risks]


def lost_steps(table: pa.Table) -> frozenset[int]:
    """Steps of a table of `SCHEMA` whose loss is NaN or infinite."""
    return frozenset(
        step
        for step, scalars in zip(
            table["step"].to_pylist(), table["scalars"].to_pylist(), strict=True
        )
        if not math.isfinite(dict(scalars or ()).get("loss", 0.0))
    )
