"""Alerts read well where they are read, and arrive: mail, Slack and PagerDuty over sockets."""

from __future__ import annotations

import email
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.message import EmailMessage
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from apprise.plugins.pagerduty import PAGERDUTY_API_LOOKUP
from apprise.plugins.slack import NotifySlack
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from foreshock.api.alert_facts import duration, facts_of, headline
from foreshock.api.alert_messages import MEDIUMS, Medium, message
from foreshock.api.alert_model import (
    ALERT_NAMES,
    Alert,
    AlertKind,
    AlertSubject,
    Stakes,
    Transition,
)
from foreshock.api.alert_samples import sample_alert
from foreshock.api.channel_apprise import AppriseChannel, medium_of
from foreshock.api.cli.main import app
from tests.api.live_helpers import receiver_process

PAGE = "https://watch.example"
KINDS: tuple[AlertKind, ...] = tuple(ALERT_NAMES)
TRANSITIONS: tuple[Transition, ...] = ("firing", "reminder", "resolved")


def test_a_forecast_says_everything_that_somebody_on_call_needs() -> None:
    facts = dict(facts_of(sample_alert("forecast"), "firing", PAGE).lines)
    assert facts == {
        "Run": "llama-1b-fp8 (project pretraining, attempt 2)",
        "What": "the loss looks normal, but is likely to start diverging (step 4120)",
        "How sure": "12% (5% to 20%) within 10 steps, 71% (54% to 86%) within 100 steps",
        "Time left": "about 43 steps, 2 min, if it does diverge",
        "At risk": "26 GPU-hours (24 min since the last checkpoint seen on 64 GPUs)",
        "Why": "activation outlier (83%), since step 4040: channel_kurtosis of blocks.3.mlp.down "
        "input rose 9.1 times; in blocks.2.mlp.down",
        "Do": "save a checkpoint now, then look at the diagnosis; then: give the layer finer "
        "scales (per row or block), or bf16",
    }


@pytest.mark.parametrize(
    ("kind", "transition", "expected"),
    [
        ("forecast", "firing", "llama-1b-fp8: 71% to diverge, ~2 min left"),
        ("forecast", "reminder", "llama-1b-fp8: still 71% to diverge, ~2 min left"),
        ("detection", "firing", "llama-1b-fp8: loss diverging, step 4120"),
        ("nonfinite", "firing", "llama-1b-fp8: loss not finite, step 4120"),
        ("silence", "reminder", "llama-1b-fp8: still silent since step 4120"),
        ("forecast", "resolved", "llama-1b-fp8: over (risk is back to normal)"),
    ],
)
def test_the_headline_is_short_and_begins_with_the_run(
    kind: AlertKind, transition: Transition, expected: str
) -> None:
    assert headline(sample_alert(kind, transition), transition) == expected


def named(run: str, alert: Alert) -> Alert:
    return replace(alert, subject=AlertSubject("a" * 32, "default", run, 1))


@given(
    run=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=128),
    kind=st.sampled_from(KINDS),
    transition=st.sampled_from(TRANSITIONS),
)
def test_a_phone_gets_a_title_that_fits_whatever_the_run_is_called(
    run: str, kind: AlertKind, transition: Transition
) -> None:
    said = message(named(run, sample_alert(kind, transition)), transition, "phone", PAGE)
    assert len(said.title) <= 75
    assert said.title.startswith(run[:27])
    assert len(said.body) < 1024, "the least that a push service takes"


class Texts(HTMLParser):
    """The texts of a page, and its tags in order."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(run=st.text(st.sampled_from("<>&\"'ab/=img ")), kind=st.sampled_from(KINDS))
def test_no_name_of_a_run_is_taken_for_html(run: str, kind: AlertKind) -> None:
    page = Texts()
    page.feed(message(named(run, sample_alert(kind)), "firing", "mail", PAGE).body)
    assert page.tags == {"div", "p", "b", "a"}
    assert any(f"{run} (project default" in text for text in ["".join(page.texts)])


def test_layers_are_code_in_a_chat_and_single_marks_are_not_markup() -> None:
    alert = named("llama_1b*", sample_alert("forecast"))
    body = message(alert, "firing", "chat", PAGE).body
    assert "**Run:** `llama_1b*` (project default" in body
    assert "`channel_kurtosis` of `blocks.3.mlp.down` input rose 9.1 times" in body
    assert f"**Page:** {PAGE}/?run={'a' * 32}" in body


@pytest.mark.parametrize("medium", MEDIUMS)
def test_without_stakes_causes_and_an_address_it_still_reads(medium: Medium) -> None:
    alert = sample_alert("forecast")
    bare = replace(
        alert,
        content=replace(alert.content, stakes=Stakes(), causes=(), band={}, expected_lead=None),
    )
    said = message(bare, "firing", medium, None)
    assert "71%" in said.title + said.body
    assert not [word for word in ("None", "nan", "http", "GPU") if word in said.body]


def test_hours_without_a_world_size_are_hours() -> None:
    alert = sample_alert("detection")
    content = replace(alert.content, stakes=Stakes(hours_at_risk=50.0))
    facts = dict(facts_of(replace(alert, content=content), "firing", None).lines)
    assert facts["At risk"] == "2.1 days since the last checkpoint seen"
    assert facts["How sure"] == "certain: it is in the loss itself"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h"), (1e6, "11.6 days")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("url", "medium"),
    [
        ("json://127.0.0.1:1/hook", "webhook"),
        ("mailto://u:p@example.com?smtp=127.0.0.1", "mail"),
        ("slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#c", "chat"),
        ("slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/?format=text", "plain"),
        ("discord://1234567/abcdef", "chat"),
        ("tgram://123456789:abcdefg_hijklmnop/12315544/", "plain"),
        ("ntfy://topic", "phone"),
        ("pover://user@token", "phone"),
        (f"pagerduty://{'a' * 32}@{'b' * 20}", "phone"),
        ("mmost://127.0.0.1/token", "plain"),
    ],
)
def test_every_address_has_the_layout_it_can_show(url: str, medium: Medium) -> None:
    assert medium_of(url) == medium


class Mailbox:
    """What a real SMTP server took."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        self.mails.append(email.message_from_bytes(content, policy=email.policy.default))
        return "250 taken"


