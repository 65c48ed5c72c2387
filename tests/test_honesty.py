"""The forecast may not know the answer: no demo run was fitted on, no fault is seen."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from foreshock.api.artifact import load_shipped
from foreshock.api.fitting import version_of
from foreshock.trainer import faults
from foreshock.trainer.recipes import corpus, demo, is_demo
from tests.api.service import Service, new_launch, post_run, put_records
from tests.dashboards.synthetic import record

API = Path(__file__).parent.parent / "api" / "foreshock" / "api"
CORE = ("signals", "features", "forecaster", "scorer", "alerts", "detection", "diagnosis")
STEPS = 120


def test_no_demonstration_is_in_the_fitting_set() -> None:
    artifact = load_shipped()
    assert artifact is not None
    assert len(artifact.fingerprints) > 100
    runs = [config for seed in range(300) for config in demo(seed)]
    assert [c.name for c in runs if artifact.trained_on(c.fingerprint())] == []


def test_the_fitting_set_is_the_sweeps_own() -> None:
    """What was fitted on can be made again: the artifact's runs are those of the recipe."""
    artifact = load_shipped()
    assert artifact is not None
    sweep = [config for stack in corpus(0, 256) for config in stack]
    assert {c.fingerprint() for c in sweep} == artifact.fingerprints
    assert not any(is_demo(config) for config in sweep)


@pytest.mark.parametrize("name", CORE)
def test_the_core_names_no_fault_and_reads_no_configuration(name: str) -> None:
    tree = ast.parse((API / f"{name}.py").read_text())
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not words & set(faults.__all__)
    assert not any("trainer" in (m or "") or "registry" in (m or "") for m in modules)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Risk and diagnosis of the same records, sent as two runs that say different things."""
    service = Service(tmp_path_factory.mktemp("honesty"))
    service.start()
    told: list[tuple[str, dict[str, Any]]] = [
        ("plain", {}),
        ("ScaleFault-LearningRateRamp", {"config": {"fault": "ScaleFault", "learning_rate": 99}}),
    ]
    records = [record(step, onset=60, rise=90) for step in range(STEPS)]
    try:
        with service.client() as client:
            found = []
            for run, members in told:
                launch = new_launch()
                run_id = post_run(client, run, launch, **members)["run_id"]
                assert put_records(client, run_id, launch, 0, records).status_code in (200, 201)
                found.append(_answers(client, run))
    finally:
        service.stop()
    return found


def _answers(client: Any, run: str) -> dict[str, Any]:
    from tests.api.live_helpers import wait_until

    def history() -> dict[str, Any]:
        found: dict[str, Any] = client.get(
            f"/api/v1/runs/{run}/risk/history", params={"points": 10_000}
        ).json()
        return found

    # Risk rows are kept in groups, so the history is a little behind the newest risk.
    wait_until(lambda: history()["step"][-1:] == [STEPS - 1])
    diagnosis = client.get(f"/api/v1/runs/{run}/diagnosis").json()
    return {"probability": history()["probability"], "causes": diagnosis["causes"]}


def test_neither_name_nor_config_changes_an_answer(answers: list[dict[str, Any]]) -> None:
    plain, talkative = answers
    assert plain["causes"]
    assert any(value is not None for value in plain["probability"]["100"])
    assert plain == talkative


def test_the_version_tells_models_apart() -> None:
    artifact = load_shipped()
    assert artifact is not None
    heads = {name: head.features for name, head in artifact.heads.items()}
    assert artifact.version == version_of(sorted(artifact.fingerprints), heads)
    assert version_of(["a"]) != version_of(["b"])
