"""The guard at work: scores records beside the training, decides after each step, acts, and tells.

Scoring and diagnosis run in the monitor's worker thread; the training thread only looks whether an
answer is there. Whatever fails in here is counted, and training goes on.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from foreshock.monitor.containment import Containment
from foreshock.monitor.guard.actions import (
    Action,
    Advise,
    Forget,
    LimitRate,
    MarkGood,
    Rescale,
    RollBack,
    TakeSnapshot,
    UseBf16,
    UseFp8,
    quiet,
)
from foreshock.monitor.guard.agreement import Agreement
from foreshock.monitor.guard.controls import Controls
from foreshock.monitor.guard.decisions import decide
from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.guard.signals import measured_layers, misfit_layers
from foreshock.monitor.guard.state import Decision, GuardState, Seen
from foreshock.monitor.record import Risk, StepRecord, Suspect
from foreshock.monitor.sinks import StepRecordSink

__all__ = ["Diagnose", "Entry", "Guard", "Scorer"]

Scorer = Callable[[StepRecord], Risk | None]
"""Records of one run in, in order; the risk out, or None while there is none."""

Diagnose = Callable[[Sequence[StepRecord]], Suspect | None]
"""The latest records in, at an alarm; the likeliest cause out."""

EVENT: Final = "guard"
"""Kind of the events that tell what was done."""
_RECORDS: Final = 600
_DIAGNOSE_EVERY: Final = 8
_LOCK_SECONDS: Final = 0.05
_OWN: Final = "guard: "


class _Recorder(Protocol):
    def event(self, kind: str, detail: str | None = None) -> object:
        """As `Watch.event`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One decision, as it was carried out.

    Attributes:
        step: First step not yet taken when it was made.
        why: By which signal, and which cause was suspected.
        done: What was done.
        left_out: What was wanted and not done, each with the reason.
    """

    step: int
    why: str
    done: tuple[Action, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = "; ".join(str(action) for action in self.done) or "nothing done"
        left = f"; left out: {'; '.join(self.left_out)}" if self.left_out else ""
        return f"{done}{left}; because {self.why}"


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the worker thread found out about a record."""

    step: int
    loss: float | None
    risk: Risk
    suspect: Suspect | None
    update: float | None = None
    used: float | None = None
    misfits: tuple[str, ...] | None = None
    layers: int = 0