@contextmanager
def mailbox() -> Iterator[tuple[Mailbox, int]]:
    box = Mailbox()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        yield box, port
    finally:
        controller.stop()


def test_a_mail_arrives_as_html_and_as_text() -> None:
    with mailbox() as (box, port):
        address = f"mailto://127.0.0.1:{port}?from=foreshock@example.com&to=anna@example.com"
        AppriseChannel(f"{address}&mode=insecure", page=PAGE).send(
            [sample_alert("forecast")], "firing"
        )
    (mail,) = box.mails
    assert mail["Subject"] == "[firing] llama-1b-fp8: 71% to diverge, ~2 min left"
    assert mail.get_content_type() == "multipart/alternative"
    text, html = (part.get_content() for part in mail.iter_parts())
    for fact in (
        "At risk: 26 GPU-hours (24 min since the last checkpoint seen on 64 GPUs)",
        "Do: save a checkpoint now",
        f"Runbook: {PAGE}/runbook#trainingdivergencerisk",
        "Quiet: foreshock alert acknowledge 17",
    ):
        assert fact in text
    assert f'<a href="{PAGE}/?run=' in html


def test_slack_gets_marks_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver_process(tmp_path) as receiver:
        monkeypatch.setattr(NotifySlack, "webhook_url", f"http://127.0.0.1:{receiver.port}")
        url = "slack://T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ/#c"
        AppriseChannel(url, page=PAGE).send([sample_alert("detection")], "firing")
        (body,) = receiver.bodies()
    said = json.dumps(body)
    assert "[firing] llama-1b-fp8: loss diverging, step 4120" in said
    assert "*How sure:* certain" in said
    assert "**" not in said


def test_pagerduty_s_incident_ends_with_the_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiver_process(tmp_path) as receiver:
        monkeypatch.setitem(PAGERDUTY_API_LOOKUP, "us", f"http://127.0.0.1:{receiver.port}/")
        channel = AppriseChannel(f"pagerduty://{'a' * 32}@{'b' * 20}", page=PAGE)
        alert = sample_alert("detection")
        for transition in TRANSITIONS:
            channel.send([alert], transition)
        bodies: list[dict[str, Any]] = receiver.bodies()
    assert [body["event_action"] for body in bodies] == ["trigger", "trigger", "resolve"]
    assert {body["dedup_key"] for body in bodies} == {"foreshock-17"}
    assert bodies[0]["payload"]["severity"] == "critical"
    assert bodies[0]["payload"]["summary"].startswith("llama-1b-fp8: loss diverging, step 4120")


def test_the_preview_shows_each_layout() -> None:
    shown = CliRunner().invoke(app, ["alert", "preview", "--url", PAGE])
    assert shown.exit_code == 0
    for part in (*(f"──── {medium} ────" for medium in MEDIUMS), "**Why:**", "<p ", "alertname:"):
        assert part in shown.stdout
    some = CliRunner().invoke(
        app, ["alert", "preview", "--kind", "silence", "--layout", "phone", "--says", "resolved"]
    )
    assert some.stdout.splitlines()[:2] == [
        "──── phone ────",
        "llama-1b-fp8: over (risk is back to normal)",
    ]


def test_the_preview_is_sent_for_a_try(tmp_path: Path) -> None:
    with receiver_process(tmp_path) as receiver:
        arguments = ["alert", "preview", "--send", receiver.url]
        sent = CliRunner().invoke(app, arguments)
        assert (sent.exit_code, sent.stdout) == (0, "sent, laid out for: webhook\n")
        (body,) = receiver.bodies()
    assert body["title"] == "[firing] TrainingDivergenceRisk llama-1b-fp8"
    assert "gpu_hours_at_risk: 25.60" in str(body["message"])
    refused = CliRunner().invoke(app, ["alert", "preview", "--send", "nonsense"])
    assert refused.exit_code == 2
    assert "json://" in refused.stderr
    now = datetime.now(UTC)
    assert abs((now - sample_alert("forecast").starts_at).total_seconds()) < 60
