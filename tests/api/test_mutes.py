"""Acknowledged and snoozed alerts: quiet for as long as people said, and not longer."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from foreshock.api import alert_tables as tables
from foreshock.api.alert_log import Alert, AlertLog, AlertSubject
from foreshock.api.alert_mutes import Mute, NotOpen
from foreshock.api.channels import AlertmanagerChannel
from foreshock.api.delivery import next_page
from foreshock.api.registry import Registry
from foreshock.monitor.record import RiskKind
from tests.api.live_helpers import SUBJECT, content, risk, wait_until
from tests.api.test_delivery import FlakyChannel, alertmanager, delivering

MOMENTS = st.integers(0, 2**31).map(lambda second: datetime.fromtimestamp(second, UTC))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path / "registry.sqlite")
    yield registry
    registry.close()


def fire(
    log: AlertLog, step: int = 3, kind: RiskKind = "forecast", subject: AlertSubject = SUBJECT
) -> Alert:
    (alert,) = log.follow(subject, risk(step, "firing", kind), lambda: content(step))
    return alert


def resolve(log: AlertLog, step: int = 9) -> None:
    log.follow(SUBJECT, risk(step), lambda: content(step))


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def test_only_what_fires_can_be_acknowledged(registry: Registry) -> None:
    log = AlertLog(registry)
    (pending,) = log.follow(SUBJECT, risk(1, "pending", "forecast"), lambda: content(1))
    with pytest.raises(NotOpen, match="pending; only one that is firing"):
        log.mutes.acknowledge(pending.id, by="anna")
    log.mutes.snooze(pending.id, by="anna", until=soon(60))
    alert = fire(log)
    log.mutes.acknowledge(alert.id, by="ben", note="mine")
    (mute,) = AlertLog(registry).mutes.of([alert.id]).values()
    assert (mute.decision, mute.by, mute.until, mute.note) == ("acknowledged", "ben", None, "mine")
    resolve(log)
    with pytest.raises(NotOpen, match="resolved"):
        log.mutes.snooze(alert.id, by="anna", until=soon(60))


def test_a_pending_alert_that_was_snoozed_can_be_forgotten(registry: Registry) -> None:
    log = AlertLog(registry)
    (pending,) = log.follow(SUBJECT, risk(1, "pending", "forecast"), lambda: content(1))
    log.mutes.snooze(pending.id, by="anna", until=soon(60))
    resolve(log)
    assert log.find() == ()
    assert log.mutes.decisions([pending.id]) == {}


def test_muted_alerts_are_known_to_a_scrape_until_they_end(registry: Registry) -> None:
    log = AlertLog(registry)
    alert = fire(log)
    assert log.mutes.firing() == frozenset()
    log.mutes.snooze(alert.id, by="anna", until=soon(0.3))
    assert log.mutes.firing() == {("default", "llama", "forecast")}
    wait_until(lambda: log.mutes.firing() == frozenset())
    log.mutes.acknowledge(alert.id, by="anna")
    resolve(log)
    assert log.mutes.firing() == frozenset()


def test_a_snooze_covers_the_run_s_next_alert_of_the_kind_but_no_other(registry: Registry) -> None:
    log = AlertLog(registry)
    first = fire(log)
    until = soon(60)
    log.mutes.snooze(first.id, by="anna", until=until)
    resolve(log)
    second = fire(log, 20, subject=AlertSubject(SUBJECT.run_id, "default", "llama", 2))
    other_kind = fire(log, 30, "detection")
    other_run = fire(log, 20, subject=AlertSubject("b" * 32, "default", "other", 1))
    mutes = log.mutes.of([second.id, other_kind.id, other_run.id])
    assert list(mutes) == [second.id]
    assert mutes[second.id].until == until


def test_an_acknowledgement_does_not_cover_the_next_alert(registry: Registry) -> None:
    log = AlertLog(registry)
    log.mutes.acknowledge(fire(log).id, by="anna")
    resolve(log)
    assert log.mutes.of([fire(log, 20).id]) == {}


def test_a_deleted_run_takes_its_decisions_along(registry: Registry) -> None:
    log = AlertLog(registry)
    alert = fire(log)
    log.mutes.acknowledge(alert.id, by="anna")
    log.delete(SUBJECT.run_id)
    assert log.mutes.decisions([alert.id]) == {}


@given(
    told=MOMENTS,
    ahead=st.integers(-100_000, 100_000),
    every=st.none() | st.integers(1, 100_000),
    decision=st.sampled_from(["acknowledged", "snoozed", None]),
)
def test_when_it_pages_again(told: datetime, ahead: int, every: int | None, decision: Any) -> None:
    until = told + timedelta(seconds=ahead)
    mute = None
    if decision is not None:
        snoozed = until if decision == "snoozed" else None
        mute = Mute(decision=decision, by="anna", at=told, until=snoozed)
    remind = None if every is None else timedelta(seconds=every)
    again = next_page(told, mute, remind)
    if decision == "acknowledged":
        assert again is None
    elif decision == "snoozed" and until > told:
        assert again == until
    else:
        assert again == (None if remind is None else told + remind)


def test_nobody_acknowledges_so_it_pages_again_and_again_until_somebody_does(
    registry: Registry,
) -> None:
    channel = FlakyChannel(0)
    log = AlertLog(registry, [channel.name])
    with delivering(registry, log, [channel], timedelta(seconds=0.2)) as delivery:
        alert = fire(log)
        delivery.wake()
        wait_until(lambda: len(channel.got) >= 3)
        assert {what for what, _ in channel.got[1:]} == {"reminder"}
        log.mutes.acknowledge(alert.id, by="anna")
        delivery.wake()
        threading.Event().wait(0.3)
        told = len(channel.got)
        threading.Event().wait(0.7)
        assert len(channel.got) == told
        log.mutes.end(alert.id)
        delivery.wake()
        wait_until(lambda: len(channel.got) > told)
        resolve(log)
        delivery.wake()
        wait_until(lambda: channel.got[-1][0] == "resolved")
        told = len(channel.got)
        threading.Event().wait(0.5)
        assert len(channel.got) == told


def test_a_snooze_ends_with_a_page_if_it_still_fires(registry: Registry) -> None:
    channel = FlakyChannel(0)
    log = AlertLog(registry, [channel.name])
    with delivering(registry, log, [channel]) as delivery:
        alert = fire(log)
        delivery.wake()
        wait_until(lambda: len(channel.got) == 1)
        until = soon(0.8)
        log.mutes.snooze(alert.id, by="anna", until=until)
        delivery.wake()
        wait_until(lambda: len(channel.got) == 2)
        assert datetime.now(UTC) >= until
        assert channel.got[1] == ("reminder", alert.id)
        threading.Event().wait(0.3)
        assert len(channel.got) == 2


def test_what_fires_and_ends_within_a_snooze_is_told_to_nobody(registry: Registry) -> None:
    channel = FlakyChannel(0)
    log = AlertLog(registry, [channel.name])
    with delivering(registry, log, [channel]) as delivery:
        first = fire(log)
        delivery.wake()
        wait_until(lambda: len(channel.got) == 1)
        log.mutes.snooze(first.id, by="anna", until=soon(60))
        resolve(log)
        delivery.wake()
        wait_until(lambda: len(channel.got) == 2)
        second = fire(log, 20)
        resolve(log, 25)
        delivery.wake()
        threading.Event().wait(0.5)
    # The first was told of, so its end is too.
    assert channel.got == [("firing", first.id), ("resolved", first.id)]
    (message,) = log.delivered([second.id])[second.id]
    assert message["abandoned"]
    assert "snoozed by anna" in message["error"]


def test_the_lesser_of_two_alerts_of_a_run_does_not_remind(registry: Registry) -> None:
    channel = FlakyChannel(0)
    log = AlertLog(registry, [channel.name])
    forecast = fire(log)
    detection = fire(log, 5, "detection")
    with delivering(registry, log, [channel], timedelta(seconds=0.1)):
        wait_until(lambda: channel.got.count(("reminder", detection.id)) >= 2)
    assert ("reminder", forecast.id) not in channel.got


@pytest.mark.debian
def test_a_real_alertmanager_is_silenced_for_as_long_as_the_alert_is_muted(
    registry: Registry, tmp_path: Path
) -> None:
    if shutil.which("prometheus-alertmanager") is None:
        pytest.skip("needs Debian's prometheus-alertmanager")
    with alertmanager(tmp_path) as url, httpx.Client(base_url=f"{url}/api/v2") as client:
        channel = AlertmanagerChannel(url, resend_seconds=0.2)
        log = AlertLog(registry, [channel.name])
        with delivering(registry, log, [channel]) as delivery:
            alert = fire(log)
            delivery.wake()
            wait_until(lambda: states(client) == ["active"])
            log.mutes.acknowledge(alert.id, by="anna", note="on it")
            delivery.wake()
            wait_until(lambda: states(client) == ["suppressed"])
            (silence,) = silences(client)
            assert silence["createdBy"] == "anna"
            assert silence["comment"] == f"acknowledged in foreshock, alert {alert.id}: on it"
            assert {(m["name"], m["value"]) for m in silence["matchers"]} == {
                ("alertname", "TrainingDivergenceRisk"),
                ("project", "default"),
                ("run", "llama"),
            }
            until = soon(3600)
            log.mutes.snooze(alert.id, by="ben", until=until)
            delivery.wake()
            wait_until(lambda: ends(client) == [until.isoformat(timespec="milliseconds")])
            log.mutes.end(alert.id)
            delivery.wake()
            wait_until(lambda: states(client) == ["active"])
            log.mutes.acknowledge(alert.id, by="anna")
            delivery.wake()
            wait_until(lambda: len(silences(client)) == 1)
            resolve(log)
            delivery.wake()
            wait_until(lambda: silences(client) == [])
            wait_until(lambda: states(client) == [])


@pytest.mark.debian
def test_a_silence_that_the_alertmanager_lost_is_made_anew(
    registry: Registry, tmp_path: Path
) -> None:
    if shutil.which("prometheus-alertmanager") is None:
        pytest.skip("needs Debian's prometheus-alertmanager")
    with alertmanager(tmp_path) as url, httpx.Client(base_url=f"{url}/api/v2") as client:
        channel = AlertmanagerChannel(url, resend_seconds=0.2)
        log = AlertLog(registry, [channel.name])
        alert = fire(log)
        log.mutes.acknowledge(alert.id, by="anna")
        # As after a restart of one that kept nothing: we know of a silence that it does not.
        lost = {"alert_id": alert.id, "channel": channel.name, "silence_id": str(uuid.uuid4())}
        with registry.write() as connection:
            ends_at = datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=23)
            connection.execute(sa.insert(tables.silences).values(**lost, ends_at=ends_at))
        with delivering(registry, log, [channel]):
            wait_until(lambda: states(client) == ["suppressed"])


def states(client: httpx.Client) -> list[str]:
    return [alert["status"]["state"] for alert in client.get("/alerts").json()]


def silences(client: httpx.Client) -> list[dict[str, Any]]:
    return [s for s in client.get("/silences").json() if s["status"]["state"] == "active"]


def ends(client: httpx.Client) -> list[str]:
    return [s["endsAt"].replace("Z", "+00:00") for s in silences(client)]
