"""The second plan: reproducible, whole in every part, and apart from what is judged elsewhere."""

from collections import Counter

import pytest

from foreshock.trainer.corpus_plan import RECIPES_OF_PLAN, PlannedRun, corpus_plan
from foreshock.trainer.recipes import corpus, is_demo
from foreshock.trainer.stacked import check_alike


@pytest.fixture(scope="module")
def plan() -> list[list[PlannedRun]]:
    return corpus_plan(3, 26, models_per_stack=32)


def test_a_stack_depends_on_its_number_alone(plan: list[list[PlannedRun]]) -> None:
    assert corpus_plan(3, 5, models_per_stack=32) == plan[:5]
    assert corpus_plan(4, 1, models_per_stack=32)[0] != plan[0]


def test_stacks_train_as_one(plan: list[list[PlannedRun]]) -> None:
    for stack in plan:
        check_alike([run.config for run in stack], texts=False)
        assert len({run.config.precision.attention for run in stack}) == 1


def test_every_architecture_recipe_and_fault_is_there(plan: list[list[PlannedRun]]) -> None:
    runs = [run for stack in plan for run in stack]
    assert len({run.config.model.architecture for run in runs}) == 7
    assert {run.recipe for run in runs} == set(RECIPES_OF_PLAN)
    assert all(run.config.precision == RECIPES_OF_PLAN[run.recipe] for run in runs)
    kinds = Counter(type(run.config.fault).__name__ for run in runs)
    assert set(kinds) == {
        "NoneType", "LearningRateRamp", "BadBatch", "ScaleFault", "OutlierRamp",
    }  # fmt: skip
    of_kind = Counter(run.kind for run in runs)
    assert of_kind["natural"] > of_kind["fault"] > of_kind["benign"]
    assert {run.hard for run in runs if run.kind == "hard_healthy"} >= {
        "data_switch", "batch_ramp", "restart", "restart_lost_optimizer", "plateau", "noisy",
    }  # fmt: skip


def test_larger_widths_are_for_testing_alone(plan: list[list[PlannedRun]]) -> None:
    runs = [run for stack in plan for run in stack]
    assert {run.config.model.width for run in runs if run.split == "width"} == {256, 384}
    assert max(run.config.model.width for run in runs if run.split == "fit") == 128


def test_twins_differ_in_fault_or_event_alone(plan: list[list[PlannedRun]]) -> None:
    named = {run.config.name: run for stack in plan for run in stack}
    pairs = [(run, named[run.twin]) for run in named.values() if run.twin is not None]
    assert 0.1 < len(pairs) / len(named) < 0.4
    for run, twin in pairs:
        assert twin.twin == run.config.name
        assert twin.group == run.group
        assert twin.config.seed == run.config.seed
        assert twin.config.model == run.config.model
        assert twin.config.precision == run.config.precision
        assert twin.config.fingerprint() != run.config.fingerprint()


def test_planned_events_stand_at_their_step(plan: list[list[PlannedRun]]) -> None:
    for run in (run for stack in plan for run in stack):
        for step, kind in run.events:
            assert 0 < step < run.config.steps
            if kind == "data_switch":
                assert run.config.data.switch_at == step
            if kind == "lr_change":
                assert run.config.schedule.drop_at == step


def test_no_run_is_in_the_first_corpus_or_the_demonstration(plan: list[list[PlannedRun]]) -> None:
    first = {run.fingerprint() for stack in corpus(0, 64) for run in stack}
    configs = [run.config for stack in plan for run in stack]
    assert not first & {config.fingerprint() for config in configs}
    assert not any(is_demo(config) for config in configs)


@pytest.mark.parametrize(
    ("stacks", "models", "scale", "message"),
    [(0, 8, 1.0, "stacks is 0"), (1, 2, 1.0, "4 to 256"), (1, 8, 1.5, "scale is 1.5")],
)
def test_senseless_plans_are_refused(stacks: int, models: int, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus_plan(0, stacks, models_per_stack=models, scale=scale)
