"""`foreshock sweep`: whole shards or none, an index that tells the truth, resumable, bounded."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from foreshock.api.cli import sweep
from foreshock.api.signals import SIGNALS
from foreshock.trainer.config import RunConfig
from foreshock.trainer.faults import BadBatch
from foreshock.trainer.recipes import debug_cpu


def _stack(number: int) -> list[RunConfig]:
    healthy = replace(debug_cpu(), name=f"sweep-0-{number}-000", steps=6, seed=10 * number)
    broken = replace(
        healthy, name=f"sweep-0-{number}-001", seed=10 * number + 1, fault=BadBatch(start=3)
    )
    return [healthy, broken]


def _corpus(seed: int, count: int, *, models_per_stack: int) -> list[list[RunConfig]]:
    return [_stack(1), _stack(2)]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    monkeypatch.setattr(sweep, "corpus", _corpus)
    app = typer.Typer()
    app.callback()(lambda: None)
    sweep.register(app)
    return app


def _call(app: typer.Typer, out: Path, *options: str) -> dict[str, int]:
    arguments = ["sweep", "--out", str(out), "--json", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    answer: dict[str, int] = json.loads(result.output.strip().splitlines()[-1])
    return answer


def test_shard_holds_every_step_of_every_run(tmp_path: Path) -> None:
    path = tmp_path / "stack.parquet"
    sweep.sweep_stack(_stack(1), path, time.monotonic() + 600)
    table = pq.read_table(path)
    assert table.column_names == ["run", "step", "raw_loss", *SIGNALS]
    assert table["run"].to_pylist() == ["sweep-0-1-000"] * 6 + ["sweep-0-1-001"] * 6
    assert table["step"].to_pylist() == [*range(6), *range(6)]
    loss = np.array(table["raw_loss"])
    assert np.isfinite(loss).all()
    assert loss[3 + 6] > loss[2 + 6]
    kurtosis = np.array(table["input.kurtosis.max"])
    assert np.isfinite(kurtosis).tolist() == [step % 2 == 0 for step in range(6)] * 2


def test_index_tells_each_run_and_its_truth(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    sweep.sweep_stack(_stack(1), tmp_path / "shards" / "a.parquet", time.monotonic() + 600)
    assert sweep.write_index(tmp_path) == 2
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["sweep-0-1-000", "sweep-0-1-001"]
    assert {line["group"] for line in lines} == {"sweep-0-1"}
    assert lines[0]["truth"] is None
    assert lines[1]["truth"]["kind"] == "BadBatch"
    assert lines[1]["truth"]["start"] == 3
    assert "fault" not in lines[1]["config"]
    assert lines[1]["fingerprint"] == _stack(1)[1].fingerprint()


def test_no_shard_is_left_when_time_runs_out(tmp_path: Path) -> None:
    sweep.sweep_stack(_stack(1), tmp_path / "a.parquet", time.monotonic())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_sweep_trains_all_and_goes_on_where_it_was_cut_off(
    app: typer.Typer, tmp_path: Path
) -> None:
    assert _call(app, tmp_path, "--minutes", "0") == {"runs": 0, "stacks": 0, "stacks_left": 2}
    assert _call(app, tmp_path, "--shard", "1/2") == {"runs": 2, "stacks": 1, "stacks_left": 0}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").iterdir()}
    assert _call(app, tmp_path) == {"runs": 4, "stacks": 2, "stacks_left": 0}
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


@pytest.mark.parametrize("shard", ["2/2", "x", "1", "-1/2"])
def test_senseless_shards_are_refused(shard: str, app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", "--out", str(tmp_path), f"--shard={shard}"])
    assert result.exit_code == 2
    assert "is not I/N" in result.output


def test_shard_of_other_runs_has_another_name(tmp_path: Path) -> None:
    def name(stack: Sequence[RunConfig]) -> str:
        return sweep.Job.of(stack, tmp_path).path.name

    assert name(_stack(1)) == name(_stack(1))
    changed = [replace(run, steps=7) for run in _stack(1)]
    assert name(changed) != name(_stack(1))


def test_second_plan_by_the_command(app: typer.Typer, tmp_path: Path) -> None:
    options = ("--plan", "v2", "--scale", "0.05", "--runs", "4", "--stack", "4")
    assert _call(app, tmp_path, *options, "--minutes", "0")["stacks_left"] == 1


def test_an_unknown_plan_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", "--out", str(tmp_path), "--plan", "v3"])
    assert result.exit_code == 2
    assert "allowed: v1, v2" in result.output
