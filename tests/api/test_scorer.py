"""The local scorer: causal, same for records and columns, honest without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from foreshock.api.artifact import Artifact, ArtifactError, load, load_shipped, save
from foreshock.api.corpus import load_corpus
from foreshock.api.features import FEATURES
from foreshock.api.fitting import fit_artifact
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.scorer import NO_MODEL, LocalScorer
from foreshock.monitor.record import (
    HORIZONS,
    Event,
    Risk,
    StepRecord,
    TensorIdentity,
    TensorStatistics,
)
from tests.api.synthetic import write_corpus

DOWN = "blocks.1.mlp.down"


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), groups=6, runs_per_group=6, count=320)
    return fit_artifact(load_corpus(folder), {}, DivergenceForecaster(folds=3))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreshock.api.scorer.load_shipped", lambda: None)


def records(count: int, *, fail_at: int | None = None, seed: int = 0) -> Iterator[StepRecord]:
    rng = np.random.default_rng(seed)
    for step in range(count):
        ramp = 0.0 if fail_at is None else max(0.0, (step - fail_at) / 30)
        scalars = {
            "loss": 2 + 3 * math.exp(-step / 50) + 0.05 * rng.standard_normal(),
            "grad_norm": float(np.exp(0.1 * rng.standard_normal() + 0.3 * ramp)),
            "update_ratio": 1e-3 * float(np.exp(0.05 * rng.standard_normal() + 0.7 * ramp)),
            "param_norm": 40.0 + 0.01 * step,
        }
        tensors = _tensors(rng, ramp) if step % 4 == 0 else ()
        yield StepRecord(step, datetime.now(UTC), scalars, tensors)


def _tensors(rng: np.random.Generator, ramp: float) -> tuple[TensorStatistics, ...]:
    return tuple(
        TensorStatistics(
            identity=TensorIdentity(layer, role, "e4m3"),
            numel=1024,
            kurtosis=3 * float(np.exp(0.1 * rng.standard_normal() + ramp * (layer == DOWN))),
            headroom_log2=float(0.1 * rng.standard_normal() - 0.4 * ramp * (layer == DOWN)),
            amax=2.0,
            rms=0.5,
        )
        for layer in ("blocks.0.mlp.down", DOWN)
        for role in ("input", "weight", "grad_output")
    )


def score_all(scorer: LocalScorer, rows: Iterator[StepRecord]) -> list[Risk]:
    return [scorer(record) for record in rows]


def test_a_failing_run_alarms_and_its_twin_does_not(artifact: Artifact) -> None:
    threshold = artifact.heads["full"].thresholds
    assert threshold["0.1"] is None
    assert "cannot tell a budget" in artifact.heads["full"].reasons["0.1"]
    failing = score_all(LocalScorer(artifact), records(300, fail_at=150))
    healthy = score_all(LocalScorer(artifact), records(300))
    assert (failing[-1].probability[100] or 0) > (healthy[-1].probability[100] or 1)
    moved = {driver.signal: driver.layer for driver in failing[-1].drivers}
    assert "input.headroom_log2.min" in moved or "update_ratio" in moved
    assert all(layer in (None, DOWN) for signal, layer in moved.items() if "headroom" in signal)


def test_no_answer_depends_on_a_later_record(artifact: Artifact) -> None:
    whole = score_all(LocalScorer(artifact), records(200, fail_at=120))
    part = score_all(LocalScorer(artifact), records(130, fail_at=120))
    assert whole[:130] == part


def test_horizons_are_all_there_and_never_fall(artifact: Artifact) -> None:
    for risk in score_all(LocalScorer(artifact), records(120)):
        assert tuple(risk.probability) == HORIZONS
        known = [risk.probability[h] for h in HORIZONS if risk.probability[h] is not None]
        assert known == sorted(known)  # type: ignore[type-var]
        assert set(risk.reasons) == {h for h in HORIZONS if risk.probability[h] is None}
        for horizon, (low, high) in risk.band.items():
            assert 0 <= low <= (risk.probability[horizon] or 0) <= high <= 1


def test_tensors_gradients_and_loss_can_each_be_missing(artifact: Artifact) -> None:
    for kept in (("loss",), ("loss", "grad_norm"), ("grad_norm",)):
        scorer = LocalScorer(artifact)
        for record in records(100):
            scalars = {name: record.scalars[name] for name in kept}
            risk = scorer.score(step=record.step, scalars=scalars)
        assert risk.probability[100] is not None
    risk = LocalScorer(artifact).score(step=0, scalars={})
    assert "warming up" in risk.reasons[10]


def test_columns_and_records_give_the_same_answer(artifact: Artifact) -> None:
    one, other = LocalScorer(artifact), LocalScorer(artifact)
    for record in records(80):
        identities = tuple(t.identity for t in record.tensors) or None
        names = ("kurtosis", "headroom_log2", "amax", "rms")
        statistics = {n: np.array([getattr(t, n) for t in record.tensors]) for n in names}
        risk = other.score(
            step=record.step,
            scalars=record.scalars,
            identities=identities,
            statistics=statistics if identities else None,
        )
        assert one(record).probability == risk.probability


def test_a_lost_loss_fires_at_once_as_detection(artifact: Artifact) -> None:
    risk = LocalScorer(artifact).score(step=0, scalars={"loss": math.inf})
    assert (risk.state, risk.kind) == ("firing", "detection")
    assert set(risk.probability.values()) == {1.0}


@pytest.mark.usefixtures("no_model")
def test_without_a_model_it_detects_and_says_why_it_does_not_forecast() -> None:
    scorer = LocalScorer()
    for step in range(150):
        risk = scorer.score(step=step, scalars={"loss": 2.0 + 0.01 * (step % 5) + 5 * (step > 120)})
    assert risk.reasons == dict.fromkeys(HORIZONS, NO_MODEL)
    assert (risk.state, risk.kind) == ("firing", "detection")


def test_a_planned_event_does_not_alarm(artifact: Artifact) -> None:
    def last_states(*, announced: bool) -> set[str]:
        scorer = LocalScorer(artifact)
        states: set[str] = set()
        for step in range(300):
            loss = 2 + 3 * math.exp(-step / 50) + 0.05 * math.sin(step**2) + 2.0 * (step >= 200)
            events = (Event("data_switch"),) if announced and step == 200 else ()
            risk = scorer.score(step=step, scalars={"loss": loss}, events=events)
            states.add(risk.state)
        return states

    assert "firing" in last_states(announced=False)
    assert "firing" not in last_states(announced=True)


def test_a_lower_prior_lowers_the_risk(artifact: Artifact) -> None:
    usual = score_all(LocalScorer(artifact), records(100))[-1].probability[100]
    rare = score_all(LocalScorer(artifact, prior=1e-6), records(100))[-1].probability[100]
    assert usual is not None
    assert rare is not None
    assert rare < usual / 10


def test_an_artifact_survives_the_disk(artifact: Artifact, tmp_path: Path) -> None:
    save(artifact, tmp_path)
    again = load(tmp_path)
    assert again.fingerprints == artifact.fingerprints
    assert again.trained_on(next(iter(artifact.fingerprints)))
    one = score_all(LocalScorer(artifact), records(100))
    assert score_all(LocalScorer(again), records(100)) == one


def test_a_foreign_or_broken_artifact_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        load(tmp_path)
    save(artifact, tmp_path)
    card = tmp_path / "model_card.json"
    document = json.loads(card.read_text())
    document["features"]["names"] = [*FEATURES, "loss.of_tomorrow"]
    card.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="fit again"):
        load(tmp_path)
    card.write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        load(tmp_path)


def test_the_shipped_artifact_loads_if_there_is_one() -> None:
    shipped = load_shipped()
    if shipped is not None:
        assert "full" in shipped.heads
        assert shipped.fingerprints


def test_names_of_faults_and_configurations_never_reach_the_features() -> None:
    """The path from record to risk reads scalars, identities and statistics, and no more."""
    banned = ("fault", "truth", "learning_rate", "config", "seed", "recipe")
    assert not [name for name in FEATURES if any(word in name for word in banned)]
    scalars = {"loss": 2.0, "learning_rate": 1e-3}
    one, other = LocalScorer(), LocalScorer()
    for step in range(60):
        first = one.score(step=step, scalars=scalars)
        second = other.score(step=step, scalars={"loss": 2.0, "learning_rate": 10.0 ** (step % 7)})
        assert first == second


def test_a_higher_factor_of_the_threshold_alarms_later_or_never() -> None:
    loss, norm = 3.0, 1.0
    fired = {}
    for factor in (1e-9, 1.0, 1e9):
        scorer = LocalScorer(load_shipped(), threshold_factor=factor)
        risks = [scorer.score(step=i, scalars={"loss": loss, "grad_norm": norm}) for i in range(80)]
        fired[factor] = [risk.state for risk in risks].count("firing")
        # What is compared with the factor does not depend on it.
        assert scorer.alarm_score is not None
    assert fired[1e-9] > 0
    assert fired[1.0] == fired[1e9] == 0