class Guard:
    """Acts on the risk of one run, by policy.

    In a job of several processes each makes one, and calls `step` alike; rank 0 has the records,
    decides, and all do the same.

    Args:
        scorer: Of this run's records; the forecaster's `LocalScorer`, or `ServiceScorer`. One with
            an attribute `state` (as LocalScorer) goes back with the run.
        controls: What the loop lets it do.
        policy: None takes the default.
        diagnose: Names the likeliest cause at an alarm; without it the guard goes by the learning
            rate alone, and otherwise takes every remedy in turn.
        patience: Seconds that `step` waits for the answer about the step before the last, at most.
            0 never waits; with more, runs repeat as long as the scorer keeps up.

    Attributes:
        entries: What was decided, oldest first; housekeeping left out.
        recorder: Where events go, if anywhere.
        containment: Counts failures of the guard.
    """

    def __init__(
        self,
        scorer: Scorer,
        controls: Controls,
        policy: GuardPolicy | None = None,
        *,
        diagnose: Diagnose | None = None,
        patience: float = 0.0,
    ) -> None:
        self.policy = policy or GuardPolicy()
        self.controls = controls
        self.entries: list[Entry] = []
        self.containment = Containment("guard")
        self._scoring = Containment("guard's scorer")
        self._scorer, self._diagnose, self._patience = scorer, diagnose, patience
        self._state = GuardState()
        self._records: deque[StepRecord] = deque(maxlen=_RECORDS)
        self._suspect: Suspect | None = None
        self._diagnosed = 0
        self._verdicts: deque[_Verdict] = deque()
        self._news = threading.Condition()
        self._scored = -1
        self._ignored_below = -1
        self._lock = threading.Lock()
        self._kept: dict[int, Any] = {}
        self.recorder: _Recorder | None = None
        self._agreement = Agreement.join()
        self.sink = StepRecordSink(self._take)
        """Give it to `watch(sinks=[guard.sink])`."""

    def attach(self, recorder: _Recorder) -> None:
        """Say where events go: the watch; a loop whose steps go back attaches a new one then."""
        self.recorder = recorder
        with self._news:
            self._ignored_below = -1
            self._scored = -1

    def begin(self, step: int = 0) -> bool:
        """Keep a snapshot from before the first step, to go back to while none is known-good.

        Call it in the training thread, in every process alike, before step `step` is taken: with
        the weights, the optimizer (whose states may be empty yet) and the data where they are then.
        Without it, trouble before the first known-good snapshot is met by milder remedies only.

        Returns:
            Whether every process has its snapshot; where one has not, none goes back to it.
        """
        held = False
        if "snapshots" in self.controls.offers and not self.policy.advise:
            with self.containment:
                self.controls.snapshot(step)
                self._keep_scorer(step)
                held = True
        if self._agreement.all(held):
            self._state = GuardState.begun(step)
            return True
        self.controls.forget(step)
        return False

    def step(self, next_step: int) -> RollBack | None:
        """Decide and act; call it after each optimizer step, in the training thread.

        Args:
            next_step: First step not yet taken, as the loop numbers them.

        Returns:
            The rollback that was carried out: a loop whose steps go back goes on at its `to`.
        """
        decided: tuple[tuple[tuple[Action, ...], str], ...] = ()
        if self._agreement.decides:
            with self.containment:
                decided = self._decided(next_step)
        decided = self._agreement.share(decided)
        back: RollBack | None = None
        for actions, why in decided:
            with self.containment:
                back = self._carry_out(actions, why, next_step) or back
        return back

    @property
    def errors(self) -> int:
        """Failures of the guard and of its scorer so far."""
        return self.containment.errors + self._scoring.errors

    @property
    def known_good(self) -> tuple[int, ...]:
        """Steps before which a known-good snapshot is held, oldest first."""
        return tuple(mark.step for mark in self._state.marks if mark.good)

    def close(self) -> None:
        """Let go of the loop."""
        closing = getattr(self.controls, "close", None)
        if closing is not None:
            closing()

    # In the monitor's worker thread.

    def _take(self, record: StepRecord) -> None:
        if record.step < self._ignored_below:
            return
        try:
            with self._lock:
                verdict = self._judged(_without_own(record))
        except Exception as error:  # noqa: BLE001 - a scorer may be anybody's code
            self._scoring.report(error)
            verdict = None
        with self._news:
            self._scored = record.step
            if verdict is not None:
                self._verdicts.append(verdict)
            self._news.notify_all()

    def _judged(self, record: StepRecord) -> _Verdict | None:
        self._records.append(record)
        risk = self._scorer(record)
        if risk is None:
            return None
        if risk.state != "firing":
            self._suspect, self._diagnosed = None, 0
        elif self._diagnose is not None:
            if self._diagnosed % _DIAGNOSE_EVERY == 0:
                self._suspect = self._diagnose(tuple(self._records))
            self._diagnosed += 1
        return _Verdict(
            record.step,
            record.scalars.get("loss"),
            risk,
            self._suspect,
            update=record.scalars.get("update_ratio"),
            used=record.scalars.get("learning_rate"),
            misfits=misfit_layers(self.policy, record),
            layers=measured_layers(record),
        )

    # In the training thread.

    def _decided(self, next_step: int) -> tuple[tuple[tuple[Action, ...], str], ...]:
        found: list[tuple[tuple[Action, ...], str]] = []
        for verdict in self._news_until(next_step - 2):
            seen = Seen(
                step=verdict.step,
                next_step=next_step,
                risk=verdict.risk,
                loss=verdict.loss,
                rate=self.controls.rate(),
                suspect=verdict.suspect,
                update=verdict.update,
                used=verdict.used,
                misfits=verdict.misfits,
                layers=verdict.layers,
            )
            decision: Decision = decide(self.policy, self._state, seen)
            self._state = decision.state
            if decision.actions:
                found.append((decision.actions, decision.why))
            if any(isinstance(action, RollBack) for action in decision.actions):
                break
        return tuple(found)

    def _news_until(self, step: int) -> list[_Verdict]:
        """Answers that came in; waits for the one about `step` as long as patience allows."""
        end = time.monotonic() + self._patience
        with self._news:
            while self._scored < step and (left := end - time.monotonic()) > 0:
                self._news.wait(left)
            news = list(self._verdicts)
            self._verdicts.clear()
        return news

    def _carry_out(self, actions: tuple[Action, ...], why: str, step: int) -> RollBack | None:
        done: list[Action] = []
        left_out: list[str] = []
        back = None
        for action in actions:
            reason = self._reason_not_to(action) or self._perform(action, step)
            if reason:
                left_out.append(f"{action} ({reason})")
            else:
                done.append(action)
                back = action if isinstance(action, RollBack) else back
        # Housekeeping is told only where it failed.
        if left_out and all(quiet(a) for a in actions) and self._already_told(left_out):
            return back
        told = tuple(action for action in done if not quiet(action))
        if told or left_out:
            self._tell(Entry(step=step, why=why, done=told, left_out=tuple(left_out)), back)
        return back

    def _already_told(self, left_out: list[str]) -> bool:
        reasons = {text.rpartition("(")[2] for entry in self.entries for text in entry.left_out}
        return all(text.rpartition("(")[2] in reasons for text in left_out)

    def _reason_not_to(self, action: Action) -> str:
        if isinstance(action, MarkGood | Advise):
            return ""
        if self.policy.advise:
            return "advice only"
        wanted = _NEEDS[type(action)]
        return "" if wanted in self.controls.offers else f"this loop offers no {wanted}"

    def _perform(self, action: Action, until: int) -> str:
        """Carry out one action; why not, if it could not be."""
        controls, found = self.controls, 1
        match action:
            case TakeSnapshot(step):
                controls.snapshot(step)
                self._keep_scorer(step)
            case Forget(steps):
                for step in steps:
                    controls.forget(step)
                    self._kept.pop(step, None)
            case LimitRate(ceiling):
                controls.limit_rate(ceiling)
            case Rescale(layers, margin, history):
                found = controls.rescale(layers, margin, history)
            case UseBf16(layers):
                found = controls.use_bf16(layers)
            case UseFp8(layers):
                found = controls.use_fp8(layers)
            case RollBack(step, skip):
                self._roll_back(step, skip, until)
            case _:
                pass
        return "" if found else "no such layer can change its precision"

    def _roll_back(self, step: int, skip: int, until: int) -> None:
        self.controls.restore(step)
        with self._news:
            self._verdicts.clear()
            self._scored = until
            # Records still under way speak of what was thrown away.
            self._ignored_below = until
        self._return_scorer(step)
        if skip and "data" in self.controls.offers:
            self.controls.skip_data(skip)

    def _keep_scorer(self, step: int) -> None:
        if hasattr(self._scorer, "state") and self._lock.acquire(timeout=_LOCK_SECONDS):
            try:
                self._kept[step] = copy.deepcopy(self._scorer.state)
            finally:
                self._lock.release()

    def _return_scorer(self, step: int) -> None:
        kept = self._kept.get(step)
        if kept is not None and self._lock.acquire(timeout=_LOCK_SECONDS):
            try:
                self._scorer.state = copy.deepcopy(kept)  # type: ignore[attr-defined]
                earlier = [record for record in self._records if record.step < step]
                self._records.clear()
                self._records.extend(earlier)
                self._suspect, self._diagnosed = None, 0
            finally:
                self._lock.release()

    def _tell(self, entry: Entry, back: RollBack | None) -> None:
        self.entries.append(entry)
        if self.recorder is not None:
            self.recorder.event(EVENT, str(entry))
            if back is not None:
                self.recorder.event("rollback", f"{_OWN}{back}")


_NEEDS: Final[dict[type, str]] = {
    TakeSnapshot: "snapshots",
    Forget: "snapshots",
    RollBack: "snapshots",
    LimitRate: "rate",
    Rescale: "scales",
    UseBf16: "precision",
    UseFp8: "precision",
}


def _without_own(record: StepRecord) -> StepRecord:
    """Without the rollbacks of this guard, after which its scorer is where it should be already."""
    events = tuple(e for e in record.events if not (e.detail or "").startswith(_OWN))
    return record if len(events) == len(record.events) else replace(record, events=events)
