"""foreshock replay: pages on past runs, their leads, and what a weekly budget buys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from foreshock.api.alerts import AlertSettings
from foreshock.api.artifact import load_shipped
from foreshock.api.cli.main import app
from foreshock.api.replay import Track, replay, track
from foreshock.api.replay_policy import PolicyError, ReplayPolicy, read_policy
from foreshock.api.scorer import LocalScorer
from foreshock.monitor.record import HORIZONS, Event, Risk, StepRecord, records_to_table

STEPS = 600
RISE = 431
BEGAN = datetime(2026, 3, 1, tzinfo=UTC)


def curve(seed: int, *, rise: bool) -> list[dict[str, float]]:
    """Loss and gradient norm of a run of the demo's length; one that rises does so smoothly."""
    noise = np.random.default_rng(seed).standard_normal((STEPS, 2))
    step = np.arange(STEPS)
    loss = 2 + 3 * np.exp(-step / 40) + 0.02 * noise[:, 0]
    norm = 1 + 0.05 * np.abs(noise[:, 1])
    if rise:
        late = step >= RISE
        loss = loss + late * 0.05 * np.exp(np.minimum((step - 480) / 18, 6))
        norm = norm + late * np.exp(np.minimum((step - 450) / 30, 6))
    return [
        {"loss": float(a), "grad_norm": float(b), "tokens": 1000.0 * (i + 1)}
        for i, (a, b) in enumerate(zip(loss, norm, strict=True))
    ]


def records(rows: Iterable[dict[str, float]], seconds: float = 10.0) -> list[StepRecord]:
    return [
        StepRecord(step=i, time=BEGAN + timedelta(seconds=seconds * i), scalars=row)
        for i, row in enumerate(rows)
    ]


def made(
    score: Iterable[float], loss: Iterable[float] | None = None, *, hours: float = 1.0
) -> Track:
    """A track whose scores are given; its loss falls unless it is given too."""
    scores = np.array(list(score), np.float64)
    count = len(scores)
    losses = np.array(list(loss)) if loss is not None else 2 + 3 * np.exp(-np.arange(count) / 40)
    flags = np.zeros(count, bool)
    risk = Risk(step=0, probability={10: 0.5}, state="ok", model_version="made")
    return Track(
        run="made",
        attempt=1,
        steps=np.arange(count),
        seconds=np.linspace(0, 3600 * hours, count),
        tokens=np.arange(0.0, 100.0 * count, 100.0),
        loss=losses,
        has_loss=~np.isnan(losses),
        score=scores,
        detected=flags,
        suspected=flags,
        planned=flags,
        risks=(risk,) * count,
        lacking={},
    )


def pulse(at: int, height: float, count: int = 400) -> list[float]:
    """Scores that stand high for ten records."""
    return [height if at <= i < at + 10 else 0.01 for i in range(count)]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def test_a_page_ahead_of_the_rise_has_its_lead() -> None:
    loss = 2 + 3 * np.exp(-np.arange(400) / 40)
    loss[300:] += np.linspace(0.5, 6, 100)
    (run,) = replay([made(pulse(250, 2.0), loss)], ReplayPolicy()).runs
    assert run.label == "diverged"
    assert run.onset is not None
    assert abs(run.onset - 300) <= 3
    (page,) = run.pages
    # Three records of five above the threshold.
    assert (page.step, page.kind, page.outcome) == (252, "forecast", "in time")
    assert page.lead_steps == run.onset - 252
    assert page.lead_tokens == pytest.approx(100 * page.lead_steps)
    assert page.lead_hours == pytest.approx(page.lead_steps / 399)
    assert not run.missed


def test_a_page_on_a_healthy_run_is_in_vain_and_a_silent_failure_is_missed() -> None:
    failing = 2 + 3 * np.exp(-np.arange(400) / 40)
    failing[300:] += np.linspace(0.5, 6, 100)
    answer = replay([made(pulse(100, 2.0)), made([0.01] * 400, failing)], ReplayPolicy())
    assert [[p.outcome for p in run.pages] for run in answer.runs] == [["in vain"], []]
    assert [run.missed for run in answer.runs] == [False, True]


