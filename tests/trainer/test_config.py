"""Run configurations: what they allow, and that runs keep the identity they were made with."""

from dataclasses import replace

import pytest

from foreshock.trainer.config import PrecisionConfig, RunConfig
from foreshock.trainer.recipes import debug_cpu, fog_cpu, llama_cpu


def test_recipes_keep_the_fingerprints_that_their_runs_are_known_by() -> None:
    known = {"debug-cpu": "8e1ba306c13e", "llama-cpu": "8dcaabad25d3", "fog-cpu": "317a352b8dc6"}
    made = (debug_cpu(), llama_cpu(), fog_cpu())
    assert {run.name: run.fingerprint()[:12] for run in made} == known


def test_a_field_added_later_counts_once_it_leaves_its_default() -> None:
    run = RunConfig(name="a")
    changed = replace(run, precision=PrecisionConfig(attention="fp8"))
    assert changed.fingerprint() != run.fingerprint()
    assert replace(run, name="b").fingerprint() == run.fingerprint()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "fp8"}, "allowed: bf16, emulated"),
        ({"scaling": "tensor"}, "rowwise, block128"),
        ({"attention": "fp4"}, "allowed: plain, fp8"),
        ({"stochastic_rounding": True}, "belong to nvfp4"),
    ],
)
def test_a_recipe_says_what_is_allowed(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**wrong)  # type: ignore[arg-type]
