"""What a guard decides: the pure core, step by step, without a model."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from foreshock.monitor.guard.decisions import decide
from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.guard.signals import misfit_layers
from foreshock.monitor.guard.state import GuardState, Seen
from foreshock.monitor.record import Risk, StepRecord, Suspect, TensorIdentity, TensorStatistics

POLICY = GuardPolicy(snapshot_every=10, good_after=10, rate_hold=40, cooldown=5)


def risk(step: int, state: str = "ok", kind: str | None = None) -> Risk:
    return Risk(step=step, probability={10: 0.1, 100: 0.4, 1000: None}, state=state, kind=kind)  # type: ignore[arg-type]


class Story:
    """Feeds steps to `decide` and keeps what it wanted."""

    def __init__(self, policy: GuardPolicy = POLICY) -> None:
        self.policy, self.state, self.step = policy, GuardState(), 0
        self.actions: list[Action] = []

    def go(
        self,
        steps: int = 1,
        *,
        state: str = "ok",
        kind: str | None = None,
        rate: float = 1e-3,
        loss: float = 2.0,
        suspect: Suspect | None = None,
        update: float | None = None,
        misfits: tuple[str, ...] | None = None,
    ) -> list[Action]:
        new: list[Action] = []
        for _ in range(steps):
            seen = Seen(
                step=self.step,
                next_step=self.step + 1,
                risk=risk(self.step, state, kind),
                loss=loss,
                rate=rate,
                suspect=suspect,
                update=update,
                used=rate,
                misfits=misfits,
                layers=10,
            )
            decision = decide(self.policy, self.state, seen)
            self.state = decision.state
            new += decision.actions
            back = [a for a in decision.actions if isinstance(a, RollBack)]
            self.step = back[0].to if back else self.step + 1
        self.actions += new
        return new


def of(kind: type, actions: list[Action]) -> list[Action]:
    return [a for a in actions if isinstance(a, kind)]


def test_snapshots_become_known_good_only_after_a_calm_stretch() -> None:
    story = Story()
    story.go(9)
    assert of(MarkGood, story.actions) == []
    story.go(40)
    assert [a.step for a in of(MarkGood, story.actions)][:3] == [1, 11, 21]  # type: ignore[union-attr]
    held = {m.step for m in story.state.marks}
    taken = {a.step for a in of(TakeSnapshot, story.actions)}  # type: ignore[union-attr]
    dropped = {s for a in of(Forget, story.actions) for s in a.steps}  # type: ignore[union-attr]
    assert held == taken - dropped
    assert len(held) <= POLICY.keep_snapshots


def test_a_snapshot_taken_in_a_slow_drift_is_not_known_good() -> None:
    story = Story()
    story.go(60, loss=2.0)
    for number in range(60):
        story.go(loss=2.0 + 0.01 * number)
    good = [m for m in story.state.marks if m.good]
    levels = [m.level for m in good if math.isfinite(m.level)]
    assert levels
    assert max(levels) <= 2.0 + POLICY.good_loss_rise


def test_a_detection_rolls_back_to_before_the_alarm_and_drops_what_is_later() -> None:
    story = Story()
    story.go(55)
    before = story.step
    actions = story.go(state="firing", kind="detection", loss=9.0)
    back = of(RollBack, actions)[0]
    assert isinstance(back, RollBack)
    assert back.to <= before - POLICY.good_after
    assert back.skip >= before - back.to  # no diagnosis: the data may be at fault
    assert all(m.step <= back.to for m in story.state.marks)


def test_a_known_cause_gets_its_own_remedy_and_no_other() -> None:
    bad_data, scale = Suspect(name="bad_data"), Suspect(name="scale", layers=("a", "b"), share=0.2)
    story = Story()
    story.go(55)
    actions = story.go(state="firing", kind="detection", suspect=bad_data)
    assert of(LimitRate, actions) == of(UseBf16, actions) == []
    assert of(RollBack, actions)[0].skip > 0  # type: ignore[union-attr]
    story = Story()
    story.go(55)
    actions = story.go(state="firing", kind="detection", suspect=scale)
    assert of(UseBf16, actions) == [UseBf16(("a", "b"))]
    assert of(RollBack, actions)[0].skip == 0  # type: ignore[union-attr]
    assert of(LimitRate, actions) == []


def test_a_rate_that_ran_away_goes_back_to_its_plateau_on_a_forecast() -> None:
    story = Story()
    story.go(60, rate=1e-3)
    for number in range(25):
        story.go(rate=1e-3 * 1.05**number)
    actions = story.go(state="firing", kind="forecast", rate=5e-3)
    assert of(RollBack, actions) == []
    assert of(LimitRate, actions) == [LimitRate(1e-3)]


def test_a_forecast_without_a_risen_rate_lowers_it_for_a_time_and_returns() -> None:
    story = Story(replace(POLICY, rate_rest=30, rate_return=1.1))
    story.go(60)
    assert of(LimitRate, story.go(state="firing", kind="forecast")) == [LimitRate(5e-4)]
    limits = of(LimitRate, story.go(60))
    ceilings = [a.ceiling for a in limits]  # type: ignore[union-attr]
    assert ceilings[-1] is None
    rising = [c for c in ceilings[:-1] if c is not None]
    assert rising == sorted(rising)
    assert rising[0] == pytest.approx(5.5e-4)


def test_trouble_that_comes_back_goes_to_an_older_snapshot_with_every_remedy() -> None:
    story = Story()
    story.go(80)
    scale = Suspect(name="scale", layers=("a",), share=0.1)
    first = of(RollBack, story.go(state="firing", kind="detection", suspect=scale))[0]
    story.go(5)
    second = story.go(state="firing", kind="detection", suspect=scale)
    assert of(RollBack, second)[0].to < first.to  # type: ignore[union-attr]
    assert of(RollBack, second)[0].skip > 0  # type: ignore[union-attr]
    assert of(UseBf16, second) == [UseBf16(("*",))]
    assert of(LimitRate, second)


def test_scales_get_margin_first_then_bf16_and_fp8_again() -> None:
    scale = Suspect(name="scale", layers=("a",), share=0.1)
    story = Story(replace(POLICY, bf16_hold=20))
    story.go(40)
    assert of(Rescale, story.go(state="firing", kind="forecast", suspect=scale))
    later = story.go(8, state="firing", kind="forecast", suspect=scale)
    assert of(UseBf16, later) == [UseBf16(("a",))]
    assert of(UseFp8, story.go(40)) == [UseFp8(("a",))]


def test_limits_end_in_advice_said_once() -> None:
    story = Story(replace(POLICY, most_rollbacks=2, incident=0))
    story.go(40)
    for _ in range(30):
        story.go(state="firing", kind="detection")
        story.go(3)
    assert len(of(RollBack, story.actions)) == 2
    assert len(of(Advise, story.actions)) == 1


def test_nothing_known_good_is_said_and_nothing_is_rolled_back() -> None:
    story = Story()
    actions = story.go(state="firing", kind="detection")
    assert of(RollBack, actions) == []
    assert "known-good" in str(of(Advise, actions)[0])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    ("ok", None),
                    ("pending", "forecast"),
                    ("firing", "forecast"),
                    ("firing", "detection"),
                    ("resolved", None),
                ]
            ),
            st.integers(1, 15),
            st.floats(0, 20) | st.just(float("nan")),
            st.floats(1e-6, 1.0),
            st.sampled_from([None, "scale", "bad_data", "learning_rate", "unknown"]),
        ),
        max_size=25,
    )
)
def test_it_rolls_back_only_to_snapshots_that_are_held_and_known_good(
    chapters: list[tuple[tuple[str, str | None], int, float, float, str | None]],
) -> None:
    story = Story()
    held: set[int] = set()
    for (state, kind), steps, loss, rate, cause in chapters:
        suspect = None if cause is None else Suspect(name=cause)
        for _ in range(steps):
            before = {m.step for m in story.state.marks if m.good}
            at = story.step
            for action in story.go(state=state, kind=kind, loss=loss, rate=rate, suspect=suspect):
                if isinstance(action, TakeSnapshot):
                    held.add(action.step)
                elif isinstance(action, Forget):
                    held -= set(action.steps)
                elif isinstance(action, RollBack):
                    assert action.to in held
                    assert action.to in before
                    assert action.to <= at + 1
                elif isinstance(action, LimitRate) and action.ceiling is not None:
                    assert action.ceiling > 0
            assert held == {m.step for m in story.state.marks}
    assert story.state.rollbacks <= POLICY.most_rollbacks
    assert story.state.interventions <= POLICY.most_interventions


def test_before_anything_is_known_good_it_goes_back_to_the_beginning() -> None:
    story = Story()
    story.state, story.step = GuardState.begun(7), 7
    story.go(3)
    actions = story.go(state="firing", kind="detection", loss=9.0)
    assert of(RollBack, actions)[0].to == 7  # type: ignore[union-attr]


def test_a_snapshot_further_back_than_may_be_wasted_is_not_gone_back_to() -> None:
    story = Story(replace(POLICY, most_wasted=20))
    story.state = GuardState.begun(0)
    story.go(19, loss=2.0)
    story.go(31, state="pending", kind="forecast")
    actions = story.go(state="firing", kind="detection", loss=9.0)
    assert of(RollBack, actions) == []
    assert of(Advise, actions)


def test_trouble_that_comes_back_is_met_by_a_lower_rate_each_time() -> None:
    story = Story()
    story.go(80)
    cause = Suspect(name="learning_rate")
    ceilings: list[float] = []
    for _ in range(4):
        actions = story.go(state="firing", kind="detection", suspect=cause)
        ceilings += [a.ceiling for a in actions if isinstance(a, LimitRate) and a.ceiling]
        story.go(5)
    assert len(ceilings) == 4
    assert all(later <= 0.5 * earlier for earlier, later in pairwise(ceilings))
    assert ceilings[3] / ceilings[2] < ceilings[1] / ceilings[0]


def test_scales_that_do_not_fit_for_some_records_get_bf16_before_any_rollback() -> None:
    story = Story(replace(POLICY, bf16_hold=20))
    story.go(40, misfits=())
    assert of(UseBf16, story.go(misfits=("a",))) == []
    # Off the cadence nothing is known; one good record in between starts afresh.
    story.go(3, misfits=None)
    assert of(UseBf16, story.go(misfits=("b",))) == []
    actions = story.go(state="firing", kind="detection", misfits=("a", "b"))
    assert actions == [UseBf16(("b",))]
    assert of(UseFp8, story.go(40, misfits=())) == [UseFp8(("b",))]


def test_many_layers_with_misfit_scales_all_go_to_bf16() -> None:
    story = Story()
    story.go(2, misfits=("a", "b", "c", "d"))
    assert of(UseBf16, story.actions) == [UseBf16(("*",))]


def test_no_known_good_snapshot_while_a_scale_does_not_fit() -> None:
    story = Story(replace(POLICY, scale_records=0))
    story.go(60, misfits=("a",))
    assert of(MarkGood, story.actions) == of(UseBf16, story.actions) == []


def test_a_warm_up_that_moves_the_weights_absurdly_begins_again_at_a_lower_rate() -> None:
    story = Story()
    story.state = GuardState.begun(0)
    for number in range(60):
        rate = 0.01 * (number + 1)
        held = story.state.ceiling
        actions = story.go(rate=rate, update=0.16 * (number + 1) if held is None else 0.01)
        if of(RollBack, actions):
            break
    assert of(RollBack, actions) == [RollBack(0)]
    # What makes a first step of 5 %, by the first step that was seen: 16 % at a rate of 0.01.
    (limit,) = of(LimitRate, actions)
    assert limit.ceiling == pytest.approx(0.05 / 16)  # type: ignore[union-attr]
    assert number < 30
    story.go(30, rate=0.1, update=0.01)
    assert len(of(LimitRate, story.actions)) == 1


def test_the_longest_healthy_warm_up_is_no_alarm() -> None:
    """FOG-max at the highest rate that trains: its peak is 2.7 %, measured."""
    story = Story()
    story.state = GuardState.begun(0)
    for number in range(120):
        story.go(rate=4e-3 * min(1.0, (number + 1) / 20), update=min(0.0273, 0.3 / (number + 1)))
    assert of(LimitRate, story.actions) == of(RollBack, story.actions) == []


def test_steps_longer_than_in_good_times_go_back_to_the_usual_rate() -> None:
    story = Story()
    story.go(60, rate=1e-3, update=0.005)
    for number in range(40):
        growth = 1.05**number
        actions = story.go(rate=1e-3 * growth, update=0.005 * growth)
        if of(LimitRate, actions):
            break
    assert of(LimitRate, actions) == [LimitRate(1e-3)]
    # Before the rule for the rate alone, which waits for four times.
    assert growth < 4
    longer = Story()
    longer.go(60, rate=1e-3, update=0.005)
    (limit,) = of(LimitRate, longer.go(8, rate=1e-3, update=0.02))
    assert limit.ceiling < 1e-3  # type: ignore[union-attr, operator]


def test_a_rise_that_an_earlier_plateau_explains_is_no_alarm() -> None:
    story = Story(replace(POLICY, rate_surge=0))
    story.go(60, rate=1e-3, update=0.005)
    story.go(60, rate=1e-4, update=0.0005)
    story.go(60, rate=1e-3, update=0.005)
    assert of(LimitRate, story.actions) == []


def tensor(fp8: str = "e4m3", /, **values: float) -> TensorStatistics:
    identity = TensorIdentity(layer="a", role="input", format=fp8)
    return TensorStatistics(identity=identity, numel=64, **values)  # type: ignore[arg-type]


def record(*tensors: TensorStatistics) -> StepRecord:
    return StepRecord(step=0, time=datetime(2026, 1, 1, tzinfo=UTC), tensors=tensors)


def test_a_scale_does_not_fit_when_range_and_error_both_say_so() -> None:
    saturated = {"headroom_log2": -2.0, "overflow_ratio": 0.1}
    assert misfit_layers(POLICY, record(tensor(sqnr_db=5.0, **saturated))) == ("a",)
    assert misfit_layers(POLICY, record(tensor(sqnr_db=25.0, **saturated))) == ()
    flushed = {"headroom_log2": 9.0, "underflow_ratio": 0.9}
    assert misfit_layers(POLICY, record(tensor(sqnr_db=2.0, **flushed))) == ("a",)
    assert misfit_layers(POLICY, record(tensor(sqnr_db=31.0, headroom_log2=-0.3))) == ()
    assert misfit_layers(POLICY, record(tensor("bf16", sqnr_db=5.0, **saturated))) is None
    assert misfit_layers(POLICY, record()) is None


def test_a_policy_says_what_is_wrong_with_it() -> None:
    assert GuardPolicy.from_mapping({"advise": True, "rate_factor": 0.8}).rate_factor == 0.8
    with pytest.raises(ValueError, match="did you mean rate_factor"):
        GuardPolicy.from_mapping({"rate_facto": 0.8})
    with pytest.raises(ValueError, match=r"rate_factor is 1\.5; allowed"):
        GuardPolicy(rate_factor=1.5)
    with pytest.raises(ValueError, match="type int"):
        GuardPolicy.from_mapping({"cooldown": "ten"})
