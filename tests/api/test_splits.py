"""Splits: no group on both sides, every run tested once, what is left out is not trained on."""

from __future__ import annotations

import pytest

from foreshock.api.corpus import CorpusRun, load_corpus
from foreshock.api.outcomes import figures, outcome_of
from foreshock.api.splits import grouped_folds, left_out
from tests.api.synthetic import write_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[CorpusRun]:
    folder = write_corpus(tmp_path_factory.mktemp("splits"), groups=4, runs_per_group=8, count=320)
    return load_corpus(folder)


def test_groups_stand_on_one_side_and_every_run_is_tested_once(runs: list[CorpusRun]) -> None:
    tested: list[str] = []
    for split in grouped_folds(runs, 3):
        assert {r.group for r in split.train}.isdisjoint(r.group for r in split.test)
        tested += [r.name for r in split.test]
    assert sorted(tested) == sorted(r.name for r in runs)


def test_what_is_left_out_is_tested_whole_and_trained_on_never(runs: list[CorpusRun]) -> None:
    splits = left_out(runs)
    for split in splits:
        assert {r.group for r in split.train}.isdisjoint(r.group for r in split.test)
    ramps = [s for s in splits if s.title == "without LearningRateRamp"]
    assert len(ramps) == 2
    assert not any(r.family == "LearningRateRamp" for s in ramps for r in s.train)
    found = {r.name for s in ramps for r in s.test if r.family == "LearningRateRamp"}
    assert found == {r.name for r in runs if r.family == "LearningRateRamp"}
    assert any(r.family == "healthy" for s in ramps for r in s.test)


def test_an_outcome_counts_useful_false_and_late_alarms_apart(runs: list[CorpusRun]) -> None:
    run = next(r for r in runs if r.label.diverges)
    onset, start = run.label.onset or 0, run.fault_start or 0
    early = int(run.steps[run.judged & (run.steps < start)][0])
    one = outcome_of(run, [early, onset - 5, onset + 3])
    assert (one.lead, one.false_alarms) == (5.0, 1)
    late = outcome_of(run, [onset + 3])
    assert late.lead is None
    calm = next(r for r in runs if not r.label.diverges)
    quiet, loud = outcome_of(calm, []), outcome_of(calm, [int(calm.steps[-1])])
    both = figures("rule", "1", [one, late, quiet, loud])
    assert (both.events, both.forecast, both.lead_median) == (2, 0.5, 5.0)
    assert both.healthy_runs == 0.5
    assert both.lead_share == pytest.approx(5 / onset)
    assert both.false_rate == pytest.approx(
        1e4 * 2 / (2 * one.healthy_steps + 2 * quiet.healthy_steps)
    )
