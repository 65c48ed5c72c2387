"""Every setting is explained, reads back as it was written, and is checked."""

from __future__ import annotations

import dataclasses

import pytest

from foreshock.trainer.config import RunConfig
from foreshock.trainer.faults import LearningRateRamp
from foreshock.trainer.recipes import RECIPES
from foreshock.trainer.settings import overridden, run_from, settings


def _value(config: object, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_every_setting_is_explained() -> None:
    unexplained = [s.name for s in settings() if not s.meaning]
    assert unexplained == []
    names = {s.name for s in settings()}
    assert {"optimizer.clip", "precision.attention", "states.level", "steps"} <= names


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_written_setting_by_setting_is_that_run(recipe: str) -> None:
    config = dataclasses.replace(RECIPES[recipe](3), fault=None)
    written = [f"{s.name}={_value(config, s.name)}" for s in settings()]
    assert overridden(RunConfig(name="other"), written) == config
    assert run_from(config.as_dict()) == config


def test_a_fault_is_a_table_with_its_kind() -> None:
    fault = {"kind": "LearningRateRamp", "start": 150, "factor": 1.05}
    assert run_from({"fault": fault}).fault == LearningRateRamp(start=150, factor=1.05)
    with pytest.raises(ValueError, match="allowed: a table with kind = LearningRateRamp"):
        run_from({"fault": {"kind": "Meteorite"}})