def test_a_page_too_far_ahead_is_no_forecast() -> None:
    loss = 2 + 3 * np.exp(-np.arange(2000) / 40)
    loss[1900:] += np.linspace(0.5, 6, 100)
    (run,) = replay([made(pulse(500, 2.0, 2000), loss)], ReplayPolicy()).runs
    assert [p.outcome for p in run.pages] == ["in vain"]


def test_a_weekly_budget_chooses_the_smallest_factor_that_keeps_it() -> None:
    week = 7 * 24.0
    quiet = [made(pulse(50, height), hours=week) for height in (1.5, 3.0, 6.0)]
    allowed = replay(quiet, ReplayPolicy(vain_pages_per_week=1 / 3))
    # One page in three weeks: only the highest pulse may page.
    assert 3.0 < allowed.policy.threshold_factor <= 6.0
    assert [len(run.pages) for run in allowed.runs] == [0, 0, 1]
    everything = replay(quiet, ReplayPolicy(vain_pages_per_week=1.0))
    assert everything.policy.threshold_factor <= 1.5
    assert len(everything.pages) == 3
    steps = [step.vain_per_week for step in everything.curve]
    assert steps == sorted(steps, key=lambda v: -(v or 0))


def test_too_few_weeks_never_make_it_more_talkative_than_the_model() -> None:
    answer = replay([made(pulse(50, 0.5), hours=1)], ReplayPolicy(vain_pages_per_week=1))
    assert answer.policy.threshold_factor >= 1
    assert any("too few" in note for note in answer.notes)


def test_the_interval_of_a_rate_counts_what_was_not_seen() -> None:
    (step, *_) = replay([made([0.01] * 400, hours=7 * 24.0)], ReplayPolicy()).curve
    # No page in one week: up to 3.69 a week are compatible with it (Garwood 1936).
    assert step.vain_per_week == 0
    assert step.vain_highest == pytest.approx(3.689, abs=1e-3)


def test_quiet_steps_and_kinds_are_kept_silent() -> None:
    assert replay([made(pulse(50, 2.0))], ReplayPolicy(quiet_steps=60)).pages == []
    assert replay([made(pulse(50, 2.0))], ReplayPolicy(page_on=("detection",))).pages == []


def test_a_planned_event_takes_the_high_records_before_it_back() -> None:
    high = made(pulse(50, 2.0)[:52] + [0.01] * 348)
    planned = np.zeros(400, bool)
    planned[51] = True
    alarm = AlertSettings(need=2, of=5)
    assert len(replay([high], ReplayPolicy(alerts=alarm)).pages) == 1
    fields = {name: getattr(high, name) for name in Track.__slots__} | {"planned": planned}
    assert replay([Track(**fields)], ReplayPolicy(alerts=alarm)).pages == []


def test_pauses_are_no_training() -> None:
    rows = records(curve(0, rise=False))
    night = [
        StepRecord(step=r.step, time=r.time + timedelta(hours=12 * (r.step >= 300)), scalars={})
        for r in rows
    ]
    found = track("night", 1, night, LocalScorer(load_shipped()))
    assert found.seconds[-1] == pytest.approx(10 * (STEPS - 1))
    assert not found.has_loss.any()


def test_steps_that_go_back_are_refused() -> None:
    rows = records(curve(0, rise=False))[:3]
    with pytest.raises(ValueError, match="step 0 follows step 2"):
        track("again", 1, [*rows, rows[0]], LocalScorer(load_shipped()))


def test_a_smooth_rise_is_detected_while_it_is_small(tmp_path: Path) -> None:
    pq.write_table(records_to_table(records(curve(1, rise=True))), tmp_path / "bad.parquet")
    pq.write_table(records_to_table(records(curve(2, rise=False))), tmp_path / "good.parquet")
    answer = command(tmp_path, "--json")
    assert answer.exit_code == 0, answer.output
    found = {run["run"]: run for run in json.loads(answer.stdout)["runs"]}
    assert found["good"]["pages"] == []
    onset = found["bad"]["onset"]
    assert 470 <= onset <= 510
    assert found["bad"]["pages"]
    assert found["bad"]["pages"][0]["step"] <= 545


