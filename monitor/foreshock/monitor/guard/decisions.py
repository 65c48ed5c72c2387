"""From what is seen of a step to what is done about it: pure functions, no torch, no clock.

Durations count observations (`GuardState.clock`), since step numbers go back.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

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
)
from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.guard.rules import limited, long_steps, mended_scales, tracked_signals
from foreshock.monitor.guard.state import LEVEL_STEPS, Decision, GuardState, Mark, Seen

__all__ = ["decide"]

_AGAIN = 3
"""Observations after a rollback that may still speak of the steps that were thrown away."""


def decide(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision:
    """Take in one observation."""
    state = tracked_signals(_tracked(state, seen), seen)
    # What these rules see is cured by its remedy: before any rollback, and before a forecast.
    if (mended := mended_scales(policy, state, seen)) is not None:
        return mended
    if (shortened := _shortened(policy, state, seen)) is not None:
        return shortened
    risk = seen.risk
    if risk.state == "firing" and risk.kind == "detection":
        return _rescue(policy, state, seen)
    if risk.state == "firing":
        return _soften(policy, state, seen)
    if risk.state == "pending":
        return _held(policy, state, seen)
    return _calm(policy, state, seen)


def _tracked(state: GuardState, seen: Seen) -> GuardState:
    calm = state.calm + 1 if seen.risk.state in ("ok", "resolved") else 0
    losses = state.losses
    if seen.loss is not None and math.isfinite(seen.loss):
        losses = (*losses, seen.loss)[-LEVEL_STEPS:]
    state = replace(state, clock=state.clock + 1, calm=calm, losses=losses)
    return replace(state, best=min(state.best, state.level)) if calm else state


# Calm: keep snapshots, find out which were good, and undo what was done for a time.


def _calm(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision:
    state, good = _promoted(policy, state)
    state, taken = _snapshot(policy, state, seen)
    if _surged(policy, state, seen):
        return _tamed(policy, state, seen, (*good, *taken))
    state, undone = _returned(policy, state, seen)
    return Decision(state=state, actions=(*good, *taken, *undone), why="the risk stayed low")


def _surged(policy: GuardPolicy, state: GuardState, seen: Seen) -> bool:
    """The schedule asks for far more than usual, and nobody limited it yet."""
    if state.usual is None or seen.rate is None or state.ceiling is not None:
        return False
    surge = policy.rate_surge
    return bool(surge) and seen.rate > surge * state.usual


def _tamed(
    policy: GuardPolicy, state: GuardState, seen: Seen, before: tuple[Action, ...]
) -> Decision:
    if state.interventions >= policy.most_interventions:
        return Decision(state=state, actions=before)
    assert state.usual is not None
    assert seen.rate is not None
    why = (
        f"the schedule asks for a learning rate of {seen.rate:.3g}, {seen.rate / state.usual:.3g}"
        f" times its usual {state.usual:.3g}; the risk is still low"
    )
    state = replace(
        state,
        ceiling=state.usual,
        ceiling_base=state.usual,
        ceiling_until=state.clock + policy.rate_hold,
        acted=state.clock,
        interventions=state.interventions + 1,
    )
    return Decision(state=state, actions=(*before, LimitRate(state.usual)), why=why)


def _held(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision:
    """The risk rises: one snapshot more, from which nothing is lost if it was nothing."""
    if state.marks and state.clock - state.marks[-1].at < policy.cooldown:
        return Decision(state=state)
    state, taken = _marked(policy, state, seen)
    if _surged(policy, state, seen):
        return _tamed(policy, state, seen, taken)
    return Decision(state=state, actions=taken, why=f"the risk rises: {_signals(seen)}")


def _promoted(policy: GuardPolicy, state: GuardState) -> tuple[GuardState, tuple[Action, ...]]:
    marks, told = [], []
    for mark in state.marks:
        due = not mark.good and state.clock - mark.at >= policy.good_after
        if due and state.calm >= policy.good_after and _undrifted(policy, mark):
            told.append(MarkGood(mark.step))
            mark = replace(mark, good=True)
        marks.append(mark)
    return replace(state, marks=tuple(marks)), tuple(told)


def _undrifted(policy: GuardPolicy, mark: Mark) -> bool:
    # Before there was a level there was nothing to lose.
    return math.isinf(mark.level) or mark.level <= mark.allowed + policy.good_loss_rise


def _snapshot(
    policy: GuardPolicy, state: GuardState, seen: Seen
) -> tuple[GuardState, tuple[Action, ...]]:
    if state.marks and state.clock - state.marks[-1].at < policy.snapshot_every:
        return state, ()
    return _marked(policy, state, seen)


def _marked(
    policy: GuardPolicy, state: GuardState, seen: Seen
) -> tuple[GuardState, tuple[Action, ...]]:
    usual = _usual_rate(policy, state, seen)
    highest = max(filter(None, (usual, state.highest)), default=None)
    state = replace(state, usual=usual, highest=highest)
    mark = Mark(
        seen.next_step,
        state.clock,
        seen.rate,
        state.level,
        state.best + state.noise,
        # Steps that a limit keeps short say nothing about what is usual.
        update=fmean(state.updates) if state.updates and state.ceiling is None else math.nan,
    )
    marks = tuple(m for m in state.marks if m.step != mark.step)
    # What should have become known-good long ago and has not keeps no place.
    failed = [m for m in marks if not m.good and state.clock - m.at > 2 * policy.good_after]
    if len(marks) >= policy.keep_snapshots and failed:
        marks = tuple(m for m in marks if m is not failed[0])
        kept: tuple[Mark, ...] = (*marks, mark)
        dropped: tuple[int, ...] = (failed[0].step,)
    else:
        kept, dropped = _thinned((*marks, mark), policy.keep_snapshots, _before_rise(policy, state))
    actions: tuple[Action, ...] = (TakeSnapshot(mark.step),)
    if dropped:
        actions = (Forget(dropped), *actions)
    return replace(state, marks=kept), actions


def _usual_rate(policy: GuardPolicy, state: GuardState, seen: Seen) -> float | None:
    """The rate before it began to rise, as a plateau or a decay shows it."""
    last = state.marks[-1].rate if state.marks else None
    if not last or seen.rate is None:
        return state.usual
    level = seen.rate <= policy.rate_rise**0.5 * last
    # A plateau above the usual rate is a rise that has ended, unless nothing happened for long.
    risen = state.usual is not None and seen.rate > policy.rate_rise * state.usual
    return seen.rate if level and not risen else state.usual


def _before_rise(policy: GuardPolicy, state: GuardState) -> int | None:
    """Step of the newest known-good snapshot from before the rate rose."""
    usual = state.usual
    if usual is None:
        return None
    level = [m.step for m in state.marks if m.good and (m.rate or 0) <= policy.rate_rise * usual]
    return level[-1] if level else None


def _thinned(
    marks: tuple[Mark, ...], keep: int, needed: int | None
) -> tuple[tuple[Mark, ...], tuple[int, ...]]:
    """Drop the ones that are closest to their neighbours for their age; the newest two stay."""
    left, dropped = list(marks), []
    while len(left) > keep:
        now = left[-1].at
        free = [i for i in range(1, len(left) - 2) if left[i].step != needed]
        index = min(
            free,
            key=lambda i: (left[i + 1].at - left[i - 1].at) / (now - left[i].at + 1),
            default=0,
        )
        dropped.append(left.pop(index).step)
    return tuple(left), tuple(dropped)


def _returned(
    policy: GuardPolicy, state: GuardState, seen: Seen
) -> tuple[GuardState, tuple[Action, ...]]:
    actions: list[Action] = []
    if state.ceiling is not None and state.clock >= state.ceiling_until:
        limit = state.ceiling * policy.rate_return
        if seen.rate is not None and limit >= seen.rate:
            state = replace(state, ceiling=None, released=state.clock)
            actions.append(LimitRate(None))
        else:
            began = state.ceiling == state.ceiling_base
            state = replace(state, ceiling=limit)
            actions.append(LimitRate(limit, told=began))
    if state.in_bf16 and state.clock >= state.bf16_until:
        actions.append(UseFp8(state.in_bf16))
        state = replace(state, in_bf16=(), acted=state.clock)
    return state, tuple(actions)


# Steps that are too long.


def _shortened(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision | None:
    steps = long_steps(policy, state, seen)
    if steps is None or state.interventions >= policy.most_interventions:
        return None
    actions: tuple[Action, ...] = ()
    target = _before_long_steps(policy, state, seen) if steps.back else None
    if target is not None:
        marks, state = state.marks, _gone_back(state, seen, target)
        actions = _way_back(state, marks, target, 0)
    state, limit = limited(policy, state, steps)
    return Decision(state=state, actions=(*actions, limit), why=steps.why)


def _before_long_steps(policy: GuardPolicy, state: GuardState, seen: Seen) -> Mark | None:
    if not policy.roll_back or state.rollbacks >= policy.most_rollbacks:
        return None
    short = [m for m in state.marks if m.good and not m.update > policy.update_most / 2]
    return _affordable(policy, state, seen, short[-1:])


# A firing forecast: the loss has not risen yet.


def _soften(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision:
    if not policy.act_on_forecast:
        return _held(policy, state, seen)
    if state.since(state.acted) < policy.cooldown:
        return Decision(state=state)
    if state.interventions >= policy.most_interventions:
        return _exhausted(state, "the limit of interventions is reached")
    why = f"forecast: {_signals(seen)}; {_suspected(seen)}"
    before = state
    state, actions = _mild_remedy(policy, state, seen)
    if not actions:
        return Decision(state=before)
    state = replace(state, acted=state.clock, interventions=state.interventions + 1)
    return Decision(state=state, actions=actions, why=why)


def _mild_remedy(
    policy: GuardPolicy, state: GuardState, seen: Seen
) -> tuple[GuardState, tuple[Action, ...]]:
    good = next((m for m in reversed(state.marks) if m.good), None)
    cause = seen.suspect.name if seen.suspect else "unknown"
    if _rose(policy, state, good, seen) or cause in ("learning_rate", "unknown", "optimizer_state"):
        return _limited(policy, state, good, seen)
    if cause in ("scale", "outlier", "underflow"):
        return _precise(policy, state, seen, mild=True)
    return state, ()


def _rose(policy: GuardPolicy, state: GuardState, good: Mark | None, seen: Seen) -> bool:
    rates = [m.rate for m in state.marks if m.good and m.rate]
    usual = state.usual
    before = min(
        [*([good.rate] if good and good.rate else rates[-1:]), *([usual] if usual else [])],
        default=None,
    )
    return before is not None and seen.rate is not None and seen.rate > policy.rate_rise * before


def _limited(
    policy: GuardPolicy, state: GuardState, good: Mark | None, seen: Seen, *, harder: bool = False
) -> tuple[GuardState, tuple[Action, ...]]:
    """Lower the learning rate: to the known-good one where it rose since, else to a share."""
    if seen.rate is None or seen.rate <= 0:
        return state, ()
    there = good.rate if good is not None and good.rate else seen.rate
    risen = _rose(policy, state, good, seen)
    usual = state.usual
    if risen and usual is not None:
        there = min(there, usual)
    wanted = there if risen and not harder else policy.rate_factor * there
    relapse = state.ceiling is not None or state.since(state.released) < policy.incident
    if relapse and state.ceiling_base is not None:
        # What was tried already is not tried again as it was.
        again = state.ceiling == state.ceiling_base or harder
        factor = policy.rate_factor ** max(state.attempts - 1, 1) if again else 1.0
        wanted = min(wanted, factor * state.ceiling_base)
    until = math.inf if relapse else state.clock + (policy.rate_hold if risen else policy.rate_rest)
    state = replace(state, ceiling=wanted, ceiling_base=wanted, ceiling_until=until, released=None)
    return state, (LimitRate(wanted),)


def _precise(
    policy: GuardPolicy, state: GuardState, seen: Seen, *, mild: bool
) -> tuple[GuardState, tuple[Action, ...]]:
    """More margin first where there is time, then bfloat16: for the suspected layers, or all."""
    suspect = seen.suspect
    few = suspect is not None and suspect.layers and suspect.share <= policy.bf16_share
    layers = suspect.layers if suspect is not None and few else ("*",)
    if mild and not state.rescaled:
        return replace(state, rescaled=True), (Rescale(layers, policy.margin, policy.history),)
    new = tuple(layer for layer in layers if layer not in state.in_bf16)
    if not new or "*" in state.in_bf16:
        return state, ()
    held = ("*",) if "*" in new else (*state.in_bf16, *new)
    state = replace(
        state,
        in_bf16=held,
        bf16_until=state.clock + policy.bf16_hold * 2**state.bf16_times,
        bf16_times=state.bf16_times + 1,
    )
    return state, (UseBf16(new),)


# A detection: the loss itself has risen, or is not finite.


def _rescue(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision:
    if state.since(state.rolled) < _AGAIN:
        return Decision(state=state)
    used_up = state.interventions >= policy.most_interventions
    if used_up or state.rollbacks >= policy.most_rollbacks:
        return _exhausted(state, "the limit of rollbacks is reached")
    again = state.since(state.rolled) < policy.incident
    state = replace(state, attempts=state.attempts + 1 if again else 1)
    target = _target(policy, state, seen, again=again) if policy.roll_back else None
    why = f"detection: {_signals(seen)}; {_suspected(seen)}"
    if target is None:
        return _without_rollback(policy, state, seen, why)
    marks = state.marks
    state = _gone_back(state, seen, target)
    state = replace(state, interventions=state.interventions + 1)
    state, remedies, skip = _remedies(policy, state, seen, target)
    remedies = tuple(a for a in remedies if not isinstance(a, UseBf16))
    stretch = max(seen.next_step - target.step, 1) + policy.skip_extra * state.attempts
    back = _way_back(state, marks, target, stretch if skip else 0)
    return Decision(state=state, actions=(*back, *remedies), why=why)


def _gone_back(state: GuardState, seen: Seen, target: Mark) -> GuardState:
    return replace(
        state,
        marks=tuple(
            replace(m, at=min(m.at, state.clock)) for m in state.marks if m.step <= target.step
        ),
        losses=(),
        updates=(),
        misfits=(),
        rolled=state.clock,
        acted=state.clock,
        target=target.step,
        rollbacks=state.rollbacks + 1,
        wasted=state.wasted + max(seen.next_step - target.step, 0),
        rescaled=False,
        calm=0,
    )


def _way_back(
    state: GuardState, marks: tuple[Mark, ...], target: Mark, skip: int
) -> tuple[Action, ...]:
    """To a snapshot, in the precision of now: a snapshot holds that of its time."""
    actions: tuple[Action, ...] = (RollBack(target.step, skip),)
    if state.in_bf16:
        actions = (*actions, UseBf16(state.in_bf16))
    later = tuple(m.step for m in marks if m.step > target.step)
    return (*actions, Forget(later)) if later else actions


def _target(policy: GuardPolicy, state: GuardState, seen: Seen, *, again: bool) -> Mark | None:
    good = [m for m in state.marks if m.good and _affordable(policy, state, seen, [m])]
    if not good:
        return None
    if again and state.target is not None:
        older = [m for m in good if m.step < state.target]
        return older[-1] if older else good[0]
    usual = state.usual
    if usual is not None and _rose(policy, state, good[-1], seen):
        # A slow rise may have begun before the newest one.
        return next(
            (m for m in reversed(good) if (m.rate or 0) <= policy.rate_rise * usual), good[-1]
        )
    return good[-1]


def _affordable(
    policy: GuardPolicy, state: GuardState, seen: Seen, marks: list[Mark]
) -> Mark | None:
    """The last of them, if going back to it throws away no more steps than are left to waste."""
    left = policy.most_wasted - state.wasted
    return marks[-1] if marks and seen.next_step - marks[-1].step <= left else None


def _remedies(
    policy: GuardPolicy, state: GuardState, seen: Seen, target: Mark
) -> tuple[GuardState, tuple[Action, ...], bool]:
    """What changes after the rollback, so that it does not happen again; whether to skip data."""
    cause = seen.suspect.name if seen.suspect else "unknown"
    # Bad data may go on for longer than what was skipped: once more before the rest is tried.
    last_resort = state.attempts > (2 if cause == "bad_data" else 1)
    actions: tuple[Action, ...] = ()
    rate_risen = _rose(policy, state, target, seen)
    if rate_risen or last_resort or cause in ("learning_rate", "unknown", "optimizer_state"):
        state, limited = _limited(policy, state, target, seen, harder=state.attempts > 1)
        actions += limited
    if last_resort or cause in ("scale", "outlier", "underflow"):
        wide = replace(seen, suspect=None) if last_resort else seen
        state, precise = _precise(policy, state, wide, mild=False)
        actions += precise
    skip = last_resort or (cause in ("bad_data", "unknown") and not rate_risen)
    return state, actions, skip


def _without_rollback(policy: GuardPolicy, state: GuardState, seen: Seen, why: str) -> Decision:
    if state.since(state.acted) < policy.cooldown:
        return Decision(state=state)
    state, actions = _mild_remedy(policy, state, seen)
    state = replace(state, acted=state.clock, interventions=state.interventions + 1)
    nothing = Advise("no snapshot that may be gone back to is known-good")
    return Decision(state=state, actions=(*actions, nothing), why=why)


def _exhausted(state: GuardState, text: str) -> Decision:
    if state.exhausted:
        return Decision(state=state)
    advice = Advise(f"{text}: from here on the guard only watches")
    return Decision(state=replace(state, exhausted=True), actions=(advice,), why=text)


def _signals(seen: Seen) -> str:
    """Which signals raised the risk, for a person."""
    risk = seen.risk
    if risk.kind == "detection":
        loss = "not measured" if seen.loss is None else f"{seen.loss:.4g}"
        return f"the loss has left its usual level ({loss} at step {seen.step})"
    likely = risk.probability.get(100)
    text = "" if likely is None else f"P(onset within 100 steps) {likely:.2g}"
    names = [d.signal + (f" of {d.layer}" if d.layer else "") for d in risk.drivers[:3]]
    return "; ".join(
        part for part in (text, "driven by " + ", ".join(names) if names else "") if part
    )


def _suspected(seen: Seen) -> str:
    if seen.suspect is None:
        return "no diagnosis"
    where = f" in {', '.join(seen.suspect.layers[:3])}" if seen.suspect.layers else ""
    return f"likeliest cause {seen.suspect.name} ({seen.suspect.probability:.0%}){where}"
