"""The alert log follows the scorer's state, survives a restart and never opens an alert twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from foreshock.api.alert_feedback import interval
from foreshock.api.alert_log import AlertContent, AlertLog, UnknownAlert, deliveries
from foreshock.api.alert_model import Stakes, outranked
from foreshock.api.alert_text import alert_annotations, alert_labels
from foreshock.api.registry import Registry
from foreshock.monitor.record import Risk
from tests.api.live_helpers import SUBJECT, content, risk


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry.sqlite")
    yield registry
    registry.close()


def messages(registry: Registry) -> list[tuple[str, str]]:
    with registry.engine.begin() as connection:
        query = sa.select(deliveries).order_by(deliveries.c.id)
        return [(row.channel, row.transition) for row in connection.execute(query)]


def follow(log: AlertLog, *risks: Risk) -> list[tuple[str, str]]:
    return [
        (alert.name, alert.state)
        for answer in risks
        for alert in log.follow(SUBJECT, answer, partial(content, answer.step))
    ]


def test_an_alert_goes_pending_firing_resolved_once(registry: Registry) -> None:
    log = AlertLog(registry, ["hook"])
    changes = follow(
        log,
        risk(1),
        risk(2, "pending", "forecast"),
        risk(3, "firing", "forecast"),
        risk(4, "firing", "forecast"),
        risk(5, "resolved"),
        risk(6, "resolved"),
        risk(7),
    )
    assert changes == [
        ("TrainingDivergenceRisk", "pending"),
        ("TrainingDivergenceRisk", "firing"),
        ("TrainingDivergenceRisk", "resolved"),
    ]
    (alert,) = log.find()
    assert (alert.opened_step, alert.fired_step, alert.resolved_step) == (2, 3, 5)
    assert alert.ends_at is not None
    assert alert.ends_at >= alert.starts_at
    assert messages(registry) == [("hook", "firing"), ("hook", "resolved")]


def test_a_pending_alert_that_goes_quiet_is_forgotten_and_sent_to_nobody(
    registry: Registry,
) -> None:
    log = AlertLog(registry, ["hook"])
    follow(log, risk(1, "pending", "forecast"), risk(2))
    assert log.find() == ()
    assert messages(registry) == []


def test_detection_joins_a_firing_forecast_and_both_end_together(registry: Registry) -> None:
    log = AlertLog(registry)
    follow(log, risk(1, "firing", "forecast"), risk(2, "firing", "detection"))
    assert {(a.name, a.severity, a.state) for a in log.find()} == {
        ("TrainingDivergenceRisk", "warning", "firing"),
        ("TrainingLossDiverging", "critical", "firing"),
    }
    follow(log, risk(9, "resolved"))
    assert {a.state for a in log.find()} == {"resolved"}


def lose(log: AlertLog, step: int) -> list[str]:
    """The loss of a step is not finite."""
    answer = risk(step, "firing", "detection")
    return [a.name for a in log.follow(SUBJECT, answer, partial(content, step), lost=True)]


def test_a_loss_that_is_not_finite_is_an_alert_of_its_own_and_the_only_new_one(
    registry: Registry,
) -> None:
    log = AlertLog(registry)
    assert lose(log, 3) == ["TrainingLossNotFinite"]
    # Finite again, and still detected: nothing that people do not know.
    assert follow(log, risk(4, "firing", "detection")) == []
    assert lose(log, 5) == []
    assert log.firing() == {("default", "llama", "nonfinite")}
    assert follow(log, risk(9, "resolved")) == [("TrainingLossNotFinite", "resolved")]


def test_a_rising_loss_that_becomes_nan_pages_again_and_all_end_together(
    registry: Registry,
) -> None:
    log = AlertLog(registry)
    follow(log, risk(1, "firing", "forecast"), risk(2, "firing", "detection"))
    assert lose(log, 3) == ["TrainingLossNotFinite"]
    worst = {a.id for a in log.find() if a.kind == "nonfinite"}
    assert outranked(log.find()) == {a.id for a in log.find()} - worst
    assert len(follow(log, risk(9, "resolved"))) == 3


def test_a_pending_risk_is_no_nan_yet(registry: Registry) -> None:
    log = AlertLog(registry)
    answer = risk(3, "pending", "detection")
    (alert,) = log.follow(SUBJECT, answer, partial(content, 3), lost=True)
    assert (alert.kind, alert.state) == ("detection", "pending")


def test_a_restart_goes_on_with_the_open_alert(registry: Registry) -> None:
    follow(AlertLog(registry, ["hook"]), risk(3, "firing", "forecast"))
    again = AlertLog(registry, ["hook"])
    assert again.has_open(SUBJECT.run_id, 1)
    assert follow(again, risk(4, "firing", "forecast")) == []
    assert follow(again, risk(5, "resolved")) == [("TrainingDivergenceRisk", "resolved")]
    assert len(messages(registry)) == 2


def test_records_scored_again_after_a_crash_open_nothing_new(registry: Registry) -> None:
    story = [risk(3, "firing", "detection"), risk(4, "resolved"), risk(5)]
    follow(AlertLog(registry, ["hook"]), *story)
    assert follow(AlertLog(registry, ["hook"]), *story) == []
    assert len(AlertLog(registry).find()) == 1
    assert len(messages(registry)) == 2


def test_a_second_rise_is_a_second_alert(registry: Registry) -> None:
    log = AlertLog(registry)
    follow(log, risk(3, "firing", "forecast"), risk(4), risk(8, "firing", "forecast"))
    assert [a.fired_step for a in log.find()] == [8, 3]
    assert [a.fired_step for a in log.find(state="firing")] == [8]
    assert log.find(run_id="b" * 32) == ()


def test_a_newer_attempt_ends_the_alerts_of_the_older(registry: Registry) -> None:
    log = AlertLog(registry)
    follow(log, risk(3, "firing", "detection"))
    (ended,) = log.close(SUBJECT, 7, "attempt 2 began")
    assert (ended.state, ended.resolved_step, ended.end_reason) == (
        "resolved",
        7,
        "attempt 2 began",
    )
    assert log.open_attempts() == ()


def test_labels_hold_no_value_and_no_step(registry: Registry) -> None:
    log = AlertLog(registry)
    follow(log, risk(123, "firing", "forecast"))
    (alert,) = log.find()
    assert alert_labels(alert) == {
        "alertname": "TrainingDivergenceRisk",
        "project": "default",
        "run": "llama",
        "severity": "warning",
    }
    said = alert_annotations(alert, "firing")
    assert said["cause"] == "learning_rate"
    assert said["layers"] == "blocks.3.mlp.down"
    assert said["remedy"] == "lower the learning rate"
    assert said["expected_lead_steps"] == "40"
    assert "50% within 100 steps" in said["probability"]
    assert "123" in said["summary"]


def test_non_finite_numbers_survive(registry: Registry) -> None:
    log = AlertLog(registry)
    odd = AlertContent(step=1, probability={10: 0.1}, drivers=({"contribution": math.inf},))
    log.follow(SUBJECT, risk(1, "firing", "detection"), lambda: odd)
    assert log.find()[0].content.drivers == ({"contribution": "Infinity"},)


def test_stakes_and_bands_are_kept(registry: Registry) -> None:
    stakes = Stakes(step_seconds=3.0, hours_at_risk=0.5, world_size=8)
    said = AlertContent(step=1, probability={10: 0.1}, band={10: (0.05, 0.2)}, stakes=stakes)
    AlertLog(registry).follow(SUBJECT, risk(1, "firing", "forecast"), lambda: said)
    (alert,) = AlertLog(registry).find()
    assert (alert.content.band, alert.content.stakes) == ({10: (0.05, 0.2)}, stakes)
    assert alert.content.stakes.gpu_hours == 4.0


def test_feedback_is_kept_and_replaced(registry: Registry) -> None:
    log = AlertLog(registry)
    follow(log, risk(3, "firing", "forecast"))
    (alert,) = log.find()
    log.answer(alert.id, correct=False, note="planned")
    assert log.answer(alert.id, correct=True, note=None).correct is True
    assert AlertLog(registry).get(alert.id).note is None
    with pytest.raises(UnknownAlert, match="999"):
        log.answer(999, correct=True, note=None)


def test_answers_are_counted_for_each_rule(registry: Registry) -> None:
    log = AlertLog(registry)
    for step, correct in ((3, False), (13, True), (23, None)):
        follow(log, risk(step, "firing", "forecast"))
        if correct is not None:
            log.answer(log.find()[0].id, correct=correct, note=None)
        follow(log, risk(step + 1, "resolved"))
    follow(log, risk(40, "pending", "detection"))
    forecast, detection, *_ = log.feedback()
    assert (forecast.fired, forecast.right, forecast.wrong, forecast.unanswered) == (3, 1, 1, 1)
    assert (forecast.name, forecast.false_share) == ("TrainingDivergenceRisk", 0.5)
    assert (detection.fired, detection.false_share) == (0, None)
    assert sum(rule.fired for rule in log.feedback(run_id="another")) == 0
    assert sum(rule.fired for rule in log.feedback(projects=frozenset())) == 0
    assert sum(rule.fired for rule in log.feedback(since=datetime.now(UTC))) == 0


def test_the_interval_of_a_share_is_wilsons() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20, method 3.
    assert interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert interval(0, 0) is None
