"""Fingerprints name a run for good: what was added since stands aside while at its default."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest

from foreshock.trainer.config import ModelConfig, RunConfig
from foreshock.trainer.config_fields import later
from foreshock.trainer.recipes import RECIPES

# As the first release computed them: corpora, forecasters and checkpoints are named by these.
FIRST = {
    "debug_cpu": "8e1ba306c13ea3f7",
    "llama_cpu": "8dcaabad25d327b2",
    "fog_cpu": "317a352b8dc66b7c",
    "demo_failing": "63d8a9f17195e12b",
}


@pytest.mark.parametrize("name", FIRST)
def test_runs_keep_the_fingerprint_they_had(name: str) -> None:
    assert RECIPES[name](0).fingerprint().startswith(FIRST[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Grown(ModelConfig):
    added: int = later(3)


def test_a_later_field_counts_only_away_from_its_default() -> None:
    old, run = RunConfig(name="a"), RunConfig(name="b", model=Grown())
    assert run.fingerprint() == old.fingerprint()
    assert replace(run, model=Grown(added=4)).fingerprint() != old.fingerprint()
    assert run.as_dict()["model"]["added"] == 3  # type: ignore[index]


def parts_of(config: Any) -> list[Any]:
    inner = (getattr(config, f.name) for f in fields(config))
    return [config, *(part for part in inner if is_dataclass(part))]


def is_plain(value: object) -> bool:
    """Whether JSON holds it, and two of it are equal when they look so."""
    if is_dataclass(value):
        return all(is_plain(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, bool | int | float | str | None)


def test_every_later_field_has_a_default_of_plain_data() -> None:
    added = [
        field
        for part in parts_of(RunConfig(name="a"))
        for field in fields(part)
        if field.metadata.get("later")
    ]
    assert added
    assert all(is_plain(field.default) for field in added)