def test_logs_of_others_have_no_times_until_told(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    rows = curve(3, rise=False)
    lines = [f"{i},{row['loss']},{row['grad_norm']}" for i, row in enumerate(rows)]
    log.write_text("\n".join(["step,loss,grad_norm", *lines]))
    policy = tmp_path / "p.yaml"
    policy.write_text("vain_pages_per_week: 1\n")
    answer = command(log, "--policy", policy)
    assert answer.exit_code == 2
    assert "seconds_per_step" in answer.output
    policy.write_text("vain_pages_per_week: 1\nseconds_per_step: 3600\n")
    answer = command(log, "--policy", policy)
    assert answer.exit_code == 0, answer.output
    assert f"{(STEPS - 1) / 168:.3g} weeks of training" in answer.output
    assert "of 1 attempts that did not diverge 0 paged" in answer.output
    assert "FORESHOCK_THRESHOLD_FACTOR=" in answer.output


def test_a_rollback_in_a_file_is_another_attempt(tmp_path: Path) -> None:
    rows = records(curve(4, rise=False))[:200]
    pq.write_table(records_to_table([*rows, *rows[150:]]), tmp_path / "back.parquet")
    found = json.loads(command(tmp_path / "back.parquet", "--json").stdout)["runs"]
    assert [(run["attempt"], run["records"]) for run in found] == [(1, 200), (2, 50)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("vain_page_per_week: 1", "did you mean vain_pages_per_week?"),
        ("threshold_factor: 0", "allowed: above 0"),
        ("threshold_factor: much", "allowed: a number"),
        ("need: 2.5", "allowed: a whole number"),
        ("need: 7", "allowed: 1 to 5"),
        ("page_on: [mail]", "allowed: forecast, detection or both"),
        ("threshold_factor: 2\nvain_pages_per_week: 1", "not both"),
        ("- a", "holds no names"),
        ("a: [", "is not YAML"),
        ("prior: 2", "between 0 and 1"),
    ],
)
def test_a_wrong_policy_is_told_in_a_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=told.replace("?", r"\?")):
        read_policy(path)
    answer = command(tmp_path, "--policy", path)
    assert (answer.exit_code, len(answer.output.splitlines())) == (2, 1)


def test_a_name_that_is_no_file_is_asked_of_the_service(tmp_path: Path) -> None:
    answer = command("no-such-run", "--url", "http://127.0.0.1:9")
    assert answer.exit_code == 2
    assert "no-such-run is no file or folder here, and as a run:" in answer.output


NUMBERS = st.one_of(st.floats(allow_nan=True, allow_infinity=True, width=64), st.just(0.0))
SCALARS = st.dictionaries(
    st.sampled_from(["loss", "grad_norm", "learning_rate", "update_ratio", "param_norm", "tokens"]),
    NUMBERS,
)
EVENTS = st.lists(
    st.sampled_from(["data_switch", "restart", "checkpoint", "nonfinite"]), max_size=1
)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 1000), SCALARS, EVENTS), min_size=1, max_size=120))
def test_whatever_comes_there_is_an_answer_that_says_what_it_lacks(
    rows: list[tuple[int, dict[str, float], list[str]]],
) -> None:
    at, given_records = 0, []
    for gap, scalars, kinds in rows:
        at += gap
        events = tuple(Event(kind=kind) for kind in kinds)
        given_records.append(StepRecord(step=at, time=BEGAN, scalars=scalars, events=events))
    found = track("odd", 1, given_records, LocalScorer(load_shipped()))
    answer = replay([found], ReplayPolicy())
    (run,) = answer.runs
    assert run.records == len(rows)
    # No forecast has a reason, unless the loss is lost and there is nothing to forecast.
    lost = sum(not math.isfinite(scalars.get("loss", 0.0)) for _, scalars, _ in rows)
    silent = int(np.isnan(found.score).sum())
    assert silent - lost <= sum(run.lacking.values()) <= silent * len(HORIZONS)
    json.dumps(answer.as_dict(), allow_nan=False)


def test_nothing_given_is_told() -> None:
    with pytest.raises(ValueError, match="no record in what was given"):
        replay([], ReplayPolicy())


def test_a_single_record_keeps_the_threshold_of_the_model() -> None:
    answer = replay([made([0.1], hours=0)], ReplayPolicy(vain_pages_per_week=1))
    assert answer.policy.threshold_factor == 1
