"""The alert state machine: hysteresis, planned events, forecast and detection apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api.alerts import AlertMachine, AlertSettings, alarm_starts


def states(machine: AlertMachine, values: Sequence[float | None]) -> list[str]:
    return [machine.update(v, detected=False, suspected=False) for v in values]


def test_fires_after_three_high_records_of_five() -> None:
    machine = AlertMachine(0.5)
    assert states(machine, [0.1, 0.6, 0.1, 0.7, 0.1]) == ["ok", *["pending"] * 4]
    assert states(machine, [0.8]) == ["firing"]
    assert machine.kind == "forecast"


def test_one_high_record_only_makes_it_pending() -> None:
    assert states(AlertMachine(0.5), [0.9] + [0.0] * 6)[-1] == "ok"


def test_resolves_below_the_lower_threshold_only() -> None:
    machine = AlertMachine(0.5, AlertSettings(calm=3))
    states(machine, [0.9] * 3)
    assert states(machine, [0.4] * 20)[-1] == "firing"
    assert states(machine, [0.1] * 3) == ["firing", "firing", "resolved"]
    assert machine.kind is None
    assert states(machine, [0.1] * 3) == ["resolved", "resolved", "ok"]


def test_fires_again_after_it_resolved() -> None:
    machine = AlertMachine(0.5, AlertSettings(calm=2))
    states(machine, [0.9] * 3 + [0.0] * 2)
    assert states(machine, [0.9] * 3) == ["pending", "pending", "firing"]


def test_detection_fires_at_once_and_says_so() -> None:
    machine = AlertMachine(None)
    assert machine.update(None, detected=False, suspected=True) == "pending"
    assert machine.kind == "detection"
    assert machine.update(None, detected=True, suspected=False) == "firing"
    assert machine.kind == "detection"


def test_a_forecast_that_comes_true_becomes_a_detection() -> None:
    machine = AlertMachine(0.5)
    states(machine, [0.9] * 3)
    machine.update(0.9, detected=True, suspected=False)
    assert machine.kind == "detection"


def test_without_threshold_or_probability_no_forecast_alarm() -> None:
    assert set(states(AlertMachine(None), [0.99] * 20)) == {"ok"}
    assert set(states(AlertMachine(0.5), [None] * 20)) == {"ok"}


def test_what_was_high_before_a_planned_event_does_not_count() -> None:
    machine = AlertMachine(0.5)
    states(machine, [0.9, 0.9])
    machine.rebaseline()
    assert states(machine, [0.9]) == ["pending"]


SCORES = st.lists(st.sampled_from([0.0, 0.2, 0.3, 0.55, 0.9, math.nan]), max_size=120)


@given(SCORES)
def test_counts_alarms_as_the_machine_would_raise_them(scores: list[float]) -> None:
    machine = AlertMachine(0.5)
    expected = []
    for index, score in enumerate(scores):
        before = machine.state
        value = None if math.isnan(score) else score
        if machine.update(value, detected=False, suspected=False) == "firing" != before:
            expected.append(index)
    assert alarm_starts(np.array(scores), 0.5) == expected


def test_counts_where_alarms_begin() -> None:
    values = np.array([0.0] * 5 + [0.9] * 5 + [0.0] * 12 + [0.9] * 3)
    assert alarm_starts(values, 0.5) == [7, 24]
    with pytest.raises(ValueError, match="calm"):
        alarm_starts(values, 0.5, AlertSettings(calm=2))


@given(st.lists(st.floats(0, 1) | st.none(), max_size=60))
def test_never_fires_without_three_high_records(values: list[float | None]) -> None:
    machine = AlertMachine(0.8)
    high = 0
    for value in values:
        high += value is not None and value >= 0.8
        state = machine.update(value, detected=False, suspected=False)
        assert high >= 3 or state in ("ok", "pending")
        assert (machine.kind is None) == (state in ("ok", "resolved"))


def test_refuses_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="need"):
        AlertSettings(need=6, of=5)
