"""Evaluation: on held-out groups, within the budget, null where the corpus cannot say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from foreshock.api.cli.main import app
from foreshock.api.corpus import CorpusError, CorpusRun, load_corpus, training_rows
from foreshock.api.evaluation import evaluate, leave_one_out
from foreshock.api.fitting import Series, threshold_for
from foreshock.api.forecaster import DivergenceForecaster
from foreshock.api.report import markdown
from tests.api.synthetic import write_corpus


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), groups=6, runs_per_group=8, count=320)


@pytest.fixture(scope="session")
def runs(folder: Path) -> list[CorpusRun]:
    return load_corpus(folder)


def test_a_corpus_is_read_with_its_labels_and_truth(runs: list[CorpusRun]) -> None:
    assert len(runs) == 48
    failed = [run for run in runs if run.label.diverges]
    assert len(failed) == 24
    assert {run.family for run in runs} == {"healthy", "LearningRateRamp", "ScaleFault"}
    for run in failed:
        assert run.fault_start is not None
        assert run.label.onset is not None
        assert run.fault_start < run.label.onset


def test_rows_before_an_interference_are_censored_at_it(runs: list[CorpusRun]) -> None:
    run = next(run for run in runs if run.label.diverges)
    start = run.fault_start
    assert start is not None
    time, observed = run.times()
    assert np.isinf(time[:start]).all()
    assert observed[start - 10] == 10
    assert time[start] == (run.label.onset or 0) - start
    assert not run.judged[run.label.onset :].any()
    rows = training_rows([run])
    assert rows.times[:, 0].min() > 1


def test_thresholds_keep_the_budget_and_say_when_they_cannot() -> None:
    rng = np.random.default_rng(0)
    series = [Series(rng.random(1000), np.ones(1000, dtype=np.bool_)) for _ in range(20)]
    threshold, reason = threshold_for(series, 1.0)
    assert threshold is not None
    assert threshold > 0.5
    assert reason == ""
    threshold, reason = threshold_for(series, 0.1)
    assert threshold is None
    assert "20000 healthy steps cannot tell" in reason


def test_the_report_beats_chance_and_stays_near_its_budget(runs: list[CorpusRun]) -> None:
    result = evaluate(
        runs, folds=2, heads=("full", "loss"), prototype=DivergenceForecaster(folds=3)
    )
    by_name = {(row.method, row.budget): row for row in result.alarms}
    full = by_name["full", "1"]
    if full.reason:
        assert "cannot tell" in full.reason
    else:
        assert full.events == 24
        assert full.forecast is not None
    quality = result.risk["full, 100 steps"]
    assert quality.auroc is not None
    assert quality.auroc > 0.8
    assert quality.average_precision is not None
    assert quality.average_precision > 2 * quality.base_rate
    assert (quality.brier_skill or 0) > 0.2
    text = markdown(result)
    assert "time only" in text
    assert "null: " in text
    json.dumps(result.as_dict(), allow_nan=False)


def test_leave_one_out_names_what_was_left_out(runs: list[CorpusRun]) -> None:
    titles = leave_one_out(runs, prototype=DivergenceForecaster(folds=2, horizons=(100,)))
    assert set(titles) == {
        "without LearningRateRamp",
        "without ScaleFault",
        "without fog_max",
        "without llama3",
    }


def test_too_few_groups_are_refused(runs: list[CorpusRun]) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        evaluate(runs[:12], folds=5)


def test_fit_writes_an_artifact_that_score_uses(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    fitted = runner.invoke(app, ["fit", str(folder), "--out", str(tmp_path / "artifact")])
    assert fitted.exit_code == 0, fitted.output
    assert "1000 steps not supported" in fitted.output
    log = tmp_path / "a.csv"
    log.write_text("step,loss\n" + "".join(f"{i},{2 + 0.01 * (i % 7)}\n" for i in range(80)))
    scored = runner.invoke(
        app, ["score", str(log), "--json", "--artifact", str(tmp_path / "artifact")]
    )
    assert json.loads(scored.stdout.splitlines()[-1])["risk"]["100"] is not None


def test_broken_corpora_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    missing = runner.invoke(app, ["fit", str(tmp_path)])
    assert missing.exit_code == 2
    assert "cannot read" in missing.stderr
    (tmp_path / "runs.jsonl").write_text("no json\n")
    with pytest.raises(CorpusError, match="line 1 is not a run"):
        load_corpus(tmp_path)
    (tmp_path / "runs.jsonl").write_text((folder / "runs.jsonl").read_text())
    with pytest.raises(CorpusError, match="sweep"):
        load_corpus(tmp_path)
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"run": ["x"], "step": [0]}), tmp_path / "shards" / "0.parquet")
    with pytest.raises(CorpusError, match="lacks the columns"):
        load_corpus(tmp_path)
    assert runner.invoke(app, ["evaluate"]).exit_code == 2


def test_other_peoples_logs_are_counted_by_label(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    calm = 2 + 3 * np.exp(-np.arange(300) / 50) + 0.05 * rng.standard_normal(300)
    broken = calm.copy()
    broken[200:] = np.nan
    loss = np.concatenate([calm, broken]).astype(np.float32)
    logs = pa.table(
        {
            "run_id": ["calm"] * 300 + ["broken"] * 300,
            "step": np.tile(np.arange(300.0), 2),
            "loss": loss,
            "loss_logged": np.ones(600, dtype=np.bool_),
            "grad_norm": np.full(600, np.nan, dtype=np.float32),
            "grad_norm_logged": np.zeros(600, dtype=np.bool_),
        }
    )
    pq.write_table(logs, tmp_path / "logs.parquet")
    with (tmp_path / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run_id", "label", "onset_step", "usable", "domain"])
        writer.writerow(["calm", "healthy", "", 1, "LM"])
        writer.writerow(["broken", "nan", 200, 1, "LM"])
    arguments = ["evaluate", "--logs", str(tmp_path / "logs.parquet"), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--index", str(tmp_path / "index.csv")])
    assert result.exit_code == 0, result.output
    rows = {row["label"]: row for row in json.loads(result.stdout)["logs"]}
    assert rows["healthy"]["runs_with_detection"] == 0
    assert rows["nan"]["runs_with_detection"] == 1
    assert rows["nan"]["alarm_by_8_rows_after"] == 1
    assert CliRunner().invoke(app, arguments).exit_code == 2
