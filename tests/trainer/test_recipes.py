"""Recipes: the demonstration and the corpus never meet; shares, stacks and seeds of the corpus."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from foreshock.trainer.config import RunConfig
from foreshock.trainer.faults import BadBatch, LearningRateRamp, OutlierRamp, ScaleFault
from foreshock.trainer.recipes import RECIPES, corpus, debug_cpu, demo, is_demo


def _runs(seed: int, count: int) -> list[RunConfig]:
    return [run for stack in corpus(seed, count) for run in stack]


def test_demo_twins_differ_in_name_and_fault_alone() -> None:
    failing, healthy = demo(7)
    assert isinstance(failing.fault, LearningRateRamp)
    assert healthy.fault is None
    assert replace(failing, name=healthy.name, fault=None) == healthy


def test_demo_draws_its_fault_from_the_seed() -> None:
    faults = [demo(seed)[0].fault for seed in range(50)]
    assert demo(3)[0].fault == faults[3]
    assert len({f.start for f in faults if isinstance(f, LearningRateRamp)}) > 20
    assert all(isinstance(f, LearningRateRamp) and 200 <= f.start <= 320 for f in faults)
    with pytest.raises(ValueError, match="seed is -1"):
        demo(-1)


def test_demo_and_corpus_share_no_shape_seed_or_fault() -> None:
    shown = [run for seed in range(60) for run in demo(seed)]
    fitted = [run for seed in range(2) for run in _runs(seed, 200)]
    assert all(is_demo(run) for run in shown)
    assert not any(is_demo(run) for run in fitted)
    assert not {r.model for r in shown} & {r.model for r in fitted}
    assert not {r.seed for r in shown} & {r.seed for r in fitted}
    assert not {r.fault for r in shown if r.fault} & {r.fault for r in fitted if r.fault}
    assert not {r.fingerprint() for r in shown} & {r.fingerprint() for r in fitted}


def test_runs_of_a_stack_can_train_as_one() -> None:
    for stack in corpus(1, 100):
        assert len({(r.model, r.data, r.steps, r.tensor_every) for r in stack}) == 1
        assert 500 <= stack[0].steps <= 800


def test_corpus_holds_what_it_promises() -> None:
    runs = _runs(2, 400)
    assert len(runs) == 400
    kinds = Counter(type(r.fault) for r in runs)
    for kind in (BadBatch, LearningRateRamp, OutlierRamp, ScaleFault):
        assert kinds[kind] > 0.02 * len(runs)
    injected = [r for r in runs if r.fault and not _bounded(r)]
    assert 0.31 <= len(injected) / len(runs) <= 0.41
    assert {r.precision.scaling for r in runs} == {"delayed", "current"}
    assert {r.precision.backend for r in runs} == {"emulated", "bf16"}
    assert {r.model.architecture for r in runs} == {"llama3", "fog_max"}


def _bounded(run: RunConfig) -> bool:
    return isinstance(run.fault, LearningRateRamp) and run.fault.limit <= 3


def test_every_run_is_its_own_and_the_seed_decides_all() -> None:
    runs = _runs(0, 300)
    assert len({r.seed for r in runs}) == len({r.name for r in runs}) == 300
    assert len({r.fingerprint() for r in runs}) == 300
    assert runs == _runs(0, 300)
    assert not {r.seed for r in runs} & {r.seed for r in _runs(1, 300)}


def test_more_runs_leave_whole_earlier_stacks_as_they_were() -> None:
    assert corpus(0, 64)[:3] == corpus(0, 300)[:3]


def test_names_and_settings_of_faulted_runs_do_not_tell() -> None:
    for run in _runs(0, 100):
        assert run.name.startswith("sweep-0-")
        assert run.name.replace("sweep", "").replace("-", "").isdigit()


def test_senseless_corpora_are_refused() -> None:
    with pytest.raises(ValueError, match="count is 0"):
        corpus(0, 0)
    with pytest.raises(ValueError, match="models_per_stack is 500"):
        corpus(0, 10, models_per_stack=500)
    with pytest.raises(ValueError, match="seed is 65536"):
        corpus(1 << 16, 10)


def test_every_recipe_takes_a_seed() -> None:
    for make in RECIPES.values():
        assert make(0).fingerprint() != make(1).fingerprint()
    assert debug_cpu().steps <= 30


def test_a_last_bit_is_no_other_run() -> None:
    """Processors differ there in exp and log; what a person changes is another run."""
    run = debug_cpu(0)
    rate = run.optimizer.learning_rate

    def trained_at(learning_rate: float) -> str:
        optimizer = replace(run.optimizer, learning_rate=learning_rate)
        return replace(run, optimizer=optimizer).fingerprint()

    assert trained_at(math.nextafter(rate, 1.0)) == trained_at(rate) == run.fingerprint()
    assert trained_at(rate * (1 + 1e-6)) != run.fingerprint()
