"""Which of the two products speaks: an alarm that begins once the loss has left its band is none
of the forecast's.
"""

from __future__ import annotations

from foreshock.api.alerts import AlertMachine

HIGH, LOW = 0.9, 0.01


def test_a_forecast_does_not_begin_while_the_loss_is_out_of_its_band() -> None:
    machine = AlertMachine(0.5)
    for _ in range(3):
        assert machine.update(HIGH, detected=False, suspected=True) == "pending"
        assert machine.kind == "detection"
    assert machine.update(HIGH, detected=True, suspected=False) == "firing"
    assert machine.kind == "detection"


def test_one_bad_batch_only_delays_a_forecast() -> None:
    machine = AlertMachine(0.5)
    machine.update(HIGH, detected=False, suspected=False)
    machine.update(HIGH, detected=False, suspected=False)
    assert machine.update(HIGH, detected=False, suspected=True) == "pending"
    assert machine.update(HIGH, detected=False, suspected=False) == "firing"
    assert machine.kind == "forecast"


def test_a_firing_forecast_becomes_detection_and_not_back() -> None:
    machine = AlertMachine(0.5)
    for _ in range(3):
        machine.update(HIGH, detected=False, suspected=False)
    assert machine.kind == "forecast"
    machine.update(HIGH, detected=False, suspected=True)
    assert machine.kind == "forecast"
    machine.update(HIGH, detected=True, suspected=False)
    machine.update(HIGH, detected=False, suspected=False)
    assert (machine.state, machine.kind) == ("firing", "detection")


def test_quiet_has_no_kind() -> None:
    machine = AlertMachine(0.5)
    machine.update(LOW, detected=False, suspected=False)
    assert (machine.state, machine.kind) == ("ok", None)
