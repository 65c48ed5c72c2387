"""foreshock import of other people's logs, into a real service and back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from foreshock.api.cli.importing import run_name
from foreshock.api.cli.main import app
from foreshock.monitor.record import table_to_records
from tests.api.service import Service, new_launch

STATE = """{"global_step": 3, "log_history": [
 {"step": 1, "loss": 5.0, "learning_rate": 0.001, "epoch": 0.1},
 {"step": 2, "loss": NaN, "learning_rate": 0.001},
 {"step": 3, "loss": 4.0, "learning_rate": Infinity},
 {"step": 3, "train_loss": 4.5, "note": "done"}]}"""
RESTARTED = "step,loss\n" + "".join(f"{s},{5 - s / 100}\n" for s in (*range(100), *range(80, 200)))


def foreshock(service: Service, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--url", service.url])


@pytest.fixture
def name() -> str:
    return f"imported-{new_launch()[:8]}"


def test_a_log_goes_in_once_and_comes_back(
    served: Service, client: httpx.Client, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "trainer_state.json"
    path.write_text(STATE)
    done = foreshock(served, "import", path, "--run", name, "--project", "logs")
    assert done.exit_code == 0, done.output
    assert "read as hf: 8 values, 2 of them not finite" in done.output
    assert "left out: note (no number)" in done.output
    assert f"3 records of run {name}" in done.output
    again = foreshock(served, "import", path, "--run", name, "--project", "logs", "--json")
    (run,) = json.loads(again.stdout)["runs"]
    assert run == {
        "run": name,
        "attempts": [
            {"records": 3, "first_step": 1, "last_step": 3, "batches": 1, "repeated_batches": 1}
        ],
    }
    run_id = client.get(f"/api/v1/runs/{name}", params={"project": "logs"}).json()
    assert (run_id["attempts"], run_id["config"]) == (1, {"imported_from": "hf"})
    target = tmp_path / "back.parquet"
    back = foreshock(served, "export", name, target, "--project", "logs")
    assert back.exit_code == 0, back.output
    records = table_to_records(pq.read_table(target))
    assert [record.step for record in records] == [1, 2, 3]
    assert math.isnan(records[1].scalars["loss"])
    assert records[2].scalars == {
        "loss": 4.0,
        "learning_rate": math.inf,
        "train_loss": 4.5,
    }


def test_attempts_of_a_log_are_attempts_of_the_run(
    served: Service, client: httpx.Client, tmp_path: Path, name: str
) -> None:
    path = tmp_path / f"{name}.csv"
    path.write_text(RESTARTED)
    for expected in (0, 2):
        report = json.loads(foreshock(served, "import", path, "--json").stdout)
        (run,) = report["runs"]
        assert [(a["first_step"], a["last_step"]) for a in run["attempts"]] == [(0, 99), (80, 199)]
        assert sum(a["repeated_batches"] for a in run["attempts"]) == 2 * expected
    query = {"name": "loss"}
    series = client.get(f"/api/v1/runs/{name}/series", params=query).json()
    assert series["step"] == list(range(200))
    first = client.get(f"/api/v1/runs/{name}/series", params={**query, "attempt": "1"}).json()
    assert first["step"] == list(range(100))
    detail = client.get(f"/api/v1/runs/{name}").json()
    assert detail["attempts"] == 2


def test_a_grown_log_is_a_new_attempt_and_the_view_is_whole(
    served: Service, client: httpx.Client, tmp_path: Path, name: str
) -> None:
    path = tmp_path / f"{name}.jsonl"
    for count in (50, 70):
        path.write_text("".join(f'{{"step": {s}, "loss": {s}}}\n' for s in range(count)))
        assert foreshock(served, "import", path).exit_code == 0
    series = client.get(f"/api/v1/runs/{name}/series", params={"name": "loss"}).json()
    assert series["step"] == list(range(70))


def test_one_run_of_several(
    served: Service, client: httpx.Client, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text(f"run_id,step,loss\n{name} A,0,1\n{name}/B,0,2\n")
    wrong = foreshock(served, "import", path, "--run", "C")
    assert (wrong.exit_code, f"it has {name}-A, {name}-B" in wrong.output) == (2, True)
    assert foreshock(served, "import", path, "--run", f"{name}/B").exit_code == 0
    assert client.get(f"/api/v1/runs/{name}-A").status_code == 404
    assert foreshock(served, "import", path).exit_code == 0
    assert client.get(f"/api/v1/runs/{name}-A").json()["last_step"] == 0
    assert client.get(f"/api/v1/runs/{name}-B").json()["attempts"] == 1


def test_a_dry_run_needs_no_service(tmp_path: Path) -> None:
    path = tmp_path / "loss.log"
    path.write_text("it 3: loss=inf\n")
    arguments = ["import", str(path), "--regex", r"it (?P<step>\d+): loss=(?P<loss>\S+)"]
    arguments += ["--dry-run", "--url", "http://127.0.0.1:9"]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.output.splitlines()[-2:]) == (
        0,
        ["1 records of run loss", "nothing was sent"],
    )


def test_what_does_not_work_is_one_line(served: Service, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("step,loss\n1,2\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text('{"records": [{"step": -1}]}')
    path = tmp_path / "a.csv"
    for arguments, message in (
        ((path, "--map", "loss=Loss"), "no such name"),
        ((path, "--run", "a b"), "run"),
        ((path, "--format", "xml"), "known:"),
        ((path, "--format", "hf"), "log_history"),
        ((path, "--regex", "("), "--regex"),
        ((tmp_path / "empty",), "holds no spool"),
        ((tmp_path / "absent",), "does not exist"),
        ((tmp_path / "a.json",), "time is missing"),
        ((tmp_path / "a.json", "--map", "loss=x"), "no such name"),
    ):
        done = foreshock(served, "import", *arguments)
        assert (done.exit_code, len(done.output.strip().splitlines())) == (2, 1), done.output
        assert message in done.output
    dead = CliRunner().invoke(app, ["import", str(path), "--url", "http://127.0.0.1:9"])
    assert (dead.exit_code, "does not answer" in dead.output) == (2, True)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("out/llama 1b/checkpoint-500/trainer_state.json", "llama-1b"),
        ("logs/run7/events.out.tfevents.17.host", "run7"),
        ("job-a/nvdlfw_inspect_statistics_logs/nvdlfw_inspect_globalrank-0.log", "job-a"),
        ("x/5f0c8a1e9b7d4c3f8e2a6b1d0c9f7e5a.csv", "run-5f0c8a1e9b7d4c3f8e2a6b1d0c9f7e5a"),
    ],
)
def test_a_run_is_named_after_what_tells_it_apart(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.touch()
    assert run_name(file) == name
    if "checkpoint" in path or "statistics" in path:
        assert run_name(file.parent) == name
