"""Rules of a guard that need no forecaster: scales that no longer fit, and steps that are too long.

Pure functions, as `decisions`, which asks them before it looks at the risk.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Final

from foreshock.monitor.guard.actions import Action, LimitRate, UseBf16
from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.guard.state import UPDATE_STEPS, Decision, GuardState, Mark, Seen

__all__ = ["LongSteps", "limited", "long_steps", "mended_scales", "tracked_signals"]

_RECENT: Final = 8
"""Steps whose mean length is the present one."""


def tracked_signals(state: GuardState, seen: Seen) -> GuardState:
    """Take in what a step says about scales and about its own length."""
    state = _tracked_scales(state, seen)
    length = seen.update
    if length is None or not math.isfinite(length):
        return state
    # The rate of the record: by now the schedule of a warm-up asks for a higher one.
    if state.per_rate is None and seen.used and length > 0:
        state = replace(state, per_rate=length / seen.used)
    return replace(state, updates=(*state.updates, length)[-UPDATE_STEPS:])


def _tracked_scales(state: GuardState, seen: Seen) -> GuardState:
    if seen.misfits is None:
        return state
    before = dict(state.misfits)
    counted = tuple((layer, before.get(layer, 0) + 1) for layer in seen.misfits)
    # What a scale spoils is no known-good state, however calm the loss.
    return replace(state, misfits=counted, calm=0 if counted else state.calm)


# Scales.


def mended_scales(policy: GuardPolicy, state: GuardState, seen: Seen) -> Decision | None:
    """Move layers whose scales have not fitted for some records to bfloat16; None: all fit."""
    if not policy.scale_records or not seen.misfits:
        return None
    if state.interventions >= policy.most_interventions:
        return None
    wrong = tuple(n for n, times in state.misfits if times >= policy.scale_records)
    new = tuple(n for n in wrong if n not in state.in_bf16 and "*" not in state.in_bf16)
    if not new:
        return None
    held = (*state.in_bf16, *new)
    if len(held) > policy.bf16_share * max(seen.layers, 1):
        new = held = ("*",)
    state = replace(
        state,
        in_bf16=held,
        bf16_until=state.clock + policy.bf16_hold * 2**state.bf16_times,
        bf16_times=state.bf16_times + 1,
        misfits=(),
        acted=state.clock,
        interventions=state.interventions + 1,
    )
    why = (
        f"the scales of {len(wrong)} of {seen.layers} layers have not fitted their tensors for"
        f" {policy.scale_records} records, first {wrong[0]}"
    )
    return Decision(state=state, actions=(UseBf16(new),), why=why)


# Length of the steps.


class LongSteps:
    """Steps are too long: what the learning rate must be, and why.

    Attributes:
        ceiling: Of the learning rate.
        back: Whether the weights are spoilt already, so that an earlier state is wanted.
        why: For a person.
    """

    def __init__(self, ceiling: float, why: str, *, back: bool = False) -> None:
        self.ceiling, self.why, self.back = ceiling, why, back


def long_steps(policy: GuardPolicy, state: GuardState, seen: Seen) -> LongSteps | None:
    """Whether steps are longer than the run's history and the schedule explain, or absurdly long.

    The length of a step is the update ratio of the record, the norm of what it changes over the
    norm of the weights.
    """
    if seen.rate is None or len(state.updates) < _RECENT or seen.rate <= 0:
        return None
    now = fmean(state.updates[-_RECENT:])
    return _absurd(policy, state, seen.rate, now) or _risen(policy, state, seen.rate, now)


def _absurd(policy: GuardPolicy, state: GuardState, rate: float, now: float) -> LongSteps | None:
    """The weights move by a few percent at every step: no warm-up of a run that learns does."""
    if not policy.update_most or len(state.updates) < UPDATE_STEPS:
        return None
    lasting = fmean(state.updates)
    if min(now, lasting) <= policy.update_most:
        return None
    used = rate if state.ceiling is None else min(rate, state.ceiling)
    if state.ceiling is not None and state.ceiling_base is not None:
        ceiling = policy.rate_factor * min(state.ceiling, state.ceiling_base)
    elif state.per_rate:
        ceiling = policy.update_first / state.per_rate
    else:
        ceiling = used * policy.update_most / (2 * lasting)
    why = (
        f"steps have changed the weights by {lasting:.1%} each for {UPDATE_STEPS} steps,"
        f" at a learning rate of {used:.3g}"
    )
    return LongSteps(min(ceiling, policy.rate_factor * used), why, back=True)


def _risen(policy: GuardPolicy, state: GuardState, rate: float, now: float) -> LongSteps | None:
    """Longer than in the run's own good times by a clear factor, which the schedule explains not.

    In a first warm-up there is no such history. Afterwards a rate up to the highest of a plateau
    explains steps in its proportion.
    """
    if not policy.update_rise or state.ceiling is not None or state.usual is None:
        return None
    if state.since(state.released) < policy.incident:
        return None
    expected = [_expected(policy, state, m, rate) for m in state.marks if m.good]
    usual = max((e for e in expected if math.isfinite(e)), default=None)
    if usual is None or now <= policy.update_rise * usual:
        return None
    risen = rate > policy.rate_rise * state.usual
    why = f"steps are {now / usual:.2g} times as long as in the run's good times"
    if risen:
        return LongSteps(state.usual, f"{why}, at {rate / state.usual:.2g} times its usual rate")
    return LongSteps(rate * usual / now, why)


def _expected(policy: GuardPolicy, state: GuardState, mark: Mark, rate: float) -> float:
    """How long steps may be by what they were before a snapshot; NaN where it cannot say."""
    assert state.usual is not None
    highest = policy.rate_rise * max(state.usual, state.highest or 0.0)
    if not mark.rate or mark.rate > highest or math.isnan(mark.update):
        return math.nan
    explained = max(1.0, rate / mark.rate) if rate <= highest else 1.0
    return mark.update * explained


def limited(policy: GuardPolicy, state: GuardState, steps: LongSteps) -> tuple[GuardState, Action]:
    """Hold the learning rate."""
    state = replace(
        state,
        ceiling=steps.ceiling,
        ceiling_base=steps.ceiling,
        ceiling_until=state.clock + policy.rate_hold,
        released=None,
        acted=state.clock,
        updates=(),
        interventions=state.interventions + 1,
    )
    return state, LimitRate(steps.ceiling)
