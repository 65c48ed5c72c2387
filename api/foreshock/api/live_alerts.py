"""Keeps the alert log in step with the risks of live runs; a diagnosis never holds up the others.

A risk that starts an alert waits for its causes, and so do the later risks of the same attempt, so
that each attempt's alerts keep their order. Decides no threshold, delivers nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial

from foreshock.api.alert_log import Alert, AlertContent, AlertLog, AlertSubject
from foreshock.api.diagnosis import Cause
from foreshock.api.scoring import RunKey
from foreshock.monitor.record import Risk

__all__ = ["AlertFollower"]

logger = logging.getLogger(__name__)

Diagnose = Callable[[str, int, int], tuple[Cause, ...]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An attempt whose first risk here starts an alert once its causes are known."""

    subject: AlertSubject
    causes: Future[tuple[Cause, ...]]
    risks: deque[Risk] = field(default_factory=deque)


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

    def follow(self, subject: AlertSubject, risk: Risk) -> None:
        """Take in the next risk of an attempt."""
        key = (subject.run_id, subject.attempt)
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.risks.append(risk)
        elif self._log.fires(subject, risk):
            self._ask(subject, deque([risk]))
        else:
            self._tell(self._log.follow(subject, risk, partial(_content, risk, ())))

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

    def _ask(self, subject: AlertSubject, risks: deque[Risk]) -> None:
        step = risks[0].step
        causes = self._threads.submit(self._diagnose, subject.run_id, subject.attempt, step)
        self._waiting[subject.run_id, subject.attempt] = _Waiting(subject, causes, risks)

    def _advance(self, key: RunKey, waiting: _Waiting) -> None:
        del self._waiting[key]
        risks = waiting.risks
        explain = partial(_content, risks[0], self._causes(waiting))
        self._tell(self._log.follow(waiting.subject, risks.popleft(), explain))
        while risks:
            if self._log.fires(waiting.subject, risks[0]):
                self._ask(waiting.subject, risks)
                return
            self.follow(waiting.subject, risks.popleft())

    def _causes(self, waiting: _Waiting) -> tuple[Cause, ...]:
        try:
            return waiting.causes.result()
        except Exception:  # noqa: BLE001 an alert without its cause is worth more than none
            self._failed(f"diagnosis of run {waiting.subject.run} failed")
            return ()


def _content(risk: Risk, causes: tuple[Cause, ...]) -> AlertContent:
    return AlertContent(
        step=risk.step,
        probability=risk.probability,
        expected_lead=risk.expected_lead,
        causes=tuple(asdict(cause) for cause in causes),
        drivers=tuple(asdict(driver) for driver in risk.drivers),
        model_version=risk.model_version,
    )
